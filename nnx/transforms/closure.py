"""The closure of a function: the modules and Refs that it can reach without an argument.

A search finds them before anything is traced (see `looking`). Near objects (in cells, globals, helpers,
attributes of objects) are inputs from the start. Objects further away, or in code that the arguments
bring, become inputs only after a trace has read them. That costs one extra trace. We watch the steps
that lead to each input, so the next call notices when a name is bound to another module. Reading a Ref
that the search cannot find is an error.
"""

from __future__ import annotations

import contextvars
import functools
import threading
import types
import warnings
from collections.abc import Callable, Set
from operator import is_
from typing import Any

from nnx.transforms.guards import FarStructure, Guards, holds, order_of_bases, reference
from nnx.transforms.looking import Edge, Graph, insides
from nnx.transforms.objects import (
    ARRAYS,
    SMALL,
    containers,
    content,
    data_in,
    has_no_names,
    is_container,
    is_data,
    is_holder,
    is_module,
    is_plain,
    is_user_object,
    is_value,
)
from nnx.transforms.steps import ABSENT, DEFAULTS, attribute_dicts
from refx import ClosureError, Node, RefError
from refx.describe import describe
from refx.partition import dotted
from refx.snapshot import Snapshot, snapshot
from refx.static import NESTED, Static, exact
from refx.walk import walk

__all__: list[str] = []

# Held during a search or an update of the records. Both are rare, and run no user code.
_lock = threading.RLock()
# New arguments could fill these caches without end.
_MOST = 512
# How many programs that differ only in an array are made before a warning.
_MANY = 16


class Closure:
    """The roots that one function closes over.

    Invariant: while `roots()` returns roots of the same structure, a program that was traced for them
    is right, because the same steps lead to everything that the function read.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        starts: Callable[[], list[tuple[Any, Any, bool]]] | None = None,
    ):
        """Search from `fn`, or from the current result of `starts`, as for `Graph`."""
        self._origin = starts or (lambda: [("", fn, False)])
        self._state: Guards | None = None
        # Classes and static values in the arguments, by id: code that the function may run.
        self._starts: dict[int, tuple[Any, Any]] = {}
        # The paths of far roots that were read; and of plain values that may become modules.
        self._places: set[tuple[Any, ...]] = set()
        self._hopeful: set[tuple[Any, ...]] = set()
        # The paths of data containers that a trace itself changed.
        self._noted: set[tuple[Any, ...]] = set()
        # The Refs that the last trace read although they were not inputs.
        self._added: set[int] = set()
        # Numbers that tell programs apart if their roots are the same but the steps to them differ.
        self._tokens: dict[Any, int] = {}
        self._next_token = 0
        # The arrays and containers that are constants, by path, each with a number.
        self._constants: dict[tuple[Any, ...], tuple[list[Callable[[], Any]], int]] = {}
        self._next_constant = 0
        self._traced = False
        # Whether a trace went through a method that no code names.
        self._all_methods = False
        self._arrays: dict[Any, list[Any]] = {}
        # Snapshots of the roots that are not modules. A module keeps its own.
        self._kept: dict[int, tuple[Any, Snapshot]] = {}

    def forget(self, *, only_roots: bool = False) -> None:
        """Forget the result of the search (with `only_roots`, only if it has roots). It runs again later."""
        state = self._state
        if state is not None and (state.roots or not only_roots):
            with _lock:
                self._state = None
                self._kept = {}

    def snapshot(self, root: Any) -> Snapshot:
        """The snapshot of one of the roots."""
        if not isinstance(root, list | tuple | dict):
            return snapshot(root)
        kept = self._kept.get(id(root))
        if kept is None or kept[0] is not root or not kept[1].valid():
            kept = self._kept[id(root)] = (root, Snapshot(root, keep=True))
        return kept[1]

    def roots(self) -> tuple[Any, ...]:
        """The current roots."""
        state = self._state
        if state is None or not (state.idle or state.stands()):
            with _lock:
                moved = state.moved() if state is not None else None
                state = self._state = moved or self._look()
        return state.roots

    def found(self) -> tuple[Any, tuple[tuple[Any, ...], ...]]:
        """The plain values that the function reads with their paths, and the paths of its roots."""
        state = self._state
        return (state.shape[2], state.paths) if state is not None else ((), ())

    def meet(self, layout: Any) -> bool:
        """Note the code that the arguments of a new layout bring. Returns whether there is any."""
        self._warn_of_arrays(layout)
        found = insides(layout.dagdef, layout.form.treedef, layout.statics)
        with _lock:
            # Before the first trace no program is bound to a token.
            first, self._traced = not self._traced, True
            new = {id(x): (name, x) for name, x in found if id(x) not in self._starts}
            if not new:
                return False
            if first:
                self._tokens, self._next_token = {}, 0
            self._starts |= new
            while len(self._starts) > _MOST:
                del self._starts[next(iter(self._starts))]
            self._state = None
        return True

    def traced(self) -> None:
        """Note the data containers that the trace itself has changed."""
        state = self._state
        if state is None or all(holds(x, items) for _, x, items in state.data):
            return
        with _lock:
            self._noted |= {path for path, x, items in state.data if not holds(x, items)}
            self._state = None

    def add(self, call: Any, name: str) -> None:
        """Turn the Refs that a trace read into inputs.

        Raises:
          ClosureError: the search does not find a Ref, so a change of it would go unnoticed.
        """
        with _lock:
            missing = {id(ref): ref for ref, _ in call.found}
            known = len(self._places)
            reached = self._reach(missing)
            if not self._all_methods and not reached >= missing.keys():
                # A library or a computed name led to a method whose name appears nowhere in the code.
                self._all_methods = True
                reached = self._reach(missing)
            lost = [(ref, root) for ref, root in call.found if id(ref) not in reached]
            if len(self._places) == known and self._added == set(missing):
                # It was met before and is now an input, so another trace would change nothing.
                lost = call.found
            self._added = set(missing)
            # A program that was traced without these must not be used for calls with them.
            self._tokens = {}
            self._state = None
        if lost:
            ref, root = lost[0]
            raise ClosureError(_unreachable(ref, root, name))

    def _reach(self, missing: dict[int, Any]) -> set[int]:
        """The ids of all objects that the search finds. Paths to missing Refs are added to the inputs."""
        held: dict[int, Set[int]] = {}
        for edge in self._graph().edges:
            if edge.candidate is None:
                continue
            ids = held.get(id(edge.candidate))
            if ids is None:
                ids = held[id(edge.candidate)] = _objects(edge.candidate)
            if not ids.isdisjoint(missing):
                self._places.add(edge.path)
        return set().union(*held.values())

    def _graph(self) -> Graph:
        starts = [(name, x, True) for name, x in self._starts.values()]
        expected = self._places | self._hopeful
        return Graph([*self._origin(), *starts], expected, all_methods=self._all_methods)

    def _choose(self, edges: list[Edge]) -> list[int]:
        """The numbers of the steps that lead to roots."""
        found = [n for n, e in enumerate(edges) if e.candidate is not None]
        sure = {n for n in found if not edges[n].far or edges[n].path in self._places}
        known = {i for n in sure for i in _objects(edges[n].candidate)}
        # Another path to an existing input counts too, so a change on either path is noticed.
        return [n for n in found if n in sure or not known.isdisjoint(_objects(edges[n].candidate))]

    def _look(self) -> Guards:
        graph = self._graph()
        edges = graph.edges
        chosen = self._choose(edges)
        selected = {n: i for i, n in enumerate(chosen)}
        if len(self._places) > _MOST:
            self._places &= {edges[n].path for n in selected}
        any_way = _sources(edges, {e.source for e in edges if e.candidate is not None})
        to_roots = _sources(edges, {edges[n].source for n in selected})
        near = {n for n in range(len(graph.objects)) if not graph.is_far(n)}
        watched = near | to_roots
        state = Guards(tuple(edges[n].candidate for n in selected))
        self._kept = {}
        hopeful = {e.path for e in edges if e.hopeful}
        shape: list[Any] = []
        read: list[Any] = []
        counted: set[int] = set()
        for n, edge in enumerate(edges):
            source = graph.objects[edge.source]
            by_name = type(source) in (types.FunctionType, types.ModuleType)
            counts = n not in selected and _counts(edge, source, graph, self._noted)
            if edge.candidate is not None and n not in selected and _names(edge, source, graph):
                # The function did not read its Refs, but it may have read its settings.
                structure = FarStructure(edge.candidate)
                state.calls.append(structure)
                state.results.append(structure())
                state.call_roots.append(-1)
                read.append((edge.path, structure()))
                counted.add(edge.source)
                counts = True
            elif counts and edge.key not in DEFAULTS:
                read.append((edge.path, self._constant(edge)))
                state.data += [(edge.path, x, content(x)) for x in data_in(edge.value) or ()]
                if edge.way is None and edge.data and edge.source not in counted:
                    state.data.append((edge.path[:-1], source, content(source)))
                counted.add(edge.source)
            if (
                (edge.source in watched and not edge.data)
                or (by_name and (edge.hopeful or edge.path in self._hopeful))
                or counts
            ):
                state.watch(edge, selected.get(n, -1))
                if edge.candidate is not None or edge.target in any_way:
                    end = selected.get(n, -1) if edge.target is None else edge.target
                    shape.append((edge.source, edge.key, n in selected, end))
            if n in selected and not is_module(edge.candidate):
                state.contents += [(c, content(c)) for c in containers(edge.candidate)]
        self._hopeful = hopeful | {e.path for e in edges if e.path in self._hopeful}
        for n in sorted(watched | counted):
            x = graph.objects[n]
            if is_holder(x):
                items = content(x)
                if n in any_way or len(items) <= SMALL:
                    state.contents.append((x, items))
            elif n in near or n in to_roots:
                state.names += [(d, list(d)) for d in attribute_dicts(x)]
        for x in (graph.objects[n] for n in sorted(watched | counted)):
            if issubclass(type(x), type) and not is_plain(x):
                # `A.__bases__ = ...` makes another order of classes.
                state.calls.append(functools.partial(order_of_bases, x))
                state.results.append(order_of_bases(x))
                state.call_roots.append(-1)
        state.idle = not (state.dicts or state.calls or state.contents or state.data or state.names)
        numbers = {n: i for i, n in enumerate(sorted({n for n, *_ in shape}))}
        kinds = tuple(_kind(graph.objects[n]) for n in numbers)
        steps = tuple(
            (numbers[n], key, is_root, end if is_root else numbers.get(end, -1))
            for n, key, is_root, end in shape
        )
        state.shape = (kinds, steps, tuple(read))
        state.paths = tuple(edges[n].path for n in selected)
        token = self._token(state.shape)
        if token:
            # Add the token as a constant root, which makes another layout for the same roots.
            state.roots = (*state.roots, [token])
        return state

    def _token(self, shape: Any) -> int:
        token = self._tokens.get(shape)
        if token is None:
            if len(self._tokens) >= _MOST:
                self._tokens = {}
            token = self._tokens[shape] = self._next_token
            self._next_token += 1
        return token

    def _constant(self, edge: Edge) -> Any:
        """The key of a value that a step leads to and that is not a module."""
        value = edge.value
        if value is ABSENT or is_value(value) or issubclass(type(value), type):
            return Static(value, NESTED)
        held = data_in(value)
        parts = [x for c in held or () for x in content(c) if isinstance(x, ARRAYS)]
        if held is not None and not parts:
            return exact(value, [], NESTED)
        if is_user_object(value) and not is_data(value):
            # Its class is enough: its content has its own steps.
            return type(value)
        # Use a number, so that nothing from an earlier call is kept alive.
        parts = parts or [value]
        known = self._constants.get(edge.path)
        was = [get() for get in known[0]] if known is not None else []
        if known is None or len(was) != len(parts) or not all(map(is_, was, parts)):
            self._next_constant += 1
            if len(self._constants) >= _MOST:
                self._constants = {}
            known = self._constants[edge.path] = (
                list(map(reference, parts)),
                self._next_constant,
            )
        if held is not None:
            return type(value), len(value), known[1]
        return known[1]

    def _warn_of_arrays(self, layout: Any) -> None:
        """Warn if a closed-over array, which is a constant, keeps changing."""
        if not layout.constants:
            return
        if len(self._arrays) >= _MOST:
            self._arrays = {}
        seen = self._arrays.setdefault(layout.dagdef, [0, ()])
        seen[0] += 1
        was, seen[1] = seen[1], layout.constants
        if seen[0] != _MANY or len(was) != len(layout.constants):
            return
        changed = [i for i, (a, b) in enumerate(zip(was, layout.constants, strict=True)) if a != b]
        paths = layout.dagdef.leaf_paths
        offset = len(paths) - len(layout.constants)
        if changed and offset >= 0:
            warnings.warn(
                f"{dotted(paths[offset + changed[0]][1:])!r}, a plain array of a module that a "
                f"compiled function closes over, has changed {_MANY} times. It is a constant "
                f"of the program, so each new array costs a compilation. Pass the module as an "
                f"argument, or make the array a Ref (nnx.ref(...) in its class).",
                stacklevel=5,
            )


def _objects(root: Any) -> Set[int]:
    try:
        if isinstance(root, Node):
            return snapshot(root).identities
        return {id(x) for x in walk(root).objects}
    except RefError:
        return {id(root)}


def _sources(edges: list[Edge], found: set[int]) -> set[int]:
    """The vertices from which one of `found` can be reached, including those in `found`."""
    into: dict[int, list[int]] = {}
    for edge in edges:
        if edge.target is not None:
            into.setdefault(edge.target, []).append(edge.source)
    found = set(found)
    todo = list(found)
    while todo:
        for n in into.get(todo.pop(), ()):
            if n not in found:
                found.add(n)
                todo.append(n)
    return found


def _tells(cls: type, key: Any) -> bool:
    """Whether an attribute of a class belongs to a module class, which counts its own changes."""
    return any(isinstance(b, type(Node)) and b.__qualname__ == key[0] for b in cls.__mro__)


def _counts(edge: Edge, source: Any, graph: Graph, noted: set[tuple[Any, ...]]) -> bool:
    """Whether the program depends on the value of this step although it is not a module.

    It depends on functions, classes and objects, wherever they are bound. It depends on numbers, strings
    and arrays in defaults, in partials, and in variables and attributes that no reached code sets. It
    depends on data containers, unless reached code puts something into them.
    """
    default = type(edge.key) is tuple and edge.key[0] == "default"
    if edge.candidate is not None:
        return False
    kind = type(source)
    if edge.way is None and not default:
        if edge.data and noted.isdisjoint((edge.path, edge.path[:-1])):
            # A data item in a container with other objects, unless code puts something there.
            filled = any([part in graph.filled for part in edge.path if type(part) is str])
            return not filled and graph.is_read(edge.source)
        # A function, a class or an object in a list or a dict, which is itself watched as a whole.
        return is_holder(source) and edge.target is not None and not is_container(edge.value)
    if issubclass(kind, (functools.partial, contextvars.ContextVar)):
        return True
    name = edge.key[-1] if type(edge.key) is tuple else edge.key
    if is_container(edge.value) and not default and edge.key not in DEFAULTS:
        known = name in graph.names or graph.any_attribute or has_no_names(source)
        held = known and name not in graph.filled | graph.stored and edge.path not in noted
        return held and (len(edge.value) > SMALL or data_in(edge.value) is not None)
    leads = edge.target is not None and not is_container(edge.value)
    set_by_no_code = edge.data and name not in graph.stored
    if kind is types.FunctionType:
        return leads or edge.key in DEFAULTS or (edge.data and default) or set_by_no_code
    if edge.key == "type":
        return leads
    if kind is types.ModuleType:
        return leads or set_by_no_code
    if issubclass(kind, type) and _tells(source, edge.key):
        return False
    # Python calls methods such as `__call__` and `__getitem__` itself, so no code names them.
    named = name in graph.names or graph.any_attribute
    if not named and not (leads and _is_special(name)):
        return False
    return leads or set_by_no_code


def _names(edge: Edge, source: Any, graph: Graph) -> bool:
    """Whether some code names this step, or can take it without a name because it is an item."""
    name = edge.key[-1] if type(edge.key) is tuple else edge.key
    return is_container(source) or graph.any_attribute or name in graph.names


def _is_special(name: Any) -> bool:
    special = type(name) is str and name.startswith("__") and name.endswith("__")
    return special and name != "__wrapped__"


def _kind(x: Any) -> Any:
    return x.__code__ if type(x) is types.FunctionType else type(x)


def _unreachable(ref: Any, root: Any, name: str) -> str:
    owner = root if root is not ref else None
    return (
        f"{describe(ref, owner)} was read by closure in {name}, but nnx cannot find it from the "
        f"function's variables, globals, imports, or the attributes and items of these. If you replaced "
        f"it, the compiled program would still use the old one. Pass the module to the function as an "
        f"argument, or bind it to a variable that the function uses."
    )
