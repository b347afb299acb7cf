"""The axis that `nnx.vmap` adds to what is made inside it, in the `sharding` of new Refs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nnx.sharding.rules import inserted
from nnx.sharding.structure import with_shardings
from nnx.transforms.result import Packed, Spec

__all__: list[str] = []


def with_axes(packed: Packed, axes: Sequence[int | None], entry: Any = None) -> Packed:
    """A Packed whose new Refs speak of the axes that they have now.

    Args:
      packed: what a body left behind.
      axes: for each new Ref where the axis was added, or None.
      entry: what the `sharding` says of it.
    """
    graph = packed.spec.graph
    if graph is None or not any(axis is not None for axis in axes):
        return packed
    added = {n: (axis, x) for n, axis, x in zip(graph.new(), axes, packed.out[0], strict=True)}

    def change(n: int, said: Any) -> Any:
        axis, value = added.get(n, (None, None))
        if axis is None:
            return said
        # The rank says where an axis is that is counted from the end; a spec may not have it.
        return inserted(said, axis % getattr(value, "ndim", len(said) + 1), entry)

    moved = graph._replace(dagdef=with_shardings(graph.dagdef, change))
    return Packed(Spec(packed.spec.written, moved), packed.out, packed.written)
