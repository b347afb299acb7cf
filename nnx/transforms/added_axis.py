"""The axis that `nnx.vmap` adds to what is made inside it, in the `sharding` of new Refs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nnx.sharding.rules import inserted
from nnx.sharding.structure import with_shardings
from nnx.transforms.boundary import Packed, Spec
from refx.dagdef import RefDef

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
    nodes = enumerate(graph.dagdef.nodes)
    new = [n for n, x in nodes if type(x) is RefDef and n not in graph.known]
    added = dict(zip(new, axes, strict=True))

    def change(n: int, said: Any) -> Any:
        axis = added.get(n)
        return said if axis is None else inserted(said, axis, entry)

    moved = graph._replace(dagdef=with_shardings(graph.dagdef, change))
    return Packed(Spec(packed.spec.written, moved), packed.out, packed.written)
