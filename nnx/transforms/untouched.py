"""What a body must leave as it was: containers that are values to it, or that it closes over.

A list, a dict and an attribute dict take any item without asking. In a body that JAX traces, an item
that is put into one of the caller's would be put there once, while tracing, and would be a tracer.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from typing import Any

import jax
from jax.core import Tracer

from nnx.transforms.call import Call, Layout
from refx import Node, Ref
from refx.access import writable
from refx.dagdef import DagDef
from refx.errors import StructureError
from refx.frame import Frame
from refx.node import is_identity
from refx.snapshot import snapshot
from refx.walk import contents, walk

__all__: list[str] = []


def reachable(dagdef: DagDef, roots: Iterable[int]) -> set[int]:
    """The numbers of the objects that hang on some of the roots, by the roots' positions."""
    todo = [dagdef.root.children[i] for i in roots]
    seen: set[int] = set()
    while todo:
        child = todo.pop()
        if type(child) is int:
            if child in seen:
                continue
            seen.add(child)
            child = dagdef.nodes[child]
        todo += getattr(child, "children", ())
    return seen


class Untouched:
    """The containers of the roots that a body closes over, as they were when it began."""

    def __init__(self, call: Call, layout: Layout, objects: list[Any]):
        start = len(layout.form.where)
        # What stands for them, which is an argument, too, where the caller passes one of them.
        closed = reachable(layout.dagdef, range(start, start + layout.closed))
        self._stand_ins = [
            (objects[n], contents(objects[n]), contents(objects[n]).copy())
            for n in closed
            if type(objects[n]) is not Ref
        ]
        self._roots = call.roots[start : start + layout.closed]
        self._snapshots = call.snapshots[start : start + layout.closed]
        self._kept = [
            (root, content, content.copy())
            for root in self._roots
            for container in walk(root).containers
            for content in [contents(container)]
        ]

    def restore(self) -> Any:
        """Put everything back; the first root that something was changed in, or None."""
        touched = None
        for root, content, was in reversed(self._kept):
            if not _same(content, was):
                touched = root
                content.clear()
                content.update(was) if isinstance(content, dict) else content.extend(was)
        for root, kept in zip(self._roots, self._snapshots, strict=True):
            now = snapshot(root)
            # Instances of registered pytree classes may change in ways that only they know.
            if now.dagdef is not kept.dagdef or not all(map(is_, now.refs, kept.refs)):
                touched = root
        return touched

    def check(self, frame: Frame) -> None:
        """Raise if something was changed, after putting it back."""
        for obj, content, was in self._stand_ins:
            if not _same(content, was):
                raise StructureError(
                    f"A {type(obj).__name__} was changed in {frame.name}: an attribute, a list or a "
                    f"dict of it. It is an argument and the function closes over it, too, where the "
                    f"change is not seen. Use it under one of the two names: the argument."
                )
        root = self.restore()
        if root is not None:
            raise StructureError(
                f"A {type(root).__name__} that {frame.name} closes over was changed inside it: "
                f"something was put into a list, a dict or the __dict__ of it, or taken out. That "
                f"would happen once, while tracing. Pass the module as an argument; then such "
                f"changes propagate. What changes in each call is best kept in a Ref (nnx.Ref)."
            )


def check_found(frame: Frame) -> None:
    """Raise if the body changed what it met by closure in a way that asks nobody."""
    for met in frame.met():
        owner = met.owner
        if frame.constants and met.was_written(frame):
            # A list or a dict in a constant was changed in place: the error is that of a write.
            writable(met.ref, owner)
        # What was made in the body holds the body's tracers by right.
        if met.ref._frame is frame or not isinstance(owner, Node) or owner._frame is frame:
            continue
        if any(
            isinstance(x, Tracer) and x._trace is frame.trace() for x in snapshot(owner).leaves()
        ):
            raise StructureError(
                f"A {type(owner).__name__} that {frame.name} closes over was given an array of this "
                f"call in a list, a dict or its __dict__. The array is a tracer, which means "
                f"nothing when the call has ended. Pass the module as an argument; then such "
                f"changes propagate, or keep the array in a Ref (nnx.Ref)."
            )


def check_arguments(frame: Frame, arguments: Any, roots: tuple[Any, ...]) -> None:
    """Raise if a list or a dict of modules among the arguments was changed."""
    # It is a value to JAX, and the body had a copy of it.
    now = [x for x in jax.tree.leaves(arguments, is_leaf=is_identity) if is_identity(x)]
    if len(now) != len(roots) or not all(map(is_, now, roots)):
        raise StructureError(
            f"A list, dict or tuple of modules or Refs that is an argument of {frame.name} was "
            f"changed inside it, and the change would be lost: such a container is a value there. "
            f"Keep it in an attribute of a module, where changes propagate, or return it."
        )


def _same(content: Any, was: Any) -> bool:
    if len(content) != len(was):
        return False
    if isinstance(content, dict) and not all(map(is_, content, was)):
        return False
    values = (content.values(), was.values()) if isinstance(content, dict) else (content, was)
    return all(map(is_, *values))
