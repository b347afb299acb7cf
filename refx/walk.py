"""The walk of a tree, which finds its structure and its live objects."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from refx.dagdef import DagDef, Leaf, NodeDef, PathName, RefDef, Tree, intern, parts_of
from refx.errors import StructureError, UnhashableStaticError
from refx.node import Node, attributes, is_array, is_identity
from refx.opened import hides, opened
from refx.partition import Name, Partition, Path, dotted, named
from refx.ref import Ref
from refx.static import SIMPLE, WITH_IDENTITY, Changing, Static
from refx.text import ALTERNATIVES, key_name
from refx.trace import FROZEN

__all__: list[str] = []


class Walk(NamedTuple):
    """The result of `walk`: the structure, and the live objects in the order of the structure.

    `places` has, for each plain array, the dict or list that holds it and its key there; or None, if a
    tuple or another pytree holds it. `containers` are the Nodes, lists, dicts and objects on the way,
    `opaque` the pytrees of other classes, `contents` the parts of static values that may change in
    place, and `functions` the modules and Refs that static functions close over.
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


_NO_ARRAYS = SIMPLE | {list, dict, tuple}


def walk(tree: Any, alias: Mapping[int, Any] | None = None, *, skip: int = 0) -> Walk:
    """Walk a tree and find its structure.

    Args:
      tree: the tree to walk.
      alias: by id, objects to visit in place of others.
      skip: how many parts of a path messages leave out, for a tuple around the user's trees.

    Raises:
      UnhashableStaticError: a static value cannot be hashed. The message has its path.
      StructureError: a Ref or a module is where the walk cannot enter, such as in a frozenset.
    """
    nodes: list[Any] = []
    numbers: dict[int, int] = {}
    found = Walk(None, [], [], [], [], [], [], [], [])  # pyright: ignore[reportArgumentType]
    result: list[Any] = [None]
    # Each entry is an object, its path as a linked list, the list and the position for its code, the
    # container that holds it directly, and its mark.
    todo: list[tuple[Any, Any, list[Any], int, Any, Any]] = [(tree, None, result, 0, None, None)]
    while todo:
        obj, link, place, position, holder, mark = todo.pop()
        if alias is not None:
            obj = alias.get(id(obj), obj)
        kind = type(obj)
        known = kind in WITH_IDENTITY
        if mark is True or (not known and kind not in _NO_ARRAYS and is_array(obj)):
            place[position] = Leaf(len(found.leaves))
            found.leaves.append(obj)
            found.places.append((holder, link[1] if link is not None else None))
            continue
        if kind in SIMPLE:
            place[position] = Static(obj)
            continue
        fields: Mapping[str, Any] = {}
        content = None
        if known or kind is list or kind is dict or hides(obj):
            number = numbers.get(id(obj))
            if number is not None:
                place[position] = number
                continue
            place[position] = numbers[id(obj)] = len(nodes)
            found.objects.append(obj)
            if kind is Ref:
                found.refs.append(obj)  # pyright: ignore[reportArgumentType]
                nodes.append(_ref_def(obj))  # pyright: ignore[reportArgumentType]
                continue
            found.containers.append(obj)
            content = contents(obj)
            names = tuple(range(len(content))) if kind is list else tuple(content)
            values = list(content) if kind is list else list(content.values())
            children: list[Any] = [None] * len(names)
            if known:
                fields = obj._fields
                mark = obj._book.marks if obj._book is not None else None
                nodes.append((kind, names, children, obj._revision, obj._trace is FROZEN))
            else:
                nodes.append((kind, names, children))
        else:
            keyed, treedef = _one_level(obj)
            values = [x for _, x in keyed]
            if len(values) == 1 and values[0] is obj:
                place[position] = _static(obj, link, skip, found)
                continue
            names = _names(obj, keyed)
            children = [None] * len(names)
            place[position] = (treedef, names, children)
            if not isinstance(obj, tuple):
                found.opaque.append((obj, treedef, values))
        for i in range(len(names) - 1, -1, -1):
            field = fields.get(names[i])  # pyright: ignore[reportArgumentType]
            if field is not None and not field.is_ref:
                children[i] = _static(values[i], (link, names[i]), skip, found)
            else:
                inner = mark.get(names[i]) if type(mark) is dict else None
                todo.append((values[i], (link, names[i]), children, i, content, inner))
    # With several trees, one may close over another, which is then an input too.
    for where, x in found.functions if not skip else ():
        if id(x) in numbers:
            raise StructureError(
                f"{where} is a function that closes over a {type(x).__name__} of the same tree. In a copy "
                f"of the tree, which jax.grad and compiled functions make, it would still use the old "
                f"one, and gradients would be lost. Make it a method, define it where it is called, or "
                f"pass it what it needs as an argument."
            )
    frozen = tuple(
        n
        if type(n) is RefDef
        else NodeDef(n[0], n[1], tuple(map(_freeze, n[2])), _types(*n[:2]), *n[3:])
        for n in nodes
    )
    return found._replace(dagdef=intern(_freeze(result[0]), frozen))


def contents(container: Any) -> Any:
    """The live list of items, or the live dict of items or attributes, of a container."""
    if isinstance(container, Node):
        return attributes(container)
    return container if isinstance(container, list | dict) else vars(container)


def _identities(items: Iterable[Any]) -> list[Any]:
    """The Refs and Nodes in some objects and in their lists, tuples and dicts."""
    return [x for x in jax.tree.leaves(list(items), is_leaf=is_identity) if is_identity(x)]


_known_refs: dict[tuple[str, bool], RefDef] = {}


def _ref_def(ref: Ref[Any]) -> RefDef:
    """The part of the structure for a Ref."""
    collection, frozen = ref._collection, ref._trace is FROZEN
    if ref._metadata or type(collection) is not str:
        facts = tuple((k, Static(v)) for k, v in ref._metadata.items())
        return RefDef(Static(collection), facts, frozen)
    # Almost all Refs are like this.
    known = _known_refs.get((collection, frozen))
    if known is None:
        known = _known_refs[collection, frozen] = RefDef(Static(collection), (), frozen)
    return known


def _types(kind: type, names: tuple[Any, ...]) -> tuple[type, ...]:
    if kind is not dict or all(type(name) in (str, Name) for name in names):
        return ()
    return tuple(map(type, names))


def _one_level(obj: Any) -> Any:
    return jax.tree_util.tree_flatten_with_path(obj, lambda x: x is not obj)


def _names(obj: Any, keyed: Any) -> tuple[Any, ...]:
    if isinstance(obj, Partition):
        return tuple(map(PathName, obj))
    return tuple(key_name(path[0]) for path, _ in keyed)


def leaves_by_path(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The leaves of a pytree, including Refs and Nodes, with the same paths as in a DagDef."""
    tree = tree if path else opened(tree)
    keyed = [] if is_identity(tree) else _one_level(tree)[0]
    if is_identity(tree) or (len(keyed) == 1 and keyed[0][1] is tree):
        yield path, tree
        return
    for name, (_, child) in zip(_names(tree, keyed), keyed, strict=True):
        part = parts_of(name) if type(name) is PathName else named(type(tree), name)
        yield from leaves_by_path(child, (*path, *part))


def _freeze(child: Any) -> Any:
    if type(child) is tuple:
        treedef, names, children = child
        return Tree(treedef, names, tuple(map(_freeze, children)))
    return child


def _path(link: Any) -> Path:
    parts: Path = ()
    while link is not None:
        link, name = link
        parts = parts_of(name) + parts
    return parts


def _static(obj: Any, link: Any, skip: int, found: Walk) -> Static:
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
            f"Use a tuple instead of a set or a static() list, an array for numbers, or register the "
            f"class as a pytree."
        ) from None
    if hasattr(type(obj), "__next__"):
        raise StructureError(
            f"{where} is a {type(obj).__name__}, an iterator. It may hold Refs or modules, but reading it "
            f"would use it up. Use a list or a tuple."
        )
    if isinstance(obj, types.FunctionType):
        found.functions.extend((where, x) for x in _identities(_closed_over(obj)))
    if _holds_identities(obj):
        raise StructureError(
            f"{where} is a {type(obj).__name__} that holds Refs or modules, but it is static, so "
            f"their updates would go unnoticed, and a copy would still use the old ones. Use a list, "
            f"a tuple or a dict in an ordinary attribute; {ALTERNATIVES['holder']}."
        )
    return static


def _holds_identities(obj: Any) -> bool:
    """Whether a static object visibly holds Refs or Nodes."""
    direct: list[Any] = list(obj) if isinstance(obj, frozenset) else []
    inside: list[Any] = [obj]
    if isinstance(obj, functools.partial):
        inside += [obj.func, obj.args, obj.keywords]
    if not isinstance(obj, type | types.FunctionType | types.ModuleType):
        direct += getattr(obj, "__dict__", {}).values()
    at: Any = None if isinstance(obj, type) else obj
    while hasattr(at, "__wrapped__"):
        # A decorated function: look into its wrappers, and into the functions that they wrap.
        inside += _cells(at)
        at = at.__wrapped__
        inside.append(at)
    return any(map(is_identity, direct)) or bool(_identities(inside))


def _closed_over(fn: types.FunctionType) -> list[Any]:
    """The contents of a function's cells and defaults, and of those of functions in them."""
    found: list[Any] = []
    todo, seen = [fn], set()
    while todo:
        at = todo.pop()
        if id(at) in seen:
            continue
        seen.add(id(at))
        for x in (*_cells(at), *(at.__defaults__ or ()), *(at.__kwdefaults__ or {}).values()):
            if isinstance(x, types.FunctionType):
                todo.append(x)
            else:
                found.append(x)
    return found


def _cells(fn: Any) -> list[Any]:
    """The contents of the variables that a function closes over."""
    found: list[Any] = []
    for cell in getattr(fn, "__closure__", None) or ():
        # A variable that is not bound yet has no content.
        with contextlib.suppress(ValueError):
            found.append(cell.cell_contents)
    return found


def _holds_arrays(static: Static) -> bool:
    """Whether an object that is compared by its attributes has an array among them."""
    parts: list[Any] = []
    for c in static.contents:
        parts += c.held() if type(c) is Changing else c.values() if isinstance(c, dict) else c
    return any(is_array(x) for x in parts)


def _clip(obj: Any) -> str:
    text = repr(obj)
    return text if len(text) <= 80 else text[:77] + "..."
