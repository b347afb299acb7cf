"""Where the values of a model are: as text, and in bytes per device. No value is read."""

from __future__ import annotations

import math
from typing import Any

from jax.core import Tracer
from jax.sharding import NamedSharding

import refx
from nnx.sharding.placing import shardings, with_places
from refx import Node

__all__ = ["Placement", "placement_text"]


def sharding_of(x: Any) -> NamedSharding | None:
    """The sharding of an array or a shape on a mesh."""
    found = None if isinstance(x, Tracer) else getattr(x, "sharding", None)
    return found if isinstance(found, NamedSharding) else None


def placement_text(x: Any) -> str:
    """Text after a shape that says how the array is divided; empty if it is whole."""
    sharding = sharding_of(x)
    return f" {sharding.spec}" if sharding is not None and any(sharding.spec) else ""


class Placement:
    """Where values are now, or would be on a mesh. The mesh's devices need not exist."""

    def __init__(self, model: Node, specs: Any, mesh: Any):
        self._planned: dict[int, Any] = {}
        if specs is not None or mesh is not None:
            cells = refx.refs(model)
            values = refx.get_partition(model)
            for path, sharding in shardings(model, specs, mesh=mesh).items():
                self._planned[id(cells.get(path, values.get(path)))] = sharding
        self.planned = bool(self._planned)

    def bytes_of(self, cell: Any, value: Any) -> tuple[int, bool]:
        """The bytes of a value that one device holds, and whether that is less than the whole value."""
        said = self._planned.get(id(cell))
        total, divided = 0, False
        for x, sharding in with_places(value, said):
            if not hasattr(x, "shape"):
                continue
            sharding = sharding or sharding_of(x)
            shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
            total += math.prod(shape) * x.dtype.itemsize
            divided |= tuple(shape) != tuple(x.shape)
        return total, divided
