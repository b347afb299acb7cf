"""Nodes as plain JAX pytrees. The leaves of a Node are its values, with each shared Ref once.

This is value semantics: JAX builds another Node with other Refs, and cannot write into the caller's. So
a Node that is rebuilt around tracers may be read but not written.
"""

from __future__ import annotations

from typing import Any

import jax

from refx.access import label
from refx.buffers import CONCRETE
from refx.build import build
from refx.dagdef import DagDef
from refx.describe import copies
from refx.node import Node, is_array, on_subclass
from refx.partition import dotted
from refx.ref import Ref, is_value_copy
from refx.snapshot import snapshot
from refx.trace import EVAL, READ_ONLY, current_trace

__all__: list[str] = []


class _PathKey(jax.tree_util.GetAttrKey):
    # JAX's message for two different trees reads this from every key of a custom node.
    @property
    def key(self) -> str:
        return self.name


def _flatten(node: Node) -> tuple[list[Any], DagDef]:
    snap = snapshot(node)
    return snap.values() + snap.leaves(), snap.dagdef


def _flatten_with_keys(node: Node) -> tuple[list[tuple[Any, Any]], DagDef]:
    values, dagdef = _flatten(node)
    keys = [_PathKey(dotted(path)) for path in dagdef.paths]
    return list(zip(keys, values, strict=True)), dagdef


def unflatten(dagdef: DagDef, children: Any) -> Any:
    """Build a Node around the objects that JAX puts in place of its values."""
    children = list(children)
    # Almost always, all of them are arrays, and no program is being traced.
    arrays = CONCRETE.issuperset(map(type, children)) and current_trace(()) is EVAL
    copied = not arrays and is_value_copy(jax.tree.leaves(children))
    trace = READ_ONLY if copied else None
    count = len(dagdef.ref_paths)
    root, objects = build(dagdef, children, children[count:], trace=trace)
    if copied:
        copies[root] = dagdef, [x for x in objects if type(x) is Ref]
    elif not arrays and not all(map(is_array, children[:count])):
        label(x for x in objects if type(x) is Ref)
    return root


def register(cls: type[Node]) -> None:
    """Register a subclass of Node with JAX."""
    jax.tree_util.register_pytree_with_keys(cls, _flatten_with_keys, unflatten, _flatten)


on_subclass.append(register)
