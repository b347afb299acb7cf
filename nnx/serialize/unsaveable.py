"""What a file has no form for, and what to do instead."""

from __future__ import annotations

from typing import Any

import jax

from nnx.serialize.errors import SaveError
from nnx.serialize.registry import is_config
from refx.partition import Path, dotted

__all__: list[str] = []


def at(path: Path) -> str:
    """How a message begins that is about the value at a path."""
    return f"The value at {dotted(path)!r}" if path else "What was to be saved"


def unsaveable(x: Any, path: Path) -> SaveError:
    """The error for what a file has no form for."""
    kind = type(x)
    if isinstance(x, jax.ShapeDtypeStruct):
        return SaveError(
            f"{at(path)} is a shape without values, as nnx.eval_shape gives. Make the model itself."
        )
    if callable(x) and not isinstance(x, type):
        what = getattr(x, "__qualname__", repr(x))
        return SaveError(
            f"{at(path)} is {what}, a function that has no name in a file, which holds no code. "
            f"Register it with @nnx.saveable where it is defined, use one of jax.nn, or save the "
            f"values alone: nnx.save(path, nnx.get_partition(tree, ...)), to be read with "
            f"nnx.load_state(path, into=tree)."
        )
    if is_config(kind):
        return SaveError(
            f"{at(path)} is a {kind.__qualname__}, a dataclass that no other program could find by "
            f"its name. Define it at the top of a Python module, or register it with @nnx.saveable(name=...)."
        )
    what = f"the class {x.__qualname__}" if isinstance(x, type) else f"a {kind.__qualname__}"
    return SaveError(
        f"{at(path)} is {what}, which nnx.save does not know. Register the class with "
        f"@nnx.saveable (with save= and load= if it is no dataclass)."
    )
