"""Snapshots: the remembered structure of a tree, with a cheap test of whether it is still valid.

Walking the modules of a model in Python costs a thousand times as much as a jitted call may cost, so we
remember the result. A Node runs Python when an attribute is set, so it can tell its snapshots. Objects
that cannot tell are compared, item by item and by identity: lists, dicts, settings objects, and Nodes
whose `__dict__` was handed out.
"""

from __future__ import annotations

import itertools
import weakref
from itertools import chain, islice
from operator import is_
from typing import Any

import jax

from refx.access import read
from refx.dagdef import DagDef
from refx.frame import local, trace_of
from refx.node import Node, book, class_changes, is_array, is_exposed
from refx.ref import Ref
from refx.static import Changing
from refx.trace import LABEL, current_trace, trace_ref
from refx.walk import Walk, contents, walk

__all__: list[str] = []

_uids = itertools.count()


class Snapshot:
    """The structure of one tree and its live Refs.

    Invariants: `refs` and the plain arrays from `leaves()` are in the order of `dagdef`. `valid()` is
    true only if a new walk would find the same DagDef with the same Refs. `uid` is never reused, so
    caches may key on it where keeping the snapshot would be a leak.
    """

    __slots__ = (
        "__weakref__",
        "_class_changes",
        "_compared",
        "_leaves",
        "_places",
        "containers",
        "dagdef",
        "frame",
        "has_labels",
        "identities",
        "refs",
        "stands",
        "trace",
        "uid",
    )

    def __init__(self, tree: Any, *, keep: bool = False):
        """Walk a tree. With `keep`, its Nodes report changes, and `valid` may be called."""
        # Set these before the walk, so that a change during the walk makes the snapshot invalid.
        self.stands = keep
        self._class_changes = class_changes[0]
        found = walk(tree)
        self.dagdef: DagDef = found.dagdef
        # A Ref does not keep a snapshot. A new Ref at its address is not in any tree that a kept one knows.
        self.uid: Any = (id(tree), found.dagdef) if type(tree) is Ref else next(_uids)
        self.refs = found.refs
        # The ids of all objects that another tree could share with this one.
        self.identities = frozenset(map(id, found.objects))
        self._places = found.places
        # For an array in a tuple, keep the array itself: it cannot change unless the tuple is replaced.
        self._leaves = [
            x if p[0] is None else None for x, p in zip(found.leaves, found.places, strict=True)
        ]
        # The frame in which all Refs were made, or False for Refs of several levels.
        self.frame: Any = _common(found.refs, "_frame", False)
        self.trace: Any = _common(found.refs, "_trace", None)
        self.has_labels = any([r._trace is LABEL for r in found.refs])
        # The lists and dicts of the tree, and the dicts of attributes of its Nodes.
        self.containers = list(map(contents, found.containers)) if keep else []
        self._compared: tuple[Any, ...] = ()
        if keep:
            me = weakref.ref(self)
            for container in found.containers:
                if isinstance(container, Node):
                    book(container).watch(me)
            self._compared = _comparisons(found)

    def valid(self) -> bool:
        """Whether the structure is still the same."""
        if not self.stands or self._class_changes != class_changes[0]:
            return False
        if not self._compared:
            return True
        try:
            return all([c.same() for c in self._compared])
        except Exception:
            # Another thread is changing a dict, or a user's pytree class raises. Leave it to a new walk.
            return False

    def values(self, tree: Any = None) -> list[Any]:
        """The values of the Refs, as seen from here. `tree` is the object that holds them."""
        frame = local.frame
        if self.frame is frame and current_trace(()) is trace_of(frame):
            return [r._value for r in self.refs]
        owner = tree if isinstance(tree, Node) else None
        return [read(r, owner) for r in self.refs]

    def writable(self) -> bool:
        """Whether it is certain, without checking each Ref, that all of them may be written here."""
        return (
            self.frame is local.frame
            and local.limit is None
            and (self.frame is None or not self.frame.captured_as_constant)
            and self.trace is not None
            and self.trace() is current_trace(())
        )

    def leaves(self) -> list[Any]:
        """The current plain arrays. Replacing one does not change the structure."""
        if not self._leaves:
            return []
        return [
            leaf if content is None else content[key]
            for leaf, (content, key) in zip(self._leaves, self._places, strict=True)
        ]

    def holders(self) -> list[tuple[Any, Any]]:
        """The list or dict that holds each plain array, and its key there; None for one in a tuple."""
        return list(self._places)


def _common(refs: list[Ref[Any]], name: str, otherwise: Any) -> Any:
    found = {id(getattr(r, name)): getattr(r, name) for r in refs}
    if not found:
        return local.frame if name == "_frame" else trace_ref()
    return next(iter(found.values())) if len(found) == 1 else otherwise


def _comparisons(found: Walk) -> tuple[Any, ...]:
    """The comparisons that tell whether a tree is unchanged."""
    plain: list[Any] = [c for c in found.contents if type(c) is not Changing]
    parts: list[Any] = [c for c in found.contents if type(c) is Changing]
    parts += [_PytreeObject(*o) for o in found.opaque]
    for container in found.containers:
        if isinstance(container, Node) and not is_exposed(container):
            continue
        container = contents(container)
        values = container.values() if isinstance(container, dict) else container
        if any(map(is_array, values)):
            parts.append(_WithArrays(container))
        else:
            plain.append(container)
    if plain:
        parts.append(Contents(plain))
    return tuple(parts)


class Contents:
    """The contents of some lists and dicts, to compare item by item and by identity, in C."""

    __slots__ = ("_containers", "_items", "_sizes", "_views")

    def __init__(self, containers: list[Any]):
        self._containers = containers
        # The views of a dict follow its changes.
        self._views: list[Any] = []
        for c in containers:
            self._views += [c.keys(), c.values()] if isinstance(c, dict) else [c]
        self._sizes = list(map(len, self._views))
        self._items = list(chain.from_iterable(self._views))

    def same(self) -> bool:
        """Whether every list and dict still has the same items."""
        return list(map(len, self._views)) == self._sizes and all(
            map(is_, chain.from_iterable(self._views), self._items)
        )

    def changed(self) -> dict[int, Any]:
        """The original content of each list and dict that has changed, by position."""
        items = iter(self._items)
        sizes = iter(self._sizes)
        found: dict[int, Any] = {}
        for i, x in enumerate(self._containers):
            if isinstance(x, dict):
                keys = list(islice(items, next(sizes)))
                was = dict(zip(keys, islice(items, next(sizes)), strict=True))
                same = len(x) == len(was) and all(map(is_, x, keys))
                same = same and all(map(is_, x.values(), was.values()))
            else:
                was = list(islice(items, next(sizes)))
                same = len(x) == len(was) and all(map(is_, x, was))
            if not same:
                found[i] = was
        return found


_ARRAY = object()


class _WithArrays:
    """A list or a dict with arrays. Replacing an array by another does not change the structure."""

    __slots__ = ("_content", "_items")

    def __init__(self, content: Any):
        self._content = content
        self._items = [(k, _ARRAY if is_array(v) else v) for k, v in _items(content)]

    def same(self) -> bool:
        now = _items(self._content)
        return len(now) == len(self._items) and all(
            (k is k0 or (k == k0 and type(k) is type(k0)))
            and (v is v0 or (v0 is _ARRAY and is_array(v)))
            for (k, v), (k0, v0) in zip(now, self._items, strict=True)
        )


class _PytreeObject:
    """An instance of a registered pytree class. It may change in ways that only its class knows."""

    __slots__ = ("_children", "_obj", "_treedef")

    def __init__(self, obj: Any, treedef: Any, children: list[Any]):
        self._obj = obj
        self._treedef = treedef
        self._children = children

    def same(self) -> bool:
        now, treedef = jax.tree.flatten(self._obj, is_leaf=lambda x: x is not self._obj)
        return (
            treedef == self._treedef
            and len(now) == len(self._children)
            and all(map(is_, now, self._children))
        )


def _items(content: Any) -> list[tuple[Any, Any]]:
    return list(content.items() if isinstance(content, dict) else enumerate(content))


def snapshot(tree: Any) -> Snapshot:
    """The snapshot of a tree. A Node keeps its snapshot while that is valid; otherwise, make a new one."""
    if not isinstance(tree, Node):
        return Snapshot(tree)
    own = tree._book
    if own is not None and own.snapshot is not None and own.snapshot.valid():
        return own.snapshot
    new = Snapshot(tree, keep=True)
    book(tree).snapshot = new
    return new
