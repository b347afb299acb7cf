"""What a function closes over: the modules and Refs that it can reach without an argument.

They are found by looking, before anything is traced: in the closure's cells, in the globals that
its code loads, in defaults, and in the functions and objects found there, one step at a time. What
looking cannot find (an object deep inside another) is found by reading, at the price of one more
trace: see `Lift`. A name that is bound to another module later is noticed at the next call.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

from refx import RefError
from refx.node import is_identity
from refx.snapshot import Snapshot, snapshot
from refx.structure import scan

__all__: list[str] = []

# Code of these has no business with a user's modules, and following it would take long.
_LIBRARIES = frozenset(
    {"jax", "jaxlib", "numpy", "optax", "nnx", "refx", "builtins", "functools", "typing"}
)


class Closure:
    """The roots that one function closes over.

    Invariant: between two calls of `look`, `roots()` gives the same objects in the same order,
    as long as every name that led to one still leads to it.
    """

    def __init__(self, fn: Callable[..., Any]):
        self._fn = fn
        self._met: dict[int, Any] = {}
        self._roots: tuple[Any, ...] | None = None
        # Pairs of a way to get what a name is bound to, and what it was bound to.
        self._watched: list[tuple[Callable[[], Any], Any]] = []
        # The snapshots of roots that are no modules and so do not keep one themselves.
        self._kept: dict[int, tuple[Any, Snapshot]] = {}

    def snapshot(self, root: Any) -> Snapshot:
        """The snapshot of one of the roots."""
        if not isinstance(root, list | tuple | dict):
            return snapshot(root)
        kept = self._kept.get(id(root))
        if kept is None or kept[0] is not root or not kept[1].valid():
            kept = self._kept[id(root)] = (root, snapshot(root))
        return kept[1]

    def roots(self) -> tuple[Any, ...]:
        """The roots, as they are now."""
        if self._roots is None or any(get() is not was for get, was in self._watched):
            self._look()
        return self._roots or ()

    def add(self, found: Iterable[Any]) -> None:
        """Take roots that were met while tracing, too."""
        for x in found:
            self._met[id(x)] = x
        self._roots = None

    def _look(self) -> None:
        self._watched = []
        self._kept = {}
        found = _look_into(self._fn, self._watched)
        here = {id(x) for x in found}
        # One root for each name that leads to it, in order: names that change places are noticed.
        self._roots = (*found, *(x for x in self._met.values() if id(x) not in here))


# How many functions and objects a look goes through, at most.
_MOST = 2000


def _look_into(x: Any, watched: list[tuple[Callable[[], Any], Any]]) -> list[Any]:
    found: list[Any] = []
    todo = [x]
    seen: set[int] = set()
    while todo and len(seen) < _MOST:
        x = todo.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        for get, value in _names(x):
            identities = _identities(value)
            if identities or value is None or not _is_plain(value):
                watched.append((get, value))
            found += _as_roots(value, identities)
            for content in _containers(value) if identities else ():
                watched.append(
                    (functools.partial(_unchanged, content, list(_values(content))), True)
                )
            if not identities:
                todo.append(value)
    return found


def _as_roots(value: Any, identities: list[Any]) -> list[Any]:
    """A container as one root, so that its keys and its nesting count; else what it holds."""
    if identities and isinstance(value, list | tuple | dict):
        try:
            scan(value)
        except RefError:
            return identities
        return [value]
    return identities


def _is_plain(x: Any) -> bool:
    """Whether nothing can be reached from `x`."""
    return isinstance(x, (int | float | complex | str | bytes | types.ModuleType, type))


def _containers(x: Any) -> list[Any]:
    """The lists and dicts in `x`, itself included."""
    found: list[Any] = []
    todo, seen = [x], set()
    while todo:
        at = todo.pop()
        if not isinstance(at, list | tuple | dict) or id(at) in seen:
            continue
        seen.add(id(at))
        if not isinstance(at, tuple):
            found.append(at)
        todo += list(at.values()) if isinstance(at, dict) else list(at)
    return found


def _values(x: list[Any] | dict[Any, Any]) -> list[Any]:
    return [*x, *x.values()] if isinstance(x, dict) else list(x)


def _unchanged(content: Any, items: list[Any]) -> bool:
    now = list(_values(content))
    return len(now) == len(items) and all(a is b for a, b in zip(now, items, strict=True))


def _identities(x: Any) -> list[Any]:
    """The modules and Refs that are `x`, or that plain lists, tuples and dicts in it hold."""
    found: list[Any] = []
    todo, seen = [x], set()
    while todo:
        at = todo.pop()
        if is_identity(at):
            found.append(at)
        elif isinstance(at, list | tuple | dict) and id(at) not in seen:
            seen.add(id(at))
            todo += reversed(list(at.values() if isinstance(at, dict) else at))
        elif isinstance(at, types.MethodType):
            todo.append(at.__self__)
    return found


def _names(x: Any) -> Iterable[tuple[Callable[[], Any], Any]]:
    """What can be reached from `x` in one step, each with a way to look again."""
    if isinstance(x, types.FunctionType):
        if x.__module__ is not None and x.__module__.split(".")[0] in _LIBRARIES:
            return
        for cell in x.__closure__ or ():
            try:
                yield functools.partial(getattr, cell, "cell_contents", None), cell.cell_contents
            except ValueError:
                continue  # a variable that is not bound yet
        scope = x.__globals__
        for name in _globals_of(x.__code__):
            if name in scope:
                yield functools.partial(scope.get, name), scope[name]
        for default in (*(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()):
            yield functools.partial(_identity, default), default
    elif isinstance(x, types.MethodType):
        yield functools.partial(_identity, x.__func__), x.__func__
        yield functools.partial(_identity, x.__self__), x.__self__
    elif isinstance(x, functools.partial):
        for part in (x.func, *x.args, *x.keywords.values()):
            yield functools.partial(_identity, part), part
    elif hasattr(x, "__wrapped__") and callable(x):
        inner: Any = getattr(x, "__wrapped__")  # noqa: B009
        yield functools.partial(_identity, inner), inner
    elif isinstance(x, type) or isinstance(getattr(x, "__dict__", None), dict):
        home = x if isinstance(x, type) else type(x)
        if isinstance(x, types.ModuleType) or home.__module__.split(".")[0] in _LIBRARIES:
            return
        for name, value in list(vars(x).items()):
            if not name.startswith("__"):
                yield functools.partial(_attribute, x, name), value


def _attribute(x: Any, name: str) -> Any:
    return vars(x).get(name)


def _identity(x: Any) -> Any:
    return x


@functools.lru_cache(maxsize=4096)
def _globals_of(code: types.CodeType) -> tuple[str, ...]:
    names: dict[str, None] = {}
    todo = [code]
    while todo:
        at = todo.pop()
        for step in dis.get_instructions(at):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                names[step.argval] = None
        todo += [c for c in at.co_consts if isinstance(c, types.CodeType)]
    return tuple(names)
