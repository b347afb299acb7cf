"""Containers that a body must not change: those that are values to it, or that it closes over.

Nothing stops code from putting an item into a list, a dict or an attribute dict. If a traced body put an
item into one of the caller's containers, this would happen only once, while tracing, and the item would
be a tracer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import is_
from typing import Any

from jax.core import Tracer

from nnx.transforms.body import Body
from nnx.transforms.looking import Graph
from nnx.transforms.objects import containers
from refx import Node, Ref, RefError, opened
from refx.access import writable
from refx.build import changes_with_objects
from refx.dagdef import DagDef
from refx.errors import StructureError
from refx.frame import Frame
from refx.node import class_changes, is_exposed, is_identity
from refx.snapshot import Contents, snapshot
from refx.walk import contents, walk

__all__: list[str] = []


def reachable(dagdef: DagDef, roots: Iterable[int]) -> set[int]:
    """The numbers of the objects that can be reached from the roots at these positions."""
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
    """The original content of the containers that a body reaches by two names, or by closure.

    In the body, a module in an argument is a copy, but a closed-over module is the caller's own. If both
    are one module, a structural change under one name would not show under the other, so it is an error.
    A body that runs exactly once for each call may change a module that it only closes over.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        body: Body,
        *,
        runs_once: bool,
    ):
        call, layout, objects, outer = body.call, body.layout, body.objects, body.outer
        start = len(layout.form.where)
        closed = slice(start, start + layout.closed)
        self._fn = fn
        self._body = body
        # The copies of closed-over roots that the caller also passes as arguments.
        self._closed = reachable(layout.dagdef, range(closed.start, closed.stop))
        self._given = reachable(layout.dagdef, range(start))
        self._numbers = [n for n, x in enumerate(objects) if type(x) is not Ref]
        self._inner = Contents([contents(objects[n]) for n in self._numbers])
        self._roots = call.roots[closed]
        self._snapshots = call.snapshots[closed]
        # Transformations that keep no program between calls search the function in each call.
        looks = call.entry is not None
        self._runs_once = runs_once and looks
        self._owners: list[Any] = []
        self._kept: list[Any] = []
        # The caller's own containers in the arguments that can change without noticing.
        for n in self._numbers:
            x = outer[n]
            if n not in self._closed and not (isinstance(x, Node) and not is_exposed(x)):
                self._keep(None, [contents(x)])
        for root in [*self._roots, *(closed_over(fn, only_near=True) if looks else ())]:
            for module, held in _containers_of(root):
                self._keep(module, held)
        self._caller = Contents(self._kept)
        self._class_changes = class_changes[0]

    def stands(self) -> bool:
        """Whether the structure of the roots in the body is certainly unchanged. If not, a walk decides."""
        return (
            self._inner.same()
            and self._class_changes == class_changes[0]
            and changes_with_objects(self._body.layout.dagdef)
        )

    def _keep(self, owner: Any, held: list[Any]) -> None:
        self._kept += held
        self._owners += [owner] * len(held)

    def restore(self) -> list[Any]:
        """Restore the caller's containers. Returns the positions of those that had changed."""
        if self._caller.same():
            return []
        changed = self._caller.changed()
        for i, was in changed.items():
            content = self._kept[i]
            content.clear()
            content.update(was) if isinstance(content, dict) else content.extend(was)
        return list(changed)

    def check(self) -> None:
        """Raise if the body made a change that is not allowed, after undoing the change."""
        frame = self._body.frame
        twice = self.changed_by_two_names()
        if twice is not None:
            self.restore()
            raise twice
        if not self._caller.same():
            self._check_caller()
        if self._runs_once:
            return
        for root, kept in zip(self._roots, self._snapshots, strict=True):
            now = snapshot(root)
            # Instances of registered pytree classes may change in ways that only they know.
            if now.dagdef is not kept.dagdef or not all(map(is_, now.refs, kept.refs)):
                self.restore()
                raise _changed(root, frame)

    def changed_by_two_names(self) -> StructureError | None:
        """The error for a module with two names in the body that was changed under one of them."""
        if self._inner.same():
            return None
        frame = self._body.frame
        changed = [self._numbers[i] for i in self._inner.changed()]
        # In the body these are two objects, so code that visits each object once would count both.
        theirs = {id(self._body.outer[n]) for n in self._given}
        for n in changed:
            again = next((x for x in _objects_of(self._body.objects[n]) if id(x) in theirs), None)
            if again is not None:
                return _given_again(again, self._body.objects[n], frame)
        both = [n for n in changed if n in self._closed]
        if not both:
            # Search for far objects only now, when there is a reason.
            seen = {id(x) for root in closed_over(self._fn) for x in _objects_of(root)}
            both = [n for n in changed if id(self._body.outer[n]) in seen]
        return _both(self._body.outer[both[0]], frame) if both else None

    def _check_caller(self) -> None:
        frame = self._body.frame
        changed = self._caller.changed()
        given = [i for i in changed if self._owners[i] is None]
        # Objects of the body must not stay in older containers.
        mine = any(_is_of(x, frame) for i in changed for x in _held(self._kept[i]))
        if given or mine or not self._runs_once:
            self.restore()
            at = (given or list(changed))[0]
            raise _both(self._kept[at], frame) if given else _changed(self._owners[at], frame)


def _is_of(x: Any, frame: Frame) -> bool:
    """Whether `x` is a tracer of this body, or a module or a Ref that was made in it."""
    if isinstance(x, Tracer):
        return x._trace is frame.trace()
    return is_identity(x) and x._frame is frame


def closed_over(fn: Callable[..., Any], *, only_near: bool = False) -> list[Any]:
    """The modules, the Refs and the containers of these that the search from a function finds."""
    found = Graph([("", fn, False)], only_near=only_near).edges
    return [edge.candidate for edge in found if edge.candidate is not None]


def _containers_of(root: Any) -> list[tuple[Any, list[Any]]]:
    """The lists and dicts below a root: pairs of a module or a container and its list of them."""
    if type(root) is Ref:
        return []
    if isinstance(root, Node):
        try:
            return [(root, snapshot(root).containers)]
        except RefError:
            # It cannot be an argument either, and using it raises an error with the reason.
            return []
    own = [(root, containers(root))]
    nodes = [x for x in opened.leaves(root) if isinstance(x, Node)]
    return [*own, *(pair for x in nodes for pair in _containers_of(x))]


def _held(content: Any) -> list[Any]:
    """The modules, the Refs and the arrays in a list or a dict."""
    try:
        # A list may hold itself, which JAX's own flattening cannot handle.
        found = walk(content)
        return [*found.objects, *found.leaves]
    except RefError:
        return opened.leaves(content)


def _objects_of(root: Any) -> list[Any]:
    try:
        return walk(root).objects
    except RefError:
        return [root]


def _a(x: Any) -> str:
    name = type(x).__name__
    return f"a {name}" if isinstance(x, Node | Ref) else f"a {name} of a module"


def _both(x: Any, frame: Frame) -> StructureError:
    what = _a(x)
    return StructureError(
        f"{what[0].upper()}{what[1:]} was changed in {frame.name}: an attribute, a list or a dict of it. "
        f"It is an argument, and the function also closes over it, where the change does not show. Use only "
        f"the argument."
    )


def _given_again(x: Any, holder: Any, frame: Frame) -> StructureError:
    return StructureError(
        f"In {frame.name}, {_a(holder)} that is an argument was given {_a(x)} that the function closes "
        f"over. The arguments hold it already. Inside, the two are different objects, so it would count "
        f"twice. Take it from the argument."
    )


def _changed(root: Any, frame: Frame) -> StructureError:
    if not isinstance(root, Node):
        return StructureError(
            f"The body of {frame.name} changed a {type(root).__name__} that it closes over. That would "
            f"happen once, while tracing, and not in each step. Return the modules, or keep them in an "
            f"attribute of a module that is an argument. Keep values that change in a Ref (nnx.Ref)."
        )
    return StructureError(
        f"A {type(root).__name__} that {frame.name} closes over was changed inside it: something was "
        f"put into its lists, its dicts or its __dict__, or taken out. That would happen once, while "
        f"tracing. Pass the module as an argument, so that such changes propagate, or keep what changes "
        f"in a Ref (nnx.Ref)."
    )


def check_found(frame: Frame) -> None:
    """Raise if the body changed a closed-over object in place, where nothing could stop it."""
    for met in frame.met():
        owner = met.owner
        if frame.constants and met.was_written(frame):
            # A list or a dict in a constant was changed in place. This raises the error of a write.
            writable(met.ref, owner)
        # An object that was made in the body may hold the body's tracers.
        if met.ref._frame is frame or not isinstance(owner, Node) or owner._frame is frame:
            continue
        if any(
            isinstance(x, Tracer) and x._trace is frame.trace() for x in snapshot(owner).leaves()
        ):
            raise StructureError(
                f"The body of {frame.name} put an array into a list, a dict or the __dict__ of a "
                f"{type(owner).__name__} that it closes over. The array is a tracer, which means nothing "
                f"after the call. Pass the module as an argument, so that such changes propagate, or "
                f"keep the array in a Ref (nnx.Ref)."
            )


def check_arguments(frame: Frame, arguments: Any, roots: tuple[Any, ...]) -> None:
    """Raise if a list or a dict of modules among the arguments was changed."""
    # Such a container is a value for JAX, and the body had a copy of it.
    now = [x for x in opened.leaves(arguments) if is_identity(x)]
    if len(now) != len(roots) or not all(map(is_, now, roots)):
        raise StructureError(
            f"A list, dict or tuple of modules or Refs that is an argument of {frame.name} was "
            f"changed inside it, and the change would be lost: such a container is a value there. "
            f"Keep it in an attribute of a module, where changes propagate, or return it."
        )
