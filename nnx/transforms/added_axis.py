"""Axes that a transformation adds or takes away, in the `sharding` of the Refs.

In the body of `nnx.vmap`, and of a loop, a Ref holds a slice, whose `sharding` has no entry for the
axis that is mapped. What the body makes has one more axis outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nnx.sharding.rules import check_rank, inserted
from nnx.sharding.structure import from_zero, with_shardings, without_axes
from nnx.transforms.call import Call
from nnx.transforms.layout import Layout
from nnx.transforms.result import Packed, Spec

__all__: list[str] = []


def with_axes(name: str, packed: Packed, axes: Sequence[int | None], entry: Any = None) -> Packed:
    """A Packed whose new Refs speak of the axes that they have now.

    Args:
      name: the transformation, for messages.
      packed: what all lanes or steps of a body left behind.
      axes: for each new Ref where the axis was added, or None.
      entry: what the `sharding` says of it.

    Raises:
      ShardingError: the `sharding` of a new Ref is not for its value.
    """
    graph = packed.spec.graph
    if graph is None or not any(axis is not None for axis in axes):
        return packed
    added = {n: (axis, x) for n, axis, x in zip(graph.new(), axes, packed.out[0], strict=True)}

    def change(n: int, said: Any) -> Any:
        axis, value = added.get(n, (None, None))
        if axis is None:
            return said
        said = inserted(said, from_zero(axis, value), entry)
        check_rank(said, value, f"{name}: a new Ref")
        return said

    moved = graph._replace(dagdef=with_shardings(graph.dagdef, change))
    return Packed(Spec(packed.spec.written, moved), packed.out, packed.written)


def of_steps(name: str, packed: Packed) -> Packed:
    """A Packed of a loop, which has stacked the new Refs of all steps along a leading axis."""
    graph = packed.spec.graph
    return packed if graph is None else with_axes(name, packed, [0] * len(packed.out[0]))


def of_slices(name: str, call: Call, axes: Sequence[int | None]) -> Layout:
    """The layout of a call for a body in which each Ref has lost an axis, or (None) has not.

    Raises:
      ShardingError: the `sharding` of a Ref is not for its value.
    """
    dagdef = call.layout.dagdef
    return call.layout.sliced(without_axes(name, dagdef, call.values.refs, axes, skip=1))
