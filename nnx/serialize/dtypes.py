"""Dtypes in a file: their names, and which bits are valid."""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from nnx.serialize.grammar import Damaged, clip

__all__: list[str] = []


def dtype_name(dtype: Any) -> str:
    """A dtype as text: its name, if that is enough."""
    name = dtype.name
    try:
        return name if jnp.dtype(name) == dtype else dtype.str
    except TypeError:
        return dtype.str


def dtype_of(name: str) -> np.dtype:
    """The dtype of a name that `dtype_name` returned."""
    dtype = jnp.dtype(name)
    if dtype.hasobject:
        raise Damaged(f"the dtype {name!r} is for Python objects")
    if dtype_name(dtype) != name:
        raise Damaged(f"the dtype {clip(name)} is not spelled as save spells it")
    return dtype


_NARROW = re.compile(r"u?int[124]$|float[46]_")


def has_bad_bits(array: np.ndarray) -> bool:
    """Whether an array has bits that are not valid for its dtype."""
    kind = array.dtype
    if kind == np.bool_:
        return bool((array.view(np.uint8) > 1).any())
    if kind.kind == "U":
        points = (
            np.ascontiguousarray(array)
            .reshape(-1)
            .view(np.dtype("u4").newbyteorder(kind.byteorder))
        )
        return bool((points > 0x10FFFF).any())
    if _NARROW.match(kind.name):
        # A byte could hold more values than these.
        same = array.astype(np.float32).astype(kind)
        return same.tobytes() != array.tobytes()
    return False
