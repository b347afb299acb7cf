"""Build a tree from its structure and its values."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import jax

from refx.dagdef import DagDef, Leaf, NodeDef, RefDef, Tree
from refx.frame import local, note_made
from refx.node import Node, attributes, blank, book, is_array, is_identity, tell
from refx.ref import Ref, metadata_of
from refx.static import Static
from refx.trace import FROZEN, trace_ref

__all__: list[str] = []


class _Recipe:
    """Instructions for making and filling the objects of a DagDef, worked out once for each DagDef.

    All contents are in one list, the pool, and are known by their position there: first the objects,
    then the plain arrays, the static values, and the pytrees without identity, in the order in which
    they are made. So filling an object takes one update of its dict.
    """

    __slots__ = (
        "arrays",
        "changing",
        "fills",
        "is_fixed",
        "makers",
        "root",
        "root_pytrees",
        "statics",
    )

    def __init__(self, dagdef: DagDef):
        nodes = dagdef.nodes
        held = [x for n in nodes if type(n) is NodeDef for c in n.children for x in _parts(c)]
        held += _parts(dagdef.root)
        found = [x for x in held if type(x) is Static]
        self.statics = [x.value for x in found]
        # The static values that may change in place, with their numbers.
        self.changing = [(i, x) for i, x in enumerate(found) if x.contents]
        trees = [x for n in nodes if type(n) is NodeDef for x in n.children] + [dagdef.root]
        self.is_fixed = not self.changing and all(map(_is_fixed, trees))
        self.arrays = 1 + max((x.number for x in held if type(x) is Leaf), default=-1)
        statics = itertools.count(len(nodes) + self.arrays)
        pytrees = itertools.count(len(nodes) + self.arrays + len(self.statics))

        def place(child: Any, made: list[Any]) -> int:
            kind = type(child)
            if kind is int:
                return child
            if kind is Leaf:
                return len(nodes) + child.number
            if kind is Static:
                return next(statics)
            made.append((child.treedef, tuple([place(c, made) for c in child.children])))
            return next(pytrees)

        self.makers: list[tuple[Any, ...]] = []
        self.fills: list[tuple[int, type, Any, tuple[int, ...], list[Any]]] = []
        for i, node in enumerate(nodes):
            if type(node) is RefDef:
                facts = metadata_of((name, fact.value) for name, fact in node.metadata)
                self.makers.append((Ref, node.frozen, node.collection.value, facts))
                continue
            kind = Node if issubclass(node.kind, Node) else node.kind
            self.makers.append((kind, node.frozen, node.kind, None))
            made: list[Any] = []
            children = tuple([place(c, made) for c in node.children])
            self.fills.append((i, kind, node.names, children, made))
        self.root_pytrees: list[Any] = []
        self.root = place(dagdef.root, self.root_pytrees)


def _parts(child: Any) -> Iterator[Any]:
    """A child; or, if it is a pytree without identity, the parts in it."""
    if type(child) is Tree:
        for part in child.children:
            yield from _parts(part)
    else:
        yield child


def _is_fixed(child: Any) -> bool:
    """Whether all pytrees without identity are tuples, which cannot change."""
    if type(child) is not Tree:
        return True
    return child.treedef.node_data()[0] is tuple and all(map(_is_fixed, child.children))


def changes_with_objects(dagdef: DagDef) -> bool:
    """Whether the structure can change only if the content of an object, a list or a dict changes."""
    return _recipe(dagdef).is_fixed


def _recipe(dagdef: DagDef) -> _Recipe:
    if dagdef.recipe is None:
        dagdef.recipe = _Recipe(dagdef)
    return dagdef.recipe


def build(
    dagdef: DagDef,
    values: Iterable[Any],
    leaves: Any,
    *,
    trace: Any = None,
    existing: Mapping[int, Any] | None = None,
    rewritten: Collection[int] | None = None,
) -> tuple[Any, list[Any]]:
    """Make the tree of a DagDef. Returns its root, and its objects in the order of the DagDef.

    Args:
      dagdef: the structure.
      values: a value for each new Ref, in order.
      leaves: a value for each plain array, in order.
      trace: the trace reference for new objects. The default is the current trace.
      existing: by number, objects to use instead of new ones.
      rewritten: the numbers of the existing objects that get the content from the DagDef. The default
        is all of them.
    """
    recipe = _recipe(dagdef)
    frame = local.frame
    if trace is None:
        trace = trace_ref()
    todo = iter(values)
    objects: list[Any] = []
    new = object.__new__
    for i, (kind, frozen, about, metadata) in enumerate(recipe.makers):
        if existing is not None and i in existing:
            obj = existing[i]
        elif kind is Ref:
            # The same as `make` in ref.py, inlined because there may be thousands.
            obj = new(Ref)
            obj._value = next(todo)
            obj._collection = about
            obj._metadata = metadata
            obj._frame = frame
            obj._trace = FROZEN if frozen else trace
        elif kind is Node:
            obj = blank(about, frame, FROZEN if frozen else trace)
        else:
            obj = kind() if kind is list or kind is dict else new(kind)
        objects.append(obj)
    if local.limit is not None:
        old = existing or {}
        note_made(*[x for i, x in enumerate(objects) if is_identity(x) and i not in old])
    statics = recipe.statics
    if recipe.changing:
        statics = list(statics)
        for i, static in recipe.changing:
            statics[i] = static.current()
    pool = [*objects, *leaves, *statics]
    get = pool.__getitem__
    for i, kind, names, children, pytrees in recipe.fills:
        for treedef, parts in pytrees:
            pool.append(jax.tree.unflatten(treedef, map(get, parts)))
        known = existing is not None and i in existing
        if known and rewritten is not None and i not in rewritten:
            continue
        obj = objects[i]
        if kind is list:
            obj[:] = map(get, children)
            continue
        content = attributes(obj) if kind is Node else obj if kind is dict else vars(obj)
        if known:
            content.clear()
        # Most objects have few children, so a loop is faster than `update`.
        for name, number in zip(names, children):
            content[name] = pool[number]
        if known and kind is Node:
            tell(obj)
    for treedef, parts in recipe.root_pytrees:
        pool.append(jax.tree.unflatten(treedef, map(get, parts)))
    if leaves and not all(map(is_array, leaves)):
        mark(dagdef, objects, leaves)
    return pool[recipe.root], objects


def objects_of(dagdef: DagDef, roots: tuple[Any, ...]) -> list[Any] | None:
    """The objects of some roots with this structure, by number; None if only a walk can find them."""
    recipe = _recipe(dagdef)
    if len(recipe.root_pytrees) != 1:
        return None
    count = len(dagdef.nodes)
    objects: list[Any] = [None] * count
    for number, x in zip(recipe.root_pytrees[0][1], roots, strict=True):
        if number < count:
            objects[number] = x
    # Numbers are in the order of the first visit, so an object comes after the one that holds it.
    for i, kind, names, children, pytrees in recipe.fills:
        if pytrees or kind not in _FOLLOWED:
            return None
        obj = objects[i]
        content = attributes(obj) if kind is Node else obj
        for name, number in zip(names, children):
            if number < count:
                objects[number] = content[name]
    return objects


_FOLLOWED = (Node, list, dict)


def mark(dagdef: DagDef, objects: list[Any], leaves: Any) -> None:
    """Note on the Nodes of a tree which attributes are leaves even though they do not look like leaves.

    JAX may put any object in place of a leaf (a bool of a mask, an axis, a sharding), and the tree must
    flatten to the same structure again. A mark is True for a leaf. For a list, a dict or a tuple it is
    a dict of the marks inside.
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
