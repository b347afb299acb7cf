"""The errors for objects that a file cannot hold, and what to do instead."""

from __future__ import annotations

from typing import Any

import jax

from nnx.serialize.errors import SaveError
from nnx.serialize.registry import is_config
from refx.partition import Path, dotted
from refx.text import with_article

__all__: list[str] = []


def at(path: Path) -> str:
    """The beginning of a message about the value at a path."""
    return f"The value at {dotted(path)!r}" if path else "The object given to nnx.save"


def unsaveable(x: Any, path: Path) -> SaveError:
    """The error for an object that a file cannot hold."""
    kind = type(x)
    if isinstance(x, jax.ShapeDtypeStruct):
        return SaveError(
            f"{at(path)} is a shape without values, from nnx.eval_shape. Save a real model."
        )
    if callable(x) and not isinstance(x, type):
        what = getattr(x, "__qualname__", repr(x))
        return SaveError(
            f"{at(path)} is {what}, a function that a file has no name for, and files never hold "
            "code. Register it with @nnx.saveable where it is defined, or use one of jax.nn. Or "
            "save only the values: nnx.save(path, nnx.get_partition(tree, ...)), and read them "
            "with nnx.load_state(path, into=tree)."
        )
    if is_config(kind):
        return SaveError(
            f"{at(path)} is {with_article(kind.__qualname__)}, a dataclass that no other program could "
            f"find by its name. Define it at the top of a Python module, or register it with "
            f"@nnx.saveable(name=...)."
        )
    what = f"the class {x.__qualname__}" if isinstance(x, type) else with_article(kind.__qualname__)
    return SaveError(
        f"{at(path)} is {what}, which nnx.save does not know. Register the class with "
        "@nnx.saveable (with save= and load= if it is not a dataclass)."
    )
