"""Adapt the `sharding` of Refs to an axis that a transformation adds or removes.

In the body of `nnx.vmap` or a loop, a Ref holds a slice, so its `sharding` has no entry for the mapped
axis. A Ref that the body makes has one more axis outside.
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
    """Add an entry for the new axis to the `sharding` of each new Ref in a Packed.

    Args:
      name: the transformation, for messages.
      packed: the result of all lanes or steps of a body.
      axes: for each new Ref, the position of the added axis, or None.
      entry: the entry for the axis.

    Raises:
      ShardingError: the `sharding` of a new Ref does not fit its value.
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
    """The same for a loop, which stacks the new Refs of all steps along a leading axis."""
    graph = packed.spec.graph
    return packed if graph is None else with_axes(name, packed, [0] * len(packed.out[0]))


def of_slices(name: str, call: Call, axes: Sequence[int | None]) -> Layout:
    """The layout of a call for a body in which each Ref has lost its axis in `axes` (None: has none).

    Raises:
      ShardingError: the `sharding` of a Ref does not fit its value.
    """
    dagdef = call.layout.dagdef
    return call.layout.sliced(without_axes(name, dagdef, call.values.refs, axes, skip=1))
