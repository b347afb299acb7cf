"""Guards: the steps from a function to its closed-over objects, and a check that they are unchanged."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import repeat
from operator import call as call_it
from operator import is_
from typing import Any

from nnx.transforms.looking import Edge
from nnx.transforms.objects import content, is_container, is_data, is_module
from nnx.transforms.steps import ABSENT
from refx import Node, RefError
from refx.snapshot import snapshot

__all__: list[str] = []


class Guards:
    """The roots from one search, and the steps to them. This object is replaced, never changed.

    The lists are parallel, for `map`: `dicts`, `keys` and their `values`, or functions in `calls` and
    their `results`. `dict_roots` and `call_roots` have the number of the root at the end of each step,
    or -1.
    """

    def __init__(self, roots: tuple[Any, ...]):
        self.roots = roots
        self.dicts: list[dict[Any, Any]] = []
        self.keys: list[Any] = []
        self.values: list[Any] = []
        self.dict_roots: list[int] = []
        self.calls: list[Callable[[], Any]] = []
        self.results: list[Any] = []
        self.call_roots: list[int] = []
        self.contents: list[tuple[Any, list[Any]]] = []
        # The data containers on which the program depends, with their paths.
        self.data: list[tuple[tuple[Any, ...], Any, list[Any]]] = []
        # Attribute dicts whose names we check, because an added name hides one of the class.
        self.names: list[tuple[dict[Any, Any], list[Any]]] = []
        # Whether there is nothing to check.
        self.idle = False
        # The shape of the result, which tells programs apart, and the paths of the roots.
        self.shape: tuple[Any, Any, tuple[Any, ...]] = ((), (), ())
        self.paths: tuple[tuple[Any, ...], ...] = ()

    def watch(self, edge: Edge, root: int) -> None:
        """Watch one step, which leads to the root with that number, or (-1) to none."""
        if edge.way is None:
            return
        where, how = edge.way
        if where is None:
            self.calls.append(how)
            self.results.append(edge.value)
            self.call_roots.append(root)
        else:
            self.dicts.append(where)
            self.keys.append(how)
            self.values.append(edge.value)
            self.dict_roots.append(root)

    def stands(self) -> bool:
        """Whether every step still leads to the same object."""
        return (
            (
                not self.dicts
                or all(map(is_, map(_get, self.dicts, self.keys, repeat(ABSENT)), self.values))
            )
            and (not self.calls or all(map(is_, map(call_it, self.calls), self.results)))
            and (not self.contents or all(holds(x, items) for x, items in self.contents))
            and (not self.data or all(holds(x, items) for _, x, items in self.data))
            and (not self.names or all(has_names(x, names) for x, names in self.names))
        )

    def moved(self) -> Guards | None:
        """The new guards if names were only bound to similar modules; None if more has changed."""
        if not all(holds(x, items) for _, x, items in self.data):
            return None
        contents = list(self.contents)
        for i, (x, items) in enumerate(contents):
            if not holds(x, items):
                # No program depends on this data container, so a change in it does not matter.
                if not (is_container(x) and is_data(x) and is_data(items)):
                    return None
                contents[i] = x, content(x)
        if not all(has_names(x, names) for x, names in self.names):
            return None
        roots = list(self.roots)
        new = Guards(())
        new.__dict__.update(self.__dict__)
        values = list(map(_get, self.dicts, self.keys, repeat(ABSENT)))
        results = list(map(call_it, self.calls))
        for was, now, positions in (
            (self.values, values, self.dict_roots),
            (self.results, results, self.call_roots),
        ):
            for a, b, i in zip(was, now, positions, strict=True):
                if a is b:
                    continue
                if i < 0 or not _alike(a, b):
                    return None
                roots[i] = b
        new.values, new.results, new.roots = values, results, tuple(roots)
        new.contents = contents
        return new


_get = dict.get


def holds(x: Any, items: list[Any]) -> bool:
    now = content(x)
    return len(now) == len(items) and all(map(is_, now, items))


def has_names(x: dict[Any, Any], names: list[Any]) -> bool:
    return len(x) == len(names) and all(map(is_, x, names))


def _alike(a: Any, b: Any) -> bool:
    if not (is_module(a) and is_module(b)):
        return False
    try:
        return snapshot(a).dagdef is snapshot(b).dagdef
    except RefError:
        return False


def reference(x: Any) -> Callable[[], Any]:
    """A weak reference to `x`, if its type allows one."""
    try:
        return weakref.ref(x)
    except TypeError:
        return lambda: x


class FarStructure:
    """Watches the structure of a far module: a call returns the same object until the structure changes."""

    def __init__(self, module: Any):
        self._get = reference(module)
        self._now: Any = None
        self._dagdef: Any = None
        self._arrays: list[Callable[[], Any]] = []

    def __call__(self) -> Any:
        module = self._get()
        if not isinstance(module, Node):
            return None
        try:
            snap = snapshot(module)
        except RefError:
            return None
        arrays = snap.leaves()
        known = self._dagdef is snap.dagdef and len(arrays) == len(self._arrays)
        if not (known and all(map(is_, map(call_it, self._arrays), arrays))):
            self._dagdef, self._arrays = snap.dagdef, list(map(reference, arrays))
            self._now = object() if arrays else snap.dagdef
        return self._now


order_of_bases: Callable[[type], Any] = type.__dict__["__mro__"].__get__
