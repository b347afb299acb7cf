"""Change the `sharding` in the metadata of a structure when axes are added or removed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from refx import DagDef
from refx.dagdef import RefDef, intern
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
    return intern(dagdef.root, tuple(nodes))
