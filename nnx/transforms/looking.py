"""The search for everything that a function can reach without an argument, as a graph of steps.

It never calls user code (no property, no `__getattr__`). It takes functions apart into cells, defaults
and the globals that their code loads, and objects into their dicts, slots and classes. It does not enter
libraries or plain data.
"""

from __future__ import annotations

import collections
import operator
import sys
import types
from collections.abc import Iterable, Iterator, Set
from typing import Any, NamedTuple

import jax

from nnx.transforms.names import names_of
from nnx.transforms.objects import (
    PYTREES,
    SMALL,
    can_be_walked,
    has_no_names,
    holds_modules,
    home_of,
    is_container,
    is_data,
    is_library,
    is_module,
    is_plain,
    is_plain_container,
)
from nnx.transforms.steps import ABSENT, CODE, Step, class_dict, of_class, of_closure, of_object
from refx.dagdef import DagDef, NodeDef, Tree
from refx.static import Static

__all__: list[str] = []
# The largest number of functions and objects in one search.
_MOST = 4000


# Code that uses one of these may call a method whose name appears nowhere.
_BY_NAME = frozenset({"getattr", "attrgetter", "methodcaller", "vars", "__dict__", "dir"})


# Attributes that these methods set are set when an object is made.
_MAKING = ("__init__", "__post_init__", "__new__")
# These methods show, compare or copy an object. They often read all of its attributes, and a program rarely
# depends on what they return.
_SHOWING = frozenset(
    {"__repr__", "__str__", "__format__", "__eq__", "__ne__", "__hash__", "__dir__", "__reduce__"}
    | {"__reduce_ex__", "__getstate__", "__setstate__", "__copy__", "__deepcopy__"}
)
# These methods set attributes for their callers. If the function itself calls one, its trace shows it.
_SETTING = frozenset(
    {"__setitem__", "__delitem__", "__setattr__", "__delattr__", "__set__", "__delete__"}
)


class Edge(NamedTuple):
    """One step: from the vertex with the number `source`, by the name `key`, to `value`.

    `way` tells how to take the step again: a dict and a key, or None and a function. It is None if the
    content of the source is watched as a whole. `target` is the number of the vertex at its end. If the
    step leads to a module, a Ref or a container of these, `candidate` is that object. A step is `far` if
    most functions do not use it, so its end becomes an input only after it was read.
    """

    source: int
    key: Any
    value: Any
    way: tuple[Any, Any] | None
    target: int | None
    candidate: Any
    path: tuple[Any, ...]
    far: bool
    # Whether the value is None, a bool or absent, but may later become a module.
    hopeful: bool
    # Whether the value is data, a constant of the program, which is compared by its content.
    data: bool


class Graph:
    """Everything that can be reached from some objects, in a fixed order."""

    def __init__(
        self,
        starts: Iterable[tuple[Any, Any, bool]],
        expected: Set[tuple[Any, ...]] = frozenset(),
        *,
        only_near: bool = False,
        all_methods: bool = False,
    ):
        """Search from `starts`, triples of a name, an object and whether it is far.

        Unbound names in Python modules are recorded too, if their paths are in `expected`. With
        `only_near`, the search takes no far steps. With `all_methods`, it also looks into methods that
        no code names.
        """
        self._all_methods = all_methods
        self._classes: dict[int, set[Any]] = {}
        self._expected_in: dict[tuple[Any, ...], set[Any]] = {}
        for *path, name in expected:
            self._expected_in.setdefault(tuple(path), set()).add(name)
        self._only_near = only_near
        self.edges: list[Edge] = []
        self.objects: list[Any] = []
        self._paths: list[tuple[Any, ...]] = []
        self._numbers: dict[int, int] = {}
        self._near: collections.deque[int] = collections.deque()
        self._far: collections.deque[int] = collections.deque()
        self._is_far: list[bool] = []
        # The attribute names that code loads. In a user's Python module, only these are followed.
        self.names: set[str] = set()
        # Whether some code may read attributes whose names appear nowhere.
        self.any_attribute = False
        # The names that code may pass to getattr or hasattr, so they may be missing.
        self.strings: set[str] = set()
        # The attribute names that code sets, except in constructors.
        self.stored: set[str] = set()
        # The names of variables and attributes whose content the code changes.
        self.filled: set[str] = set()
        self._modules: dict[int, set[str]] = {}
        # For each object, the step that found it first.
        self._first_steps: dict[int, tuple[int, Any, bool]] = {}
        for name, x, far in starts:
            self._vertex(x, (name,), far)
        while self._next() or self._in_modules() or self._in_classes():
            pass

    def is_read(self, number: int) -> bool:
        """Whether code names a container, or the outermost container that holds it."""
        while number in self._first_steps:
            number, key, is_item = self._first_steps[number]
            if not is_item:
                name = key[-1] if type(key) is tuple else key
                held = self.objects[number]
                return has_no_names(held) or self.any_attribute or name in self.names
        return True

    def is_far(self, number: int) -> bool:
        """Whether an object is far."""
        return self._is_far[number]

    def _next(self) -> bool:
        if not self._near and (not self._far or self._only_near):
            return False
        number = (self._near or self._far).popleft()
        x, far = self.objects[number], self._is_far[number]
        if type(x) is types.ModuleType:
            self._modules[number] = set()
            return True
        if issubclass(type(x), type):
            self._classes[number] = set()
            self._of_class_at(number)
            return True
        for key, way, value, step_far in self._steps(x):
            if not (step_far and self._only_near):
                self._edge(number, key, way, value, far or step_far)
        return True

    def _in_modules(self) -> bool:
        found = False
        if self._only_near:
            return False
        for number, done in list(self._modules.items()):
            content = vars(self.objects[number])
            path = self._paths[number]
            names = self.names - done
            bound = names & content.keys()
            new = sorted(bound | names & self.strings | names & self._expected_in.get(path, set()))
            done.update(new)
            for name in new:
                found = True
                self._edge(number, name, (content, name), content.get(name, ABSENT), True)
        return found

    def _in_classes(self) -> bool:
        return any([self._of_class_at(number) for number in list(self._classes)])

    def _of_class_at(self, number: int) -> bool:
        """Take the new steps from a class. Methods are new as soon as some code names them."""
        done, far, found = self._classes[number], self._is_far[number], False
        cls = self.objects[number]
        for key, way, value, step_far in of_class(cls):
            if key in done or (step_far and self._only_near):
                continue
            if type(value) in CODE and not self._is_named(cls, key[1]):
                continue
            done.add(key)
            found = True
            self._edge(number, key, way, value, far or step_far)
        return found

    def _is_named(self, cls: type, name: str) -> bool:
        """Whether a method may be called: by name, by Python, or by a library whose method it overrides."""
        if self._all_methods or name in self.names or name.startswith("__"):
            return True
        if not self.names.isdisjoint(_BY_NAME):
            return True
        bases = type.__dict__["__mro__"].__get__(cls)
        return any(name in class_dict(b) for b in bases if is_library(home_of(b)))

    def _edge(self, source: int, key: Any, way: Any, value: Any, far: bool) -> None:
        path = (*self._paths[source], key)
        candidate = target = None
        if value is ABSENT:
            self.edges.append(
                Edge(source, key, value, way, None, None, path, far, hopeful=True, data=False)
            )
            return
        default = type(key) is tuple and key[0] == "default"
        holder = self.objects[source]
        item = is_container(holder) and len(holder) <= SMALL
        data = (way is not None or default or item) and is_data(value)
        hopeful = value is None or type(value) is bool
        if is_module(value):
            candidate = value
        elif not hopeful and (is_plain(value) or is_plain_container(value, far)):
            if not data:
                return
        elif issubclass(type(value), PYTREES) and holds_modules(value) and can_be_walked(value):
            # A container is one root, so that its keys and its nesting count.
            candidate = value
        elif not hopeful:
            # A container may hold very many objects that are not modules.
            target = self._vertex(value, path, far or is_container(self.objects[source]))
            if target is not None:
                self._first_steps.setdefault(target, (source, key, way is None))
        self.edges.append(
            Edge(source, key, value, way, target, candidate, path, far, hopeful, data)
        )

    def _vertex(self, x: Any, path: tuple[Any, ...], far: bool) -> int | None:
        if type(x) in (operator.attrgetter, operator.methodcaller):
            self.any_attribute = True
        number = self._numbers.get(id(x))
        if number is None and len(self.objects) < _MOST:
            number = self._numbers[id(x)] = len(self.objects)
            self.objects.append(x)
            self._paths.append(path)
            self._is_far.append(far)
            (self._far if far else self._near).append(number)
        return number

    def _steps(self, x: Any) -> Iterator[Step]:
        """The steps from `x`; see `Step`."""
        return self._of_function(x) if type(x) is types.FunctionType else of_object(x)

    def _of_function(self, fn: Any) -> Iterator[Step]:
        scope = fn.__globals__
        library = is_library(scope.get("__name__"))
        for step in of_closure(fn):
            # A library's wrapper leads to the user's function, and its own settings do not change.
            if not library or not (step[2] is None or type(step[2]) is bool):
                yield step
        if library:
            return
        names = names_of(fn.__code__)
        self.names |= names.attributes
        if fn.__name__ not in _MAKING and fn.__name__ not in _SHOWING:
            self.any_attribute |= names.any_attribute
        self.strings.update(names.strings)
        if fn.__name__ not in _MAKING:
            self.stored |= names.stored
        if fn.__name__ not in _SETTING:
            self.filled |= names.filled
        for name in names.loaded:
            yield name, (scope, name), scope.get(name, ABSENT), False
        for name in names.strings:
            if name in scope:
                yield ("globals", name), (scope, name), scope[name], True
        package = scope.get("__package__") or ""
        for name in names.imported:
            for full in (name, f"{package}.{name}", package):
                if full in sys.modules:
                    yield ("import", full), (sys.modules, full), sys.modules[full], True


def insides(*structures: Any) -> list[tuple[Any, Any]]:
    """The classes and static values in DagDefs, treedefs and tuples of these: code that may run."""
    found: dict[int, tuple[Any, Any]] = {}
    todo = list(structures)
    while todo:
        x = todo.pop()
        kind = type(x)
        if kind is DagDef:
            nodes = [n for n in x.nodes if type(n) is NodeDef]
            todo += [x.root, *(n.kind for n in nodes), *(c for n in nodes for c in n.children)]
        elif kind is Tree:
            todo += [*x.children, x.treedef]
        elif kind is Static:
            todo.append(x.value)
        elif kind is jax.tree_util.PyTreeDef:
            todo += [x.node_data(), *x.children()]
        elif kind is tuple or kind is list:
            todo += x
        elif not is_plain(x) and not is_module(x):
            found[id(x)] = (_title(x), x)
    return list(found.values())


def _title(x: Any) -> Any:
    named = x if issubclass(type(x), (type, types.FunctionType)) else type(x)
    return "argument", type(x).__name__, named.__module__, named.__qualname__
