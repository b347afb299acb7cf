"""Check whether everything that a function read during its trace is still the same.

There are two mechanisms, each with one job:

- `Record` notes which code ran during the trace: every Python function, and every C function that
  user code called. It does not look into libraries that compute without hidden state (JAX, NumPy,
  ...).
- `Guard` notes what that code could read: the cells, globals and defaults of each function that
  ran, and from there every object with its contents. `stands()` compares them again.

Build systems argue the same way: if everything that was read is the same, then the same code runs
and reads the same things. So code that did not run does not matter, nor does anything that only
such code reads.

Some things are out of sight: code that ran but cannot be reached, a C function that may read the
outside world (`time.time`), an object whose content Python cannot show (a generator, a random
stream), an nnx module. A function that reads one of these has no guard and is traced at every call.
"""

from __future__ import annotations

import dis
import functools
import itertools
import sys
import types
from collections.abc import Callable, Iterable
from operator import is_
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from nnx.purify import contents
from nnx.purify.record import Record, home, is_pure, reads_arguments_only

__all__: list[str] = []

# These are compared by type and value, and everything else by identity.
_VALUES = frozenset({int, float, complex, bool, str, bytes})
# Entries of a class that programs do not read to compute something.
_INERT = frozenset(
    {"__abstractmethods__", "__annotate__", "__annotate_func__", "__annotations__", "_abc_impl"}
    | {"__annotations_cache__", "__dataclass_fields__", "__dataclass_params__", "__dict__"}
    | {"__doc__", "__module__", "__orig_bases__", "__parameters__", "__qualname__", "__weakref__"}
)
# The most references that a guard compares per call, and the most bytes of NumPy arrays.
_REFERENCES, _BYTES = 10_000, 1 << 20


class _OutOfSight(Exception):
    """The function read something whose changes cannot be seen."""


def guard_of(fn: Callable[..., Any], classes: Iterable[type], record: Record) -> Guard | None:
    """A guard for what `fn` read during its trace; None if some of it is out of sight.

    Args:
      fn: the function.
      classes: the classes that it reached through its arguments.
      record: the record of one trace.
    """
    try:
        return Guard([fn, *classes], record) if record.complete else None
    except _OutOfSight:
        return None


class Guard:
    """Everything that a function could read: a list of objects, each with its contents at that time."""

    def __init__(self, starts: list[Any], record: Record):
        self._looks: list[tuple[Callable[[Any], list[Any]], Any, list[Any]]] = []
        self._seen: dict[int, Any] = {}
        self._todo: list[Any] = []
        self._ran = {id(code) for code, _ in record.ran}
        self._known: dict[int, types.CodeType] = {}
        self._by_string = record.by_string
        self._left, self._bytes = _REFERENCES, _BYTES
        self._names = list(dict.fromkeys(n for code, _ in record.ran for n in code.co_names))
        self._follow(starts)
        # Changes whenever somebody registers a virtual subclass.
        self._look(contents.registrations, None)
        for code, scope in record.ran:
            names = _names_of(code)
            values = self._look(functools.partial(contents.globals_of, names.loaded), scope)
            self._follow(_read(values, names.loaded, names.appended))
            if names.imported:
                found = functools.partial(contents.modules_of, _candidates(names.imported, scope))
                self._follow(self._look(found, sys.modules))
        while self._todo:
            self._expand(self._todo.pop())
        if not all(id(code) in self._known for code, _ in record.ran):
            raise _OutOfSight
        del self._seen, self._todo, self._known, self._ran, self._names

    def stands(self) -> bool:
        """Whether every object still has the same contents."""
        for held, x, was in self._looks:
            now = held(x)
            if len(now) != len(was):
                return False
            if not all(map(is_, now, was)) and not all(map(_same, now, was)):
                return False
        return True

    def absorb(self) -> None:
        """Accept plain data that has changed, because the function itself has changed it.

        Otherwise a function that counts its traces would be traced again because of its own count.
        """
        for i, (held, x, was) in enumerate(self._looks):
            now = held(x)
            known = set(map(id, was))
            if all(id(part) in known or type(part) in (*_VALUES, type(None)) for part in now):
                self._looks[i] = (held, x, now)

    def _visit(self, x: Any) -> None:
        if id(x) not in self._seen:
            self._seen[id(x)] = x
            self._todo.append(x)

    def _look(self, held: Callable[[Any], list[Any]], x: Any) -> list[Any]:
        """Watch the contents of `x`, as `held` lists them."""
        content = held(x)
        self._left -= len(content) + 1
        if self._left < 0:
            raise _OutOfSight
        self._looks.append((held, x, content))
        return content

    def _follow(self, content: list[Any], *, of_jax: bool = False) -> None:
        for part in content:
            # JAX's internal state in C is not watched.
            if not (of_jax and contents.is_opaque(type(part))):
                self._visit(part)

    def _expand(self, x: Any) -> None:
        kind = type(x)
        if issubclass(kind, Tracer):
            raise _OutOfSight
        if (
            issubclass(kind, (jax.Array, np.generic, np.dtype))
            or kind in contents.IMMUTABLE
            or x is contents.ABSENT
        ):
            return
        if kind is types.FunctionType:
            self._function(x)
        elif kind is types.BuiltinFunctionType or kind is types.MethodWrapperType:
            # C code may call it, and such calls are not seen.
            if not reads_arguments_only(x):
                raise _OutOfSight
            # A bound method may read its object.
            if not isinstance(x.__self__, types.ModuleType):
                self._visit(x.__self__)
        elif issubclass(kind, types.ModuleType):
            self._module(x)
        elif issubclass(kind, type):
            self._class(x)
        elif kind in contents.FIXED:
            self._follow(contents.FIXED[kind](x))
        elif kind in contents.HELD:
            self._follow(self._look(contents.HELD[kind], x))
        elif kind is np.ndarray:
            self._bytes -= x.nbytes
            if self._bytes < 0 or x.dtype.hasobject or x.dtype.names:
                raise _OutOfSight
            self._look(contents.array, x)
        else:
            self._object(x)

    def _function(self, fn: types.FunctionType) -> None:
        self._know(fn.__code__)
        where = fn.__globals__.get("__name__")
        if is_pure(where):
            # A library's wrapper leads to the user's function.
            if fn.__closure__ or fn.__defaults__ or fn.__kwdefaults__ or fn.__dict__:
                self._follow(self._look(contents.function, fn), of_jax=contents.is_jax(where))
        elif id(fn.__code__) in self._ran:
            content = self._look(contents.function, fn)
            cells = len(content) - len(fn.__code__.co_freevars)
            appended = _names_of(fn.__code__).appended
            self._follow(content[:cells])
            self._follow(_read(content[cells:], fn.__code__.co_freevars, appended))
        else:
            # Even if it did not run, its attributes may have been read.
            self._look(contents.shell, fn)
            self._follow([*fn.__dict__.values()])

    def _know(self, code: types.CodeType) -> None:
        if id(code) not in self._known:
            self._known[id(code)] = code
            for inner in code.co_consts:
                if type(inner) is types.CodeType:
                    self._know(inner)

    def _module(self, module: Any) -> None:
        own = vars(module)
        pure = is_pure(own.get("__name__"))
        if self._by_string and not pure:
            raise _OutOfSight
        names = [n for n in self._names if n in own] if pure else self._names
        content = self._look(functools.partial(contents.attributes_of, names), module)
        # Entries that the library itself made are not watched.
        theirs = [
            pure and not isinstance(x, types.ModuleType) and is_pure(contents.origin(x))
            for x in content
        ]
        self._follow([x for x, skip in zip(content, theirs, strict=True) if not skip])

    def _class(self, cls: type) -> None:
        where = home(cls)
        if is_pure(where) or contents.is_compiled(cls):
            return
        if contents.is_nnx(where):
            raise _OutOfSight
        self._look(contents.namespace, cls)
        self._follow([x for name, x in vars(cls).items() if name not in _INERT])
        self._follow([type(cls), *cls.__mro__[1:]])

    def _object(self, x: Any) -> None:
        kind = type(x)
        if contents.is_opaque(kind):
            raise _OutOfSight
        for known in (contents.HELD, contents.FIXED):
            base = next((b for b in kind.__mro__ if b in known), None)
            if base is not None:
                self._follow(self._look(known[base], x))
        of_jax = contents.is_jax(home(kind))
        if contents.is_nnx(home(kind)) or home(kind).startswith("jaxlib."):
            # For a purified or jitted function, only the function inside matters.
            self._follow(self._look(contents.wrapped, x))
        elif contents.has_dict(x):
            self._follow(self._look(contents.instance, x), of_jax=of_jax)
        else:
            self._follow(self._look(contents.kind_of, x))
        members = [] if of_jax else contents.slots_of(kind)
        if members:
            self._follow(self._look(functools.partial(contents.slots, members), x))


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    kind = type(a)
    if kind is not type(b) or kind not in _VALUES:
        return False
    # Compare by repr: it distinguishes 0.0 from -0.0, and nan equals nan.
    return repr(a) == repr(b) if kind in (float, complex) else a == b


def _read(values: list[Any], names: Iterable[str], appended: frozenset[str]) -> list[Any]:
    """The values whose content may have been read."""
    pairs = zip(values, names, strict=True)
    return [x for x, name in pairs if not (type(x) is list and name in appended)]


class _Names(NamedTuple):
    """The globals that code loads, the modules that it imports, and the lists to which it appends.

    Appending to a list does not read it. `appended` are the names that are only used for that.
    """

    loaded: list[str]
    imported: list[str]
    appended: frozenset[str]


@functools.lru_cache(maxsize=4096)
def _names_of(code: types.CodeType) -> _Names:
    loaded: dict[str, None] = {}
    imported: dict[str, None] = {}
    appended, read = set(), set()
    steps = list(dis.get_instructions(code))
    for step, after in itertools.pairwise(steps):
        name = step.argval
        if step.opname == "IMPORT_NAME":
            imported[name] = None
        elif step.opname in _LOAD_GLOBAL:
            loaded[name] = None
        loads = step.opname in _LOAD_GLOBAL or step.opname == "LOAD_DEREF"
        if loads and after.opname in ("LOAD_METHOD", "LOAD_ATTR") and after.argval == "append":
            appended.add(name)
        elif type(name) is str:
            read.add(name)
    return _Names(list(loaded), list(imported), frozenset(appended - read))


_LOAD_GLOBAL = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})


def _candidates(imported: list[str], scope: dict[str, Any]) -> list[str]:
    """The full names that an import may mean."""
    package = scope.get("__package__") or ""
    return [full for n in imported for full in (n, n.partition(".")[0], f"{package}.{n}", package)]
