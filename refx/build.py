"""Building a tree from its structure and its values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from refx.dagdef import DagDef, Leaf, NodeDef, RefDef, Tree
from refx.frame import local
from refx.node import Node, book, is_array, tell
from refx.node import make as make_node
from refx.ref import make as make_ref
from refx.static import Static
from refx.trace import FROZEN, trace_ref
from refx.walk import contents

__all__: list[str] = []


def build(
    dagdef: DagDef,
    values: Iterable[Any],
    leaves: Any,
    *,
    trace: Any = None,
    existing: Mapping[int, Any] | None = None,
    refill: bool = True,
) -> tuple[Any, list[Any]]:
    """Make the tree of a DagDef: its root, and its objects in the order of the DagDef.

    Args:
      dagdef: the structure.
      values: a value for each Ref that is made, in order.
      leaves: a value for each plain array, in order.
      trace: the trace reference of what is made; the current one without it.
      existing: objects, by number, that are used instead of new ones.
      refill: whether the existing ones get the content of the DagDef, or stay as they are.
    """
    frame = local.frame
    if trace is None:
        trace = trace_ref()
    todo = iter(values)
    objects: list[Any] = []
    for i, node in enumerate(dagdef.nodes):
        if existing is not None and i in existing:
            objects.append(existing[i])
        elif type(node) is RefDef:
            at = FROZEN if node.frozen else trace
            objects.append(
                make_ref(next(todo), node.collection.value, dagdef.metadata[i], frame, at)
            )
        elif node.kind is list:
            objects.append([])
        elif node.kind is dict:
            objects.append({})
        elif issubclass(node.kind, Node):
            objects.append(make_node(node.kind, frame, FROZEN if node.frozen else trace))
        else:
            objects.append(object.__new__(node.kind))

    def get(child: Any) -> Any:
        kind = type(child)
        if kind is int:
            return objects[child]
        if kind is Static:
            return child.value
        if kind is Leaf:
            return leaves[child.number]
        return jax.tree.unflatten(child.treedef, map(get, child.children))

    for i, (node, obj) in enumerate(zip(dagdef.nodes, objects, strict=True)):
        known = existing is not None and i in existing
        if type(node) is RefDef or (known and not refill):
            continue
        if node.kind is list:
            obj[:] = map(get, node.children)
            continue
        content = contents(obj)
        if known:
            content.clear()
        for name, child in zip(node.names, node.children, strict=True):
            content[name] = objects[child] if type(child) is int else get(child)
        if known and isinstance(obj, Node):
            tell(obj)
    if leaves and not all(map(is_array, leaves)):
        mark(dagdef, objects, leaves)
    return get(dagdef.root), objects


def mark(dagdef: DagDef, objects: list[Any], leaves: Any) -> None:
    """Note on the Nodes of a tree which of their attributes are leaves and do not look like ones.

    JAX may put any object in the place of a leaf (a bool of a mask, an axis, a sharding), and the
    tree has to flatten to the same structure again. A mark is True for a leaf, or for a list, a
    dict or a tuple a dict of the marks in it.
    """

    def marks(child: Any, seen: frozenset[int]) -> Any:
        if type(child) is Leaf:
            return not is_array(leaves[child.number]) or None
        if type(child) is int:
            node = dagdef.nodes[child]
            if child in seen or type(node) is RefDef or issubclass(node.kind, Node):
                return None
            return within(node, seen | {child})
        return within(child, seen) if type(child) is Tree else None

    def within(node: NodeDef | Tree, seen: frozenset[int]) -> Any:
        found = {
            name: inner
            for name, child in zip(node.names, node.children, strict=True)
            if (inner := marks(child, seen)) is not None
        }
        return found or None

    for node, obj in zip(dagdef.nodes, objects, strict=True):
        if isinstance(obj, Node) and (found := within(node, frozenset())) is not None:
            book(obj).marks = found
