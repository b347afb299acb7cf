"""`DagDef`: the structure of a tree without its values.

A tree of Refs is a graph: many paths may lead to one object with an identity (a Ref, a Node, a list, a
dict), even from itself. The DagDef numbers these objects in the order of the first visit, and describes
the content of each in terms of the numbers:

* an `int` is the object with that number, so sharing and cycles need no extra notation;
* `Leaf(i)` is the i-th plain array, and `Static(v)` a value that is part of the structure;
* `Tree(treedef, children)` is a pytree without identity: a tuple, or any registered pytree.

`walk` finds the structure of a tree, and `build` makes a tree from a structure.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import jax

from refx.errors import StructureError
from refx.node import Node
from refx.partition import Path, dotted, named
from refx.static import Static

__all__ = ["DagDef"]


T = TypeVar("T", covariant=True)


class Leaf(NamedTuple):
    """The place of a plain array, by its number among the plain arrays of the tree."""

    number: int


class PathName(tuple[str, ...]):
    """The name of a value in a Partition, which is itself a path."""

    __slots__ = ()


def parts_of(name: Any) -> Path:
    """The parts of a path for a name."""
    return tuple(map(str, name)) if type(name) is PathName else (str(name),)


class Tree(NamedTuple):
    """One level of a pytree without identity, and its children."""

    treedef: Any
    names: tuple[Any, ...]
    children: tuple[Any, ...]


class RefDef(NamedTuple):
    """A Ref without its value."""

    collection: Static
    metadata: tuple[tuple[str, Static], ...]
    frozen: bool = False


class NodeDef(NamedTuple):
    """A Node, a list, a dict or another object of class `kind`, with the names of its children.

    `types` are the types of the dict keys if some are not strings, because 1 and True are equal keys.
    `revision` counts the changes of the class of a Node: after a method is replaced, we need a new
    program.
    """

    kind: type
    names: tuple[Any, ...]
    children: tuple[Any, ...]
    types: tuple[type, ...] = ()
    revision: int = 0
    frozen: bool = False


class DagDef(Generic[T]):
    """The hashable structure of a tree without its values.

    DagDefs are interned: equal structures are one object. So comparing and hashing them is cheap, and
    compiled programs are looked up by the identity of the structure.

    >>> import refx
    >>> a, _ = refx.split({"w": refx.Ref(1.0, "params")})
    >>> b, _ = refx.split({"w": refx.Ref(2.0, "params")})
    >>> a is b
    True
    """

    __slots__ = (
        "__weakref__",
        "_paths",
        "alone",
        "nodes",
        "recipe",
        "root",
    )

    def __init__(self, root: Any, nodes: tuple[Any, ...]):
        self.root = root
        self.nodes = nodes
        # The paths of the Refs and of the plain arrays, computed on demand.
        self._paths: tuple[tuple[Path, ...], tuple[Path, ...]] | None = None
        # A cache for `build`, and the structure of `(tree,)`.
        self.recipe: Any = None
        self.alone: DagDef | None = None

    @property
    def ref_paths(self) -> tuple[Path, ...]:
        """The canonical path of each Ref, in order."""
        return self._found_paths()[0]

    @property
    def leaf_paths(self) -> tuple[Path, ...]:
        """The path of each plain array, in order."""
        return self._found_paths()[1]

    @property
    def paths(self) -> tuple[Path, ...]:
        """The paths of all values: those of the Refs, and then those of the plain arrays."""
        refs, leaves = self._found_paths()
        return refs + leaves

    def _found_paths(self) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
        if self._paths is not None:
            return self._paths
        found = list(parts(self))
        refs = [p for x, p in found if type(x) is int and type(self.nodes[x]) is RefDef]
        leaves = [p for _, p in sorted((x.number, p) for x, p in found if type(x) is Leaf)]
        twice = [p for p, count in Counter(refs + leaves).items() if count > 1]
        if twice:
            raise StructureError(
                f"Two values have the same path {dotted(twice[0])!r}, because two different keys of a "
                f"dict read the same, such as 1 and '1'. Rename one of the keys."
            )
        self._paths = tuple(refs), tuple(leaves)
        return self._paths

    def __repr__(self) -> str:
        # Avoid the paths: they may be ambiguous and raise, and messages use this repr.
        kinds = [n.kind.__name__ for n in self.nodes if type(n) is NodeDef]
        refs = len(self.nodes) - len(kinds)
        leaves = sum(type(part) is Leaf for part, _ in parts(self))
        root = self.nodes[self.root] if type(self.root) is int else None
        what = "tree" if root is None else "Ref" if type(root) is RefDef else kinds[0]
        return f"DagDef({what}: {refs} Refs, {leaves} arrays, {len(kinds)} nodes)"

    def __reduce__(self) -> tuple[Any, ...]:
        # Revisions of classes only have a meaning in this process.
        nodes = [n._replace(revision=0) if type(n) is NodeDef else n for n in self.nodes]
        return _restore, (self.root, tuple(nodes))

    def __copy__(self) -> DagDef:
        return self

    def __deepcopy__(self, memo: Any) -> DagDef:
        return self


_interned: weakref.WeakValueDictionary[Any, DagDef] = weakref.WeakValueDictionary()
_intern_lock = threading.Lock()


def _statics(root: Any, nodes: tuple[Any, ...]) -> Iterator[Static]:
    todo = [root]
    for node in nodes:
        if type(node) is NodeDef:
            todo += node.children
    while todo:
        child = todo.pop()
        if type(child) is Static:
            yield child
        elif type(child) is Tree:
            todo += child.children


def intern(root: Any, nodes: tuple[Any, ...]) -> DagDef:
    """The one DagDef with this content."""
    with _intern_lock:
        dagdef = _interned.get((root, nodes))
        if dagdef is None:
            dagdef = _interned[root, nodes] = DagDef(root, nodes)
            for static in _statics(root, nodes):
                static.keep()
        return dagdef


def alone_in_tuple(dagdef: DagDef) -> DagDef:
    """The structure of `(tree,)`, given that of the tree."""
    if dagdef.alone is None:
        dagdef.alone = intern(Tree(_ALONE, ("0",), (dagdef.root,)), dagdef.nodes)
    return dagdef.alone


_ALONE = jax.tree.structure((0,))


def frozen_def(dagdef: DagDef, frozen: bool) -> DagDef:
    """The same structure, with all of it read-only or all of it writable."""
    if not frozen and not any([getattr(n, "frozen", False) for n in dagdef.nodes]):
        return dagdef
    nodes = [
        n._replace(frozen=frozen and (type(n) is RefDef or issubclass(n.kind, Node)))
        for n in dagdef.nodes
    ]
    return intern(dagdef.root, tuple(nodes))


def _restore(root: Any, nodes: tuple[Any, ...]) -> DagDef:
    now = [n._replace(revision=revision_of(n.kind)) if type(n) is NodeDef else n for n in nodes]
    return intern(root, tuple(now))


def revision_of(kind: type) -> int:
    """How often the class of a Node has changed. For other classes it is 0."""
    return getattr(kind, "_revision", 0)


# For JAX, a DagDef is a pytree without leaves, so it can cross plain transformations beside Partitions.
jax.tree_util.register_pytree_node(DagDef, lambda dagdef: ((), dagdef), lambda dagdef, _: dagdef)


def parts(dagdef: DagDef) -> Iterator[tuple[Any, Path]]:
    """Everything in a structure, with its path. An object appears once, as its number at its first path."""
    seen: set[int] = set()
    todo: list[tuple[Any, Path]] = [(dagdef.root, ())]
    while todo:
        child, path = todo.pop()
        held = child
        if type(child) is int:
            if child in seen:
                continue
            seen.add(child)
            held = dagdef.nodes[child]
        yield child, path
        if isinstance(held, (NodeDef, Tree)):
            todo += _below(held, path)


def numbers_in(whole: DagDef, parts: Iterable[DagDef]) -> list[tuple[list[int], list[int]]]:
    """The numbers that the Refs and the plain arrays of each of some trees have in a tuple of them all."""
    numbers = {n: i for i, n in enumerate(ref_numbers(whole))}
    found = []
    for part, at in zip(parts, whole.root.children, strict=True):
        objects: dict[int, int] = {}
        leaves: dict[int, int] = {}
        todo: list[tuple[Any, Any]] = [(part.root, at)]
        while todo:
            mine, theirs = todo.pop()
            if type(mine) is int:
                if mine in objects:
                    continue
                objects[mine] = theirs
                mine, theirs = part.nodes[mine], whole.nodes[theirs]
            if type(mine) is Leaf:
                leaves[mine.number] = theirs.number
            elif isinstance(mine, (NodeDef, Tree)):
                todo += zip(mine.children, theirs.children, strict=True)
        refs = [numbers[objects[n]] for n in ref_numbers(part)]
        found.append((refs, [leaves[i] for i in range(len(leaves))]))
    return found


def ref_numbers(dagdef: DagDef) -> list[int]:
    """The numbers of the Refs among the objects of a structure, in order."""
    return [n for n, node in enumerate(dagdef.nodes) if type(node) is RefDef]


def node_paths(dagdef: DagDef) -> dict[int, Path]:
    """The canonical path of each object of a structure, by its number."""
    return {part: path for part, path in parts(dagdef) if type(part) is int}


def _below(at: NodeDef | Tree, path: Path) -> list[tuple[Any, Path]]:
    """The children of an object or a pytree with their paths, in reverse order."""
    kind = at.kind if isinstance(at, NodeDef) else at.treedef.node_data()[0]
    return [
        (c, (*path, *(parts_of(name) if type(name) is PathName else named(kind, name))))
        for name, c in zip(reversed(at.names), reversed(at.children), strict=True)
    ]
