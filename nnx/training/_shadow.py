"""A stand-in of a module tree: other objects of subclasses, around the very same Refs.

So calls of its modules can be watched without a change to the modules, their classes or the way
that modules are called: no other thread, and no later call, can meet anything of it.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from nnx.module import Module
from refx import Node, Ref
from refx.node import attributes, expose, is_identity
from refx.partition import Path
from refx.static import Static
from refx.structure import NodeDef, Scan, build, intern, node_paths, revision_of, scan
from refx.trace import check_structure

__all__: list[str] = []

# The attributes that modules of a stand-in have in addition: who they are, and Refs for outputs.
TAG, CELLS = "_capture_tag", "_capture_cells"


class Tag(NamedTuple):
    """Which module of which capture a stand-in is for."""

    token: int
    path: Path


class Watched:
    """Comes before the module's own class: nothing of that class sees that it has a subclass."""

    __slots__ = ()

    _stands_for: type

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Not those of the classes in between, which may keep lists of their subclasses.
        Node.__init_subclass__.__func__(cls)  # pyright: ignore[reportFunctionMemberAccess]
        # A dataclass has none: its `__init__` sets the defaults.
        cls._defaults = cls._stands_for._defaults  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def watched(kind: type, around: Callable[..., Any]) -> type:
    """A subclass of a module class whose calls go through `around(call, module, args, kwargs)`."""
    namespace: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "_stands_for": kind,
    }
    # Every class has a `__call__`, that of its metaclass.
    if any("__call__" in vars(base) for base in kind.__mro__):
        call: Any = kind.__call__

        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            return around(call, self, args, kwargs)

        namespace["__call__"] = functools.wraps(call, updated=())(__call__)
    return types.new_class(kind.__name__, (Watched, kind), {}, lambda ns: ns.update(namespace))


class Shadow:
    """The stand-in of one tree of modules.

    Invariants: `root` has the structure of the tree and its Refs and arrays, but no other object of
    it. `modules` has each stand-in module by its canonical path.
    """

    def __init__(self, tree: Node, token: int, around: Callable[..., Any]):
        found = scan(tree)
        paths = node_paths(found.dagdef)
        nodes = [
            _tagged(node, Tag(token, paths[i]), around) if _is_module(node) else node
            for i, node in enumerate(found.dagdef.nodes)
        ]
        self.root, objects = build(
            intern(found.dagdef.root, tuple(nodes)),
            [],
            found.leaves,
            existing={i: x for i, x in enumerate(found.objects) if isinstance(x, Ref)},
            refill=False,
        )
        self.modules: dict[Path, Module] = {
            paths[i]: x for i, x in enumerate(objects) if isinstance(x, Module)
        }
        self._originals = {
            id(x): original
            for x, original in zip(objects, found.objects, strict=True)
            if not isinstance(x, Ref)
        }
        self._before: Scan | None = None

    def open(self) -> None:
        """Remember how the stand-in is before the call."""
        self._before = scan(self.root)

    def close(self, out: Any) -> Any:
        """Make the changes of structure in the tree itself, and give the output with its modules."""
        before, after = self._before, scan(self.root)
        assert before is not None
        if after.dagdef is not before.dagdef or not all(
            a is b for a, b in zip(after.leaves, before.leaves, strict=True)
        ):
            self._take_back(after)
        if not any(map(is_identity, jax.tree.leaves(out, is_leaf=is_identity))):
            return out
        return jax.tree.map(
            lambda x: self._originals.get(id(x), x) if is_identity(x) else x,
            out,
            is_leaf=is_identity,
        )

    def _take_back(self, after: Scan) -> None:
        existing: dict[int, Any] = {}
        for i, x in enumerate(after.objects):
            if isinstance(x, Ref):
                existing[i] = x
            elif id(x) in self._originals:
                existing[i] = self._originals[id(x)]
        nodes = [self._untagged(*pair) for pair in zip(after.dagdef.nodes, after.objects)]
        for original in existing.values():
            if isinstance(original, Node):
                check_structure(original, "The structure")
        build(intern(after.dagdef.root, tuple(nodes)), [], after.leaves, existing=existing)
        for original in existing.values():
            if isinstance(original, Node):
                expose(original)

    def _untagged(self, node: Any, x: Any) -> Any:
        if not (isinstance(node, NodeDef) and issubclass(node.kind, Watched)):
            return node
        children = dict(zip(node.names, node.children, strict=True))
        children.pop(CELLS, None)
        children.pop(TAG, None)
        original = self._originals.get(id(x))
        if original is not None and TAG in attributes(original):
            # The tree is itself the stand-in of a capture around this one.
            children[TAG] = Static(attributes(original)[TAG])
            kind = type(original)
        else:
            kind = node.kind._stands_for
        return NodeDef(
            kind, tuple(children), tuple(children.values()), node.types, revision_of(kind)
        )


def _is_module(node: Any) -> bool:
    return isinstance(node, NodeDef) and issubclass(node.kind, Module)


def _tagged(node: NodeDef, tag: Tag, around: Callable[..., Any]) -> NodeDef:
    kind = node.kind if issubclass(node.kind, Watched) else watched(node.kind, around)
    kept = {
        name: child
        for name, child in zip(node.names, node.children, strict=True)
        if name not in (TAG, CELLS)
    }
    children = (*kept.values(), Static(tag))
    return NodeDef(kind, (*kept, TAG), children, node.types, revision_of(kind))
