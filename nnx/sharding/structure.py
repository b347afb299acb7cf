"""Change the `sharding` in the metadata of a structure when axes are added or removed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from nnx.sharding.rules import check_rank, inserted, removed
from refx import DagDef
from refx.dagdef import RefDef, intern, ref_numbers
from refx.partition import dotted
from refx.static import Static

__all__: list[str] = []


def with_shardings(dagdef: DagDef, change: Callable[[int, Any], Any]) -> DagDef:
    """The structure with a changed `sharding` for the Refs that have one.

    Args:
      dagdef: the structure.
      change: takes the number of a Ref's node and its sharding, and returns the new sharding.
    """
    nodes = list(dagdef.nodes)
    for n, node in enumerate(nodes):
        if type(node) is not RefDef or not node.metadata:
            continue
        facts = dict(node.metadata)
        said = facts.get("sharding")
        if said is not None and said.value is not None:
            facts["sharding"] = Static(change(n, said.value))
            nodes[n] = node._replace(metadata=tuple(facts.items()))
    if all(new is old for new, old in zip(nodes, dagdef.nodes, strict=True)):
        return dagdef
    return intern(dagdef.root, tuple(nodes))


def without_axes(
    name: str, dagdef: DagDef, values: Sequence[Any], axes: Sequence[int | None], skip: int = 0
) -> DagDef:
    """The structure of slices, without the `sharding` entries of the removed axes.

    Args:
      name: the transformation that takes slices, for messages.
      dagdef: the structure to slice.
      values: for each Ref the whole value, or its shape.
      axes: for each Ref the axis that it loses, or None.
      skip: how many parts of a path messages leave out.

    Raises:
      ShardingError: a `sharding` has the wrong number of dimensions for its value.
    """
    numbers = ref_numbers(dagdef)
    at = {n: i for i, n in enumerate(numbers)}

    def change(n: int, said: Any) -> Any:
        i = at[n]
        axis = axes[i]
        if axis is None:
            return said
        check_rank(said, values[i], named(name, dagdef.ref_paths[i][skip:]))
        return removed(said, from_zero(axis, values[i]))

    return with_shardings(dagdef, change)


def stacked(name: str, dagdef: DagDef, values: Sequence[Any], entry: Any = None) -> DagDef:
    """The structure of stacked values, which have one more leading axis than in the given structure.

    Args:
      name: the transformation that stacks, for messages.
      dagdef: the structure of a single one of the stacked trees.
      values: for each Ref the value in that tree.
      entry: the entry of the new axis in the `sharding`.

    Raises:
      ShardingError: a `sharding` has the wrong number of dimensions for its value.
    """
    numbers = ref_numbers(dagdef)
    at = {n: i for i, n in enumerate(numbers)}

    def change(n: int, said: Any) -> Any:
        check_rank(said, values[at[n]], named(name, dagdef.ref_paths[at[n]]))
        return inserted(said, 0, entry)

    return with_shardings(dagdef, change)


def from_zero(axis: int, value: Any) -> int:
    """An axis of the arrays in a value, counted from 0."""
    leaves = jax.tree.leaves(value)
    return axis if axis >= 0 or not leaves else axis + leaves[0].ndim


def check_entry(name: str, entry: Any) -> Any:
    """The entry of an added axis in a `sharding`, if it can be one.

    Raises:
      TypeError: it is something else.
    """
    parts = entry if isinstance(entry, tuple) else (entry,)
    if entry is not None and not all(isinstance(part, str) for part in parts):
        raise TypeError(
            f"{name} got the partition name {entry!r}. It must be the name of an axis, a tuple of names, "
            f"or None for an axis that is not sharded."
        )
    return entry


def named(name: str, path: Sequence[str]) -> str:
    """The name of a Ref in messages, from its path in the argument of `name`."""
    return f"{name}: Ref {dotted(path)!r}" if path else f"{name}: a Ref"
