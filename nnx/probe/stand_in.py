"""A stand-in for a tree of modules: new objects, of subclasses, that hold the very same Refs.

So calls can be watched without changing the modules, their classes or the way modules are called.
Other threads and later calls notice nothing. The marks of a stand-in are part of its
structure, so they survive every transformation.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable
from typing import Any

from nnx._layer_names import layer_call
from nnx.module import Module
from refx import Node, Ref, opened
from refx.access import check_structure
from refx.build import build
from refx.dagdef import NodeDef, intern, node_paths, revision_of
from refx.node import attributes, is_identity, mark_exposed, set_on_class
from refx.partition import Path
from refx.snapshot import snapshot
from refx.static import Static
from refx.walk import Walk, walk

__all__: list[str] = []

# The extra attribute of modules in a stand-in.
MARK = "_probe_mark"


class Watched:
    """A base that comes before the module's own class, so that the class does not notice its subclass."""

    __slots__ = ()

    _stands_for: type

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Skip the hooks of the user's classes, which may keep lists of their subclasses.
        Node.__init_subclass__.__func__(cls)  # pyright: ignore[reportFunctionMemberAccess]
        # A dataclass has no defaults here: its `__init__` sets them.
        set_on_class(cls, "_defaults", cls._stands_for._defaults)  # pyright: ignore


def _unwatched(kind: Any) -> type:
    return kind._stands_for if issubclass(kind, Watched) else kind


Around = Callable[[str, Callable[..., Any], Any, Any, Any], Any]


@functools.cache
def watched(kind: type, methods: frozenset[str], around: Around) -> type:
    """Make a subclass whose methods are called through `around(name, method, module, args, kwargs)`."""
    namespace: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "_stands_for": kind,
    }
    for name in methods:
        # Every class has a `__call__`, that of its metaclass.
        if any(name in vars(base) for base in kind.__mro__):
            namespace[name] = _wrapped(kind, name, around)
    return types.new_class(kind.__name__, (Watched, kind), {}, lambda ns: ns.update(namespace))


def _wrapped(kind: Any, name: str, around: Around) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The class may have received a new method since.
        return around(name, getattr(kind, name), self, args, kwargs)

    call = functools.wraps(getattr(kind, name), updated=())(call)
    # Operations in it have the name of the layer, as without a mark.
    return layer_call(call) if name == "__call__" else call


class StandIn:
    """The stand-in for a tree of modules.

    Invariants: `root` has the structure of the tree and the same Refs and arrays, but shares no
    other object with it. `modules` holds each stand-in module by its canonical path.

    Args:
      tree: the modules.
      mark: `mark(path, module, old)` returns the mark of a module and the names of its methods to
        watch. `old` is the mark that the module already has, if the tree is itself part of a
        stand-in.
      around: the function that calls the methods.
    """

    def __init__(
        self,
        tree: Any,
        mark: Callable[[Path, Module, Any], tuple[Hashable, frozenset[str]]],
        around: Around,
    ):
        found = walk(tree)
        paths = node_paths(found.dagdef)
        nodes = [
            _marked(node, around, *mark(paths[i], x, attributes(x).get(MARK)))
            if isinstance(x, Module)
            else node
            for i, (node, x) in enumerate(zip(found.dagdef.nodes, found.objects, strict=True))
        ]
        self.root, objects = build(
            intern(found.dagdef.root, tuple(nodes)),
            [],
            found.leaves,
            existing={i: x for i, x in enumerate(found.objects) if isinstance(x, Ref)},
            rewritten=(),
        )
        self.modules: dict[Path, Module] = {
            paths[i]: x for i, x in enumerate(objects) if isinstance(x, Module)
        }
        self._originals = {
            id(x): original
            for x, original in zip(objects, found.objects, strict=True)
            if not isinstance(x, Ref)
        }
        self._before = snapshot(self.root)
        self._leaves = self._before.leaves()

    def close(self) -> None:
        """Apply changes of the structure to the original tree."""
        now = snapshot(self.root)
        if now.dagdef is not self._before.dagdef or not all(
            a is b for a, b in zip(now.leaves(), self._leaves, strict=True)
        ):
            self._take_back(walk(self.root))

    def originals(self, out: Any) -> Any:
        """An output in which stand-ins are replaced by the original modules."""
        if not opened.holds_identity(out):
            return out
        return opened.map(lambda x: self._originals.get(id(x), x) if is_identity(x) else x, out)

    def _take_back(self, after: Walk) -> None:
        existing: dict[int, Any] = {}
        for i, x in enumerate(after.objects):
            if isinstance(x, Ref):
                existing[i] = x
            elif id(x) in self._originals:
                existing[i] = self._originals[id(x)]
        nodes = [self._unmarked(*pair) for pair in zip(after.dagdef.nodes, after.objects)]
        for original in existing.values():
            if isinstance(original, Node):
                check_structure(original, "The structure")
        build(intern(after.dagdef.root, tuple(nodes)), [], after.leaves, existing=existing)
        for original in existing.values():
            if isinstance(original, Node):
                mark_exposed(original)

    def _unmarked(self, node: Any, x: Any) -> Any:
        if not isinstance(node, NodeDef):
            return node
        if MARK not in node.names and not issubclass(node.kind, Watched):
            return node
        children = dict(zip(node.names, node.children, strict=True))
        children.pop(MARK, None)
        original = self._originals.get(id(x))
        if original is not None and MARK in attributes(original):
            # The tree is itself part of a stand-in.
            children[MARK] = Static(attributes(original)[MARK])
            kind = type(original)
        else:
            kind = _unwatched(node.kind)
        return NodeDef(
            kind, tuple(children), tuple(children.values()), node.types, revision_of(kind)
        )


def _marked(node: NodeDef, around: Around, mark: Hashable, methods: frozenset[str]) -> NodeDef:
    kind = _unwatched(node.kind)
    kind = watched(kind, methods, around) if methods else kind
    kept = {n: c for n, c in zip(node.names, node.children, strict=True) if n != MARK}
    return NodeDef(
        kind,
        (*kept, MARK),
        (*kept.values(), Static(mark)),
        node.types,
        revision_of(kind),
    )
