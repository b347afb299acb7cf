"""The structure of a tree: `DagDef`, how it is found (`scan`) and how a tree is built from it.

A tree that holds Refs is a graph: an object with an identity (a Ref, a Node, a list, a dict) may be
reached along many paths, itself included. The DagDef numbers those objects in the order of first
visit and says for each what it holds, in terms of these numbers:

* an `int` is the object with that number, so sharing and cycles need nothing of their own;
* `Leaf(i)` is the i-th plain array; `Static(v)` is a value that is part of the structure;
* `Tree(treedef, children)` is what has no identity: a tuple, or any registered pytree.

Building is therefore two loops without recursion: make every object, then fill it.
"""

from __future__ import annotations

import functools
import threading
import types
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from refx.errors import StructureError, UnhashableStaticError
from refx.node import LEAVES, Node, attributes, book, is_identity, tell
from refx.node import make as make_node
from refx.partition import Name, Partition, Path, dotted, named
from refx.ref import Ref
from refx.ref import make as make_ref
from refx.static import Static
from refx.trace import FROZEN, local, trace_ref

__all__ = ["DagDef"]


class Leaf(NamedTuple):
    """The place of a plain array, by its number among the plain arrays of the tree."""

    number: int


class Tree(NamedTuple):
    """A pytree without identity: one level of it, and what it holds."""

    treedef: Any
    names: tuple[Any, ...]
    children: tuple[Any, ...]


class RefDef(NamedTuple):
    """A Ref: what is left of it without its value."""

    collection: Static
    metadata: tuple[tuple[str, Static], ...]
    frozen: bool = False


class NodeDef(NamedTuple):
    """A Node (`kind` is its class), a list, a dict or another object, with the names of what it holds.

    `types` are those of the keys of a dict that are no strings: 1 and True are equal keys. `revision`
    counts the changes of the class of a Node: a method that was replaced makes another program.
    """

    kind: type
    names: tuple[Any, ...]
    children: tuple[Any, ...]
    types: tuple[type, ...] = ()
    revision: int = 0
    frozen: bool = False


class DagDef:
    """The hashable structure that is left when the values are taken out of a tree.

    Equal structures are one object (DagDefs are interned), so comparing and hashing them is as
    cheap as it can be, and a compiled program is found by its structure's identity.

    >>> import refx
    >>> a, _ = refx.split({"w": refx.Ref(1.0, "params")})
    >>> b, _ = refx.split({"w": refx.Ref(2.0, "params")})
    >>> a is b
    True
    """

    __slots__ = ("__weakref__", "_leaf_paths", "_ref_paths", "metadata", "nodes", "root")

    def __init__(self, root: Any, nodes: tuple[Any, ...]):
        self.root = root
        self.nodes = nodes
        self.metadata = [
            MappingProxyType({k: v.value for k, v in n.metadata}) if type(n) is RefDef else _EMPTY
            for n in nodes
        ]
        self._ref_paths: tuple[Path, ...] | None = None
        self._leaf_paths: tuple[Path, ...] = ()

    @property
    def ref_paths(self) -> tuple[Path, ...]:
        """The canonical path of each Ref, in order."""
        if self._ref_paths is None:
            self._find_paths()
        assert self._ref_paths is not None
        return self._ref_paths

    @property
    def leaf_paths(self) -> tuple[Path, ...]:
        """The path of each plain array, in order."""
        if self._ref_paths is None:
            self._find_paths()
        return self._leaf_paths

    @property
    def paths(self) -> tuple[Path, ...]:
        """The path of every value: the Refs' and then the plain arrays'."""
        return self.ref_paths + self.leaf_paths

    def _find_paths(self) -> None:
        paths: list[Path | None] = [None] * len(self.nodes)
        leaves: dict[int, Path] = {}
        todo: list[tuple[Any, Path]] = [(self.root, ())]
        while todo:
            child, path = todo.pop()
            if type(child) is int:
                if paths[child] is not None:
                    continue
                paths[child] = path
                child = self.nodes[child]
            elif type(child) is Leaf:
                leaves.setdefault(child.number, path)
            if isinstance(child, (NodeDef, Tree)):
                todo += _below(child, path)
        kinds = zip(self.nodes, paths, strict=True)
        refs = tuple(p for n, p in kinds if type(n) is RefDef and p is not None)
        self._leaf_paths = tuple(leaves[i] for i in range(len(leaves)))
        twice = [p for p, count in Counter(refs + self._leaf_paths).items() if count > 1]
        if twice:
            raise StructureError(
                f"Two values have the same path {dotted(twice[0])!r}: keys of a dict that are "
                f"different but read the same, such as 1 and '1'. Rename one of the keys."
            )
        self._ref_paths = refs

    def __repr__(self) -> str:
        # Not by the paths, which may be ambiguous: a message that has this repr must come through.
        kinds = [n.kind.__name__ for n in self.nodes if type(n) is NodeDef]
        refs = sum(type(n) is RefDef for n in self.nodes)
        leaves = set()
        todo = [self.root, *(c for n in self.nodes if type(n) is NodeDef for c in n.children)]
        while todo:
            child = todo.pop()
            if type(child) is Leaf:
                leaves.add(child.number)
            elif type(child) is Tree:
                todo += child.children
        if type(self.root) is int and type(self.nodes[self.root]) is NodeDef:
            what = kinds[0]
        else:
            what = "Ref" if type(self.root) is int else "tree"
        return f"DagDef({what}: {refs} Refs, {len(leaves)} arrays, {len(kinds)} nodes)"

    def __reduce__(self) -> tuple[Any, ...]:
        # The revisions of classes count what happened in this process.
        nodes = [n._replace(revision=0) if type(n) is NodeDef else n for n in self.nodes]
        return _restore, (self.root, tuple(nodes))

    def __copy__(self) -> DagDef:
        return self

    def __deepcopy__(self, memo: Any) -> DagDef:
        return self


_EMPTY: Mapping[str, Any] = MappingProxyType({})

_interned: weakref.WeakValueDictionary[Any, DagDef] = weakref.WeakValueDictionary()
_intern_lock = threading.Lock()


def intern(root: Any, nodes: tuple[Any, ...]) -> DagDef:
    """The one DagDef with this content."""
    with _intern_lock:
        dagdef = _interned.get((root, nodes))
        if dagdef is None:
            dagdef = _interned[root, nodes] = DagDef(root, nodes)
        return dagdef


def frozen_def(dagdef: DagDef, frozen: bool) -> DagDef:
    """The same structure, of which nothing may be written, or everything."""
    nodes = [
        n._replace(frozen=frozen and (type(n) is RefDef or issubclass(n.kind, Node)))
        for n in dagdef.nodes
    ]
    return intern(dagdef.root, tuple(nodes))


def _restore(root: Any, nodes: tuple[Any, ...]) -> DagDef:
    now = [n._replace(revision=revision_of(n.kind)) if type(n) is NodeDef else n for n in nodes]
    return intern(root, tuple(now))


def revision_of(kind: type) -> int:
    """How often the class of a Node has changed; other classes are not asked."""
    return getattr(kind, "_revision", 0)


# To JAX a DagDef is a pytree without leaves, so it crosses plain transformations beside Partitions.
jax.tree_util.register_pytree_node(DagDef, lambda dagdef: ((), dagdef), lambda dagdef, _: dagdef)


class Scan(NamedTuple):
    """What `scan` finds: the structure, and the live objects in the order of the structure.

    `places` has, for each plain array, the dict or list that holds it and its key there, or a None
    where a tuple or another pytree holds it. `containers` are the Nodes, lists, dicts and objects
    that were walked, `opaque` the pytrees of other classes, `contents` the dicts and lists that
    static values were read from, and `functions` the modules and Refs that functions close over.
    """

    dagdef: DagDef
    refs: list[Ref[Any]]
    leaves: list[Any]
    places: list[tuple[Any, Any]]
    objects: list[Any]
    containers: list[Any]
    opaque: list[Any]
    contents: list[Any]
    functions: list[tuple[str, Any]]


def is_array(x: Any) -> bool:
    """Whether `x` is an array attribute, a value; ShapeDtypeStructs stand for one in `eval_shape`."""
    return isinstance(x, LEAVES)


_STATIC = frozenset({int, float, bool, str, complex, bytes, type(None), type(len), type})


def scan(tree: Any, alias: Mapping[int, Any] | None = None, *, skip: int = 0) -> Scan:
    """Walk a tree and find its structure.

    Args:
      tree: what to walk.
      alias: by id, objects that are met in place of others.
      skip: how many parts of a path a message leaves out: a tuple around the user's trees.

    Raises:
      UnhashableStaticError: a static value cannot be hashed; the message has its path.
      StructureError: a Ref or a module hides where the walk cannot enter (in a frozenset).
    """
    nodes: list[Any] = []
    numbers: dict[int, int] = {}
    found = Scan(None, [], [], [], [], [], [], [], [])  # pyright: ignore[reportArgumentType]
    result: list[Any] = [None]
    # Each entry is an object, its path as a linked list, the place where its code is to go, the
    # container that holds it directly, and its mark.
    todo: list[tuple[Any, Any, list[Any], int, Any, Any]] = [(tree, None, result, 0, None, None)]
    while todo:
        obj, link, place, position, holder, mark = todo.pop()
        if alias is not None:
            obj = alias.get(id(obj), obj)
        kind = type(obj)
        if mark is True:
            place[position] = Leaf(len(found.leaves))
            found.leaves.append(obj)
            found.places.append((holder, link[1] if link is not None else None))
        elif kind in _STATIC:
            place[position] = Static(obj)
        elif kind is Ref or kind is list or kind is dict or isinstance(obj, Node) or _hides(obj):
            number = numbers.get(id(obj))
            if number is not None:
                place[position] = number
                continue
            place[position] = numbers[id(obj)] = len(nodes)
            found.objects.append(obj)
            if kind is Ref:
                found.refs.append(obj)  # pyright: ignore[reportArgumentType]
                definition = ref_def(obj._collection, obj._metadata.items())
                frozen = obj._trace is FROZEN
                nodes.append(definition._replace(frozen=True) if frozen else definition)
                continue
            is_node = isinstance(obj, Node)
            content = contents(obj)
            found.containers.append(obj)
            names = tuple(range(len(content))) if kind is list else tuple(content)
            values = list(content) if kind is list else list(content.values())
            fields = obj._fields if is_node else {}
            if is_node:
                mark = obj._book.marks if obj._book is not None else None
            children: list[Any] = [None] * len(names)
            frozen = is_node and obj._trace is FROZEN
            nodes.append((kind, names, children, obj._revision if is_node else 0, frozen))
            for i in range(len(names) - 1, -1, -1):
                field = fields.get(names[i])  # pyright: ignore
                if field is not None and not field.is_ref:
                    children[i] = _static(values[i], (link, names[i]), skip, found)
                else:
                    inner = mark.get(names[i]) if type(mark) is dict else None
                    todo.append((values[i], (link, names[i]), children, i, content, inner))
        elif is_array(obj):
            place[position] = Leaf(len(found.leaves))
            found.leaves.append(obj)
            found.places.append((holder, link[1] if link is not None else None))
        else:
            keyed, treedef = _one_level(obj)
            if len(keyed) == 1 and keyed[0][1] is obj:
                place[position] = _static(obj, link, skip, found)
                continue
            names = _names(obj, keyed)
            children = [None] * len(keyed)
            place[position] = (treedef, names, children)
            if not isinstance(obj, tuple):
                found.opaque.append((obj, treedef, [x for _, x in keyed]))
            for i in range(len(keyed) - 1, -1, -1):
                inner = mark.get(names[i]) if type(mark) is dict else None
                todo.append((keyed[i][1], (link, names[i]), children, i, None, inner))
    # Of several trees together, one may close over another: it is an input, too.
    for where, x in found.functions if not skip else ():
        if id(x) in numbers:
            raise StructureError(
                f"{where} is a function that closes over a {type(x).__name__} of the same tree. A "
                f"copy of the tree, as jax.grad or a compiled function makes one, would go on with "
                f"the old one, whose gradients are lost. Make the function a method, or write it "
                f"where it is called; to keep it, give it what it needs as an argument."
            )
    frozen = tuple(
        n
        if type(n) is RefDef
        else NodeDef(n[0], n[1], tuple(map(_freeze, n[2])), _types(*n[:2]), *n[3:])
        for n in nodes
    )
    return found._replace(dagdef=intern(_freeze(result[0]), frozen))


def contents(container: Any) -> Any:
    """The list, or the dict of items or attributes, of what has an identity and holds others."""
    if isinstance(container, Node):
        return attributes(container)
    return container if isinstance(container, list | dict) else vars(container)


def _hides(obj: Any) -> bool:
    """Whether `obj` is a pytree whose class takes apart the modules or Refs that it holds.

    Its leaves would be the values of their Refs, so a copy of it would have Refs of its own, that
    nobody trains. So it is walked as an object: by its attributes.
    """
    if not _has_attributes(obj):
        return False
    outer, local.peeking = local.peeking, True
    try:
        leaves = jax.tree.leaves(obj, is_leaf=is_identity)
        if len(leaves) == 1 and leaves[0] is obj:
            return False
        seen = set(map(id, leaves))
        return any(id(x) not in seen for x in _held_by_attributes(obj))
    finally:
        local.peeking = outer


def _has_attributes(obj: Any) -> bool:
    """Whether `obj` may be a pytree of a class of its own, with a dict of attributes."""
    kind = type(obj)
    if isinstance(obj, tuple) or kind in _STATIC or kind in _NO_PYTREES or is_array(obj):
        return False
    if isinstance(obj, type | types.ModuleType) or is_identity(obj):
        return False
    held = getattr(obj, "__dict__", None)
    return type(held) is dict and bool(held)


def _held_by_attributes(obj: Any) -> Iterator[Any]:
    """The Refs and Nodes that an object and the pytrees in it hold in their attributes."""
    todo, seen = [obj], {id(obj)}
    while todo:
        at = todo.pop()
        for x in jax.tree.leaves(vars(at), is_leaf=lambda x: is_identity(x) or _has_attributes(x)):
            if is_identity(x):
                yield x
            elif id(x) not in seen and _has_attributes(x) and not jax.tree_util.all_leaves([x]):
                seen.add(id(x))
                todo.append(x)


_NO_PYTREES = frozenset({types.FunctionType, types.MethodType, functools.partial})


def _identities(items: Iterable[Any]) -> list[Any]:
    """The Refs and Nodes in some objects and in their lists, tuples and dicts."""
    return [x for x in jax.tree.leaves(list(items), is_leaf=is_identity) if is_identity(x)]


def ref_def(collection: Any, metadata: Iterable[tuple[str, Any]]) -> RefDef:
    """What the structure says of a Ref."""
    return RefDef(Static(collection), tuple((k, Static(v)) for k, v in metadata))


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


def _types(kind: type, names: tuple[Any, ...]) -> tuple[type, ...]:
    if kind is not dict or all(type(name) in (str, Name) for name in names):
        return ()
    return tuple(map(type, names))


def _one_level(obj: Any) -> Any:
    return jax.tree_util.tree_flatten_with_path(obj, lambda x: x is not obj)


class PathName(tuple[str, ...]):
    """The name of a value of a Partition, which is a path in itself."""

    __slots__ = ()


def _names(obj: Any, keyed: Any) -> tuple[Any, ...]:
    if isinstance(obj, Partition):
        return tuple(map(PathName, obj))
    return tuple(_name(path[0]) for path, _ in keyed)


def parts_of(name: Any) -> Path:
    """What a name adds to a path."""
    return tuple(map(str, name)) if type(name) is PathName else (str(name),)


def node_paths(dagdef: DagDef) -> dict[int, Path]:
    """The canonical path of each object of a structure, by its number."""
    paths: dict[int, Path] = {}
    todo: list[tuple[Any, Path]] = [(dagdef.root, ())]
    while todo:
        child, path = todo.pop()
        if type(child) is int:
            if child in paths:
                continue
            paths[child] = path
            child = dagdef.nodes[child]
        if isinstance(child, (NodeDef, Tree)):
            todo += _below(child, path)
    return paths


def _below(at: NodeDef | Tree, path: Path) -> list[tuple[Any, Path]]:
    """What an object or a pytree holds, with its paths, the last first."""
    kind = at.kind if type(at) is NodeDef else at.treedef.node_data()[0]
    return [
        (c, (*path, *(parts_of(name) if type(name) is PathName else named(kind, name))))
        for name, c in zip(reversed(at.names), reversed(at.children), strict=True)
    ]


def leaves_by_path(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The leaves of a pytree, where Refs and Nodes are leaves, with the paths that a DagDef has."""
    keyed = [] if is_identity(tree) else _one_level(tree)[0]
    if is_identity(tree) or (len(keyed) == 1 and keyed[0][1] is tree):
        yield path, tree
        return
    for name, (_, child) in zip(_names(tree, keyed), keyed, strict=True):
        yield from leaves_by_path(child, (*path, *parts_of(name)))


def _freeze(child: Any) -> Any:
    if type(child) is tuple:
        treedef, names, children = child
        return Tree(treedef, names, tuple(map(_freeze, children)))
    return child


def _name(key: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _path(link: Any) -> Path:
    parts: Path = ()
    while link is not None:
        link, name = link
        parts = parts_of(name) + parts
    return parts


def _static(obj: Any, link: Any, skip: int, found: Scan) -> Static:
    path = _path(link)[skip:]
    where = f"Attribute {dotted(path)!r}" if path else "The tree"
    static = Static(obj)
    found.contents.extend(static.contents)
    try:
        hash(static)
        if type(obj).__hash__ is None and _holds_arrays(static):
            raise TypeError
    except TypeError:
        raise UnhashableStaticError(
            f"{where} is a {type(obj).__name__}, which cannot be hashed and is neither an array "
            f"nor a pytree, so it can be neither a value nor part of the structure: {_clip(obj)}. "
            f"Use a tuple for a set or for a static() list, an array for numbers, or register the "
            f"class as a pytree."
        ) from None
    if hasattr(type(obj), "__next__"):
        raise StructureError(
            f"{where} is a {type(obj).__name__}, an iterator, which may hold Refs or modules that "
            f"cannot be seen, and is used up when it is read. Use a list or a tuple."
        )
    held: Any = obj if isinstance(obj, frozenset) else jax.tree.leaves(obj, is_leaf=is_identity)
    if isinstance(obj, functools.partial):
        parts = (obj.func, obj.args, obj.keywords)
        held = [*held, *jax.tree.leaves(parts, is_leaf=is_identity)]
    if not isinstance(obj, type | types.FunctionType | types.ModuleType):
        held = [*held, *getattr(obj, "__dict__", {}).values()]
    if isinstance(obj, types.FunctionType):
        found.functions.extend((where, x) for x in _identities(_closed_over(obj)))
    if hasattr(obj, "__wrapped__") and not isinstance(obj, type):
        held = [*held, *jax.tree.leaves(_wrapped(obj), is_leaf=is_identity)]
    if any(map(is_identity, held)):
        raise StructureError(
            f"{where} is a {type(obj).__name__} that holds Refs or modules, but it is static, so "
            f"their updates would not be seen, and a copy would go on with the old ones. Use a list, "
            f"a tuple or a dict in an ordinary attribute; nnx.Partial for a functools.partial; for a "
            f"method that was transformed or wrapped, decorate it in the class, or use nnx.VMap, "
            f"nnx.Grad or nnx.Remat; make a class of your own an nnx.Module or a registered pytree."
        )
    return static


def _closed_over(fn: types.FunctionType) -> list[Any]:
    """What a function holds in its variables and defaults, and what functions in there hold."""
    found: list[Any] = []
    todo, seen = [fn], set()
    while todo:
        at = todo.pop()
        if id(at) in seen:
            continue
        seen.add(id(at))
        cells = [getattr(c, "cell_contents", None) for c in at.__closure__ or ()]
        for x in (*cells, *(at.__defaults__ or ()), *(at.__kwdefaults__ or {}).values()):
            if isinstance(x, types.FunctionType):
                todo.append(x)
            else:
                found.append(x)
    return found


def _holds_arrays(static: Static) -> bool:
    """Whether an object that counts by its attributes has arrays among them."""
    parts = [x for c in static.contents for x in (c.values() if isinstance(c, dict) else c)]
    return any(isinstance(x, LEAVES) for x in parts)


def _wrapped(obj: Any) -> list[Any]:
    """What a decorated function goes on to, and what its wrappers hold."""
    found: list[Any] = []
    while hasattr(obj, "__wrapped__"):
        for cell in getattr(obj, "__closure__", None) or ():
            try:
                found.append(cell.cell_contents)
            except ValueError:
                continue  # a variable that is not bound yet
        obj = obj.__wrapped__
        found.append(obj)
    return found


def _clip(obj: Any) -> str:
    text = repr(obj)
    return text if len(text) <= 80 else text[:77] + "..."


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
