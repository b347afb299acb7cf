"""Moving values by path into a model: everything is checked first, then everything is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

import refx
from refx import Partition, RefError, UnknownPathError
from refx.dag import find_ref
from refx.partition import Path, dotted

__all__ = ["BridgeError"]


class BridgeError(RefError, ValueError):
    """Weights of another library do not fit a model; nothing was changed.

    The message lists all that is missing, unexpected, or of another shape.
    """


class Mover:
    """Collects values for the Refs of a model, with all that is wrong about them."""

    def __init__(self, ours: Any, source: str):
        self.ours = ours
        self.source = source
        self.cells = refx.refs(ours)
        self.values: dict[Path, Any] = {}
        # Where each value came from, also one that does not fit.
        self._from: dict[Path, str] = {}
        self.unexpected: list[str] = []
        self.wrong: list[str] = []

    def find(self, path: Any) -> Path | None:
        """The canonical path of the Ref at a path, or None; of a shared Ref any path will do."""
        try:
            return find_ref(self.ours, path, self.cells)[0]
        except UnknownPathError:
            return None

    def put(self, path: Any, value: Any, name: str) -> None:
        """Note a value for a path."""
        found = self.find(path)
        if found is None:
            self.unexpected.append(
                f"{name} (as {dotted(path)!r})" if dotted(path) != name else name
            )
            return
        first = self._from.setdefault(found, name)
        old = self.cells[found].value
        if isinstance(value, jax.ShapeDtypeStruct):
            self.wrong.append(f"{dotted(found)} gets a shape without values from {name}")
            return
        if np.shape(value) != np.shape(old):
            self.wrong.append(
                f"{dotted(found)} has shape {np.shape(old)}, but {name} gives {np.shape(value)}"
            )
            return
        cast = convert(value, old)
        if cast is None:
            self.wrong.append(
                f"{dotted(found)} has dtype {dtype_of(old)}, but {name} has "
                f"{np.asarray(value).dtype}"
            )
            return
        if found in self.values and not np.array_equal(
            np.asarray(self.values[found]), np.asarray(cast)
        ):
            self.wrong.append(f"{dotted(found)} is one shared value, but {first} and {name} differ")
        self.values[found] = cast

    def finish(self, required: Iterable[Any] = (), *, strict: bool = True) -> None:
        """Write everything, or raise an error with all that is wrong.

        Args:
          required: the collections of which every Ref must have got a value.
          strict: whether what is missing or unexpected is an error; a wrong shape always is.
        """
        wanted = set(required)
        missing = [
            dotted(path)
            for path, cell in self.cells.items()
            if cell.collection in wanted and path not in self._from
        ]
        sections = [("has another shape or dtype", self.wrong)]
        if strict:
            sections.append((f"is missing in {self.source}", missing))
            sections.append((f"is unexpected in {self.source}", self.unexpected))
        if any(items for _, items in sections):
            raise BridgeError(message(type(self.ours).__name__, sections))
        refx.update(self.ours, Partition(self.values))


def message(model: str, sections: list[tuple[str, list[str]]]) -> str:
    """The text of a BridgeError."""
    lines = [
        f"  {what}:\n" + "\n".join(f"    {item}" for item in items)
        for what, items in sections
        if items
    ]
    return f"The weights do not fit the {model}, and nothing was changed.\n" + "\n".join(lines)


def convert(value: Any, like: Any) -> Any:
    """`value` in the dtype and on the devices of `like`, or None where the kind of number differs.

    `like` may be a `jax.ShapeDtypeStruct`, as in a model that `nnx.eval_shape` made.
    """
    target = dtype_of(like)
    given = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    same = given == target or any(
        jnp.issubdtype(given, kind) and jnp.issubdtype(target, kind)
        for kind in (jnp.floating, jnp.integer, jnp.complexfloating)
    )
    return _placed(jnp.array(value, dtype=target, copy=True), like) if same else None


def dtype_of(x: Any) -> Any:
    """The dtype of an array, of a number, or of the shape that stands for one."""
    return x.dtype if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x).dtype


def _placed(array: jax.Array, like: Any) -> jax.Array:
    committed = isinstance(like, jax.Array) and not isinstance(like, Tracer) and like.committed
    if not committed and not isinstance(like, jax.ShapeDtypeStruct):
        return array
    return array if like.sharding is None else jax.device_put(array, like.sharding)


def nested(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """A flat mapping by path as nested dicts."""
    result: dict[str, Any] = {}
    for path, value in flat.items():
        at = result
        for name in path[:-1]:
            at = at.setdefault(name, {})
        at[path[-1]] = value
    return result
