"""Snapshots: the structure of a tree, kept, with a cheap test of whether it still stands.

Walking the modules of a model in Python costs a thousand times what a jitted call may cost. So a
walk is remembered together with the live containers (attribute dicts, lists, dicts) that it went
through and shallow copies of them: as long as `live == copies`, which Python compares by identity
first and in C, the structure is what it was.

Equality can lie: arrays compute their `==`, numbers of different types are equal, so are two lists
with equal items, and dicts in another order. Which list or dict an item is, and the order of a dict,
is noted beside the copies; containers with arrays or numbers are compared item by item (`_Strict`).
A Node's own attributes need that only where `Node.__setattr__` could not see a change.
"""

from __future__ import annotations

import itertools
from operator import getitem, is_
from typing import Any

import jax
import numpy as np

from refx.node import Node, attributes, epoch, set_snapshot
from refx.ref import Ref
from refx.structure import DagDef, Scan, is_array, scan
from refx.trace import EVAL, current_trace, local, read, trace_ref

__all__: list[str] = []

_uids = itertools.count()


class Snapshot:
    """The structure of one tree and its live Refs.

    Invariants: `refs` and the plain arrays that `leaves()` gives are in the order of `dagdef`;
    `valid()` is true only if a new scan would find the same DagDef with the same Refs. `uid` is
    never used again, so it may stand for the snapshot where holding it would be a leak.
    """

    __slots__ = (
        "_copies",
        "_epoch",
        "_held",
        "_holders",
        "_keys",
        "_leaves",
        "_live",
        "_ordered",
        "_places",
        "_strict",
        "dagdef",
        "frame",
        "identities",
        "refs",
        "trace",
        "uid",
    )

    def __init__(self, tree: Any):
        found = scan(tree)
        self.uid = next(_uids)
        self.dagdef: DagDef = found.dagdef
        self.refs = found.refs
        # By id, all that another tree could share with this one.
        self.identities = frozenset(map(id, found.objects))
        self._places = found.places
        # An array in a tuple cannot be replaced without the tuple, so those are kept as they are.
        self._leaves = [
            x if p[0] is None else None for x, p in zip(found.leaves, found.places, strict=True)
        ]
        self._live: list[Any] = []
        self._copies: list[Any] = []
        self._strict: list[_Strict | _Opaque] = [_Opaque(*o) for o in found.opaque]
        # Where a list or a dict is an item of another container: equal ones are not the same.
        self._holders: list[Any] = []
        self._keys: list[Any] = []
        self._held: list[Any] = []
        self._ordered: list[tuple[dict[Any, Any], list[Any]]] = []
        self._epoch = epoch[0]
        # Where all Refs were made; False is no frame, so Refs of several levels compare with none.
        self.frame: Any = _common(found.refs, "_frame", False)
        self.trace: Any = _common(found.refs, "_trace", None)
        self._watch(found)

    def _watch(self, found: Scan) -> None:
        for container in found.containers:
            is_node = isinstance(container, Node)
            content = attributes(container) if is_node else container
            values = content.values() if isinstance(content, dict) else content
            trusted = _TRUSTED if is_node and not container._exposed else _TRUSTED_OUTSIDE
            names = all(type(k) is str for k in content) if isinstance(content, dict) else True
            if not names or not all(_compares(v, trusted) for v in values):
                self._strict.append(_Strict(content))
                continue
            self._live.append(content)
            self._copies.append(content.copy())
            if container is content and isinstance(content, dict):
                # The order of a dict is seen by whoever walks it, but not by ==.
                self._ordered.append((content, list(content)))
            for key, value in _items(content):
                if type(value) is list or type(value) is dict:
                    self._holders.append(content)
                    self._keys.append(key)
                    self._held.append(value)

    def valid(self) -> bool:
        """Whether the structure still stands."""
        if self._epoch != epoch[0]:
            return False
        try:
            return (
                self._live == self._copies
                and all(map(is_, map(getitem, self._holders, self._keys), self._held))
                and (not self._ordered or all(list(d) == keys for d, keys in self._ordered))
                and (not self._strict or all(s.same() for s in self._strict))
            )
        except Exception:
            # An == of the user's own may raise; then the walk decides.
            return False

    def values(self, tree: Any = None) -> list[Any]:
        """The values of the Refs, as seen from here; `tree` is what they are read of."""
        frame = local.frame
        if self.frame is frame and current_trace(()) is (EVAL if frame is None else frame.trace()):
            return [r._value for r in self.refs]
        owner = tree if isinstance(tree, Node) else None
        return [read(r, owner) for r in self.refs]

    def writable(self) -> bool:
        """Whether all Refs may be written here, without asking each of them."""
        return (
            self.frame is local.frame
            and local.allowed is None
            and (self.frame is None or not self.frame.baked)
            and self.trace is not None
            and self.trace() is current_trace(())
        )

    def leaves(self) -> list[Any]:
        """The plain arrays, as they are now: they may be replaced without a change of structure."""
        if not self._leaves:
            return []
        return [
            leaf if content is None else content[key]
            for leaf, (content, key) in zip(self._leaves, self._places, strict=True)
        ]

    def places(self) -> list[Any]:
        """What tells the plain arrays apart: where they are, or which they are."""
        return [
            id(leaf) if content is None else (id(content), key)
            for leaf, (content, key) in zip(self._leaves, self._places, strict=True)
        ]


_ARRAY = object()


def _common(refs: list[Ref[Any]], name: str, otherwise: Any) -> Any:
    found = {id(getattr(r, name)): getattr(r, name) for r in refs}
    if not found:
        return local.frame if name == "_frame" else trace_ref()
    return next(iter(found.values())) if len(found) == 1 else otherwise


class _Strict:
    """A container that is compared item by item, by identity; for arrays, only that they are some."""

    __slots__ = ("content", "items")

    def __init__(self, content: Any):
        self.content = content
        self.items = [(k, _ARRAY if is_array(v) else v) for k, v in _items(content)]

    def same(self) -> bool:
        now = _items(self.content)
        return len(now) == len(self.items) and all(
            k == k0 and type(k) is type(k0) and (v is v0 or (v0 is _ARRAY and is_array(v)))
            for (k, v), (k0, v0) in zip(now, self.items, strict=True)
        )


class _Opaque:
    """An instance of a registered pytree class, which may change in ways that only it knows."""

    __slots__ = ("children", "obj", "treedef")

    def __init__(self, obj: Any, treedef: Any, children: list[Any]):
        self.obj = obj
        self.treedef = treedef
        self.children = children

    def same(self) -> bool:
        now, treedef = jax.tree.flatten(self.obj, is_leaf=lambda x: x is not self.obj)
        return (
            treedef == self.treedef
            and len(now) == len(self.children)
            and all(map(is_, now, self.children))
        )


def _items(content: Any) -> list[tuple[Any, Any]]:
    return (
        list(content.items())
        if isinstance(content, dict)
        else list(zip(range(len(content)), content))
    )


# Values of these types are compared by identity, or are the same when they are equal.
_TRUSTED_INSIDE = frozenset({Ref, str, bytes, type(None), type(jax.numpy.float32)})
# Of lists and dicts the snapshot notes which they are; inside of a tuple it could not.
_TRUSTED_OUTSIDE = _TRUSTED_INSIDE | {list, dict}
# In a Node, `__setattr__` notices a number that is replaced by an equal one of another type.
_TRUSTED = _TRUSTED_OUTSIDE | {bool, int, float, complex}


def _compares(value: Any, trusted: frozenset[type]) -> bool:
    kind = type(value)
    if kind in trusted or kind.__eq__ is object.__eq__ or isinstance(value, np.dtype):
        return True
    return kind is tuple and all(_compares(v, _TRUSTED_INSIDE) for v in value)


def snapshot(tree: Any) -> Snapshot:
    """The snapshot of a tree: the one that is kept on a Node while it stands, or a new one."""
    if isinstance(tree, Node):
        kept = tree._snapshot
        if kept is not None and kept.valid():
            return kept
        new = Snapshot(tree)
        set_snapshot(tree, new)
        return new
    return Snapshot(tree)
