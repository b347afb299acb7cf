"""What the layers share: dtype promotion, initial values, and the names of argument types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from nnx.module import Module
from nnx.scope import make_rng
from refx import Ref

Dtype = Any
Initializer = Callable[..., jax.Array]
Metadata = Mapping[str, Any]

default_kernel_init: Initializer = initializers.lecun_normal()
zeros: Initializer = initializers.zeros
ones: Initializer = initializers.ones


def promote_dtype(arrays: Sequence[Any], *, dtype: Dtype = None) -> tuple[Any, ...]:
    """Cast arrays to `dtype`, or without it to the floating dtype that they promote to together.

    A None among the arrays stays None.
    """
    if dtype is None:
        dtype = jnp.result_type(*(x for x in arrays if x is not None))
        if not jnp.issubdtype(dtype, jnp.inexact):
            dtype = jnp.promote_types(dtype, jnp.float32)
    return tuple(None if x is None else jnp.asarray(x, dtype) for x in arrays)


def new_ref(
    init: Initializer, shape: tuple[int, ...], dtype: Dtype, metadata: Metadata
) -> Ref[jax.Array]:
    """A parameter with its initial value; constants take no key from the stream."""
    key = None if init in (zeros, ones) else make_rng("params")
    return Ref(init(key, shape, dtype), "params", **metadata)


def shape_error(layer: Module, what: str, expected: str, got: Any) -> ValueError:
    """The error for an input that does not fit a layer."""
    return ValueError(
        f"{type(layer).__name__} expects {what} of shape {expected}, but got {tuple(got)}."
    )
