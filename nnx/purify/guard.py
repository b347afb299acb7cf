"""Whether everything that a function read while it was traced is still as it was.

Two mechanisms, each with one job:

- `Record` notes which code ran during the trace: every Python function and every C function that
  user code called. Libraries that compute without a state of their own (JAX, NumPy, ...) are not
  looked into.
- `Guard` notes what that code could read: for each function that ran its cells, globals and
  defaults, and from there every object, with all that it holds. `stands()` compares these again.

The argument is that of any build system: if everything that was read is the same, the same code runs
and reads the same. So code that did not run does not matter, and neither does what only it reads.

There is no guard where something is out of sight: code that ran and that no step leads to, a C
function that may read the world (`time.time`), an object whose content Python cannot show (a
generator, a random stream), a module of nnx. Such a function is traced at every call.
"""

from __future__ import annotations

import abc
import builtins
import datetime
import decimal
import dis
import functools
import operator
import re
import sys
import types
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterable
from operator import is_
from typing import Any, TypeVar

import jax
import numpy as np
from jax.core import Tracer

from nnx.purify.record import Record, home, is_pure

__all__: list[str] = []

# Compared by type and value; everything else by identity.
_VALUES = frozenset({int, float, complex, bool, str, bytes})
_IMMUTABLE: frozenset[type] = frozenset(
    {int, float, complex, bool, str, bytes, range, slice, object, type(None), type(...)}
    | {type(NotImplemented), types.CodeType, types.GenericAlias, types.UnionType}
    | {types.GetSetDescriptorType, types.MemberDescriptorType, types.WrapperDescriptorType}
    | {types.MethodDescriptorType, types.ClassMethodDescriptorType}
    | {datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone}
    | {
        decimal.Decimal,
        re.Pattern,
        operator.itemgetter,
        TypeVar,
        type(vars(namedtuple("T", "x"))["x"]),
    }
    | {np.ufunc, type(np.sum)}
)
# Entries of a class that no program reads to compute something.
_INERT = frozenset(
    {"__abstractmethods__", "__annotate__", "__annotate_func__", "__annotations__", "_abc_impl"}
    | {"__annotations_cache__", "__dataclass_fields__", "__dataclass_params__", "__dict__"}
    | {"__doc__", "__module__", "__orig_bases__", "__parameters__", "__qualname__", "__weakref__"}
)
_ABSENT = type("Absent", (), {"__slots__": ()})()
# How many references one guard compares at a call, and bytes of NumPy arrays.
_REFERENCES, _BYTES = 10_000, 1 << 20


class _OutOfSight(Exception):
    """Something was read whose changes could not be seen."""


def guard_of(fn: Callable[..., Any], classes: Iterable[type], record: Record) -> Guard | None:
    """The guard of what `fn` read while it was recorded; None if some of it is out of sight.

    Args:
      fn: the function.
      classes: what it has reached by its arguments.
      record: of one trace of it.
    """
    try:
        return Guard([fn, *classes], record) if record.complete else None
    except _OutOfSight:
        return None


class Guard:
    """What a function could read, as a list of objects, each with what it held."""

    def __init__(self, starts: list[Any], record: Record):
        self._looks: list[tuple[Callable[[Any], list[Any]], Any, list[Any]]] = []
        self._seen: dict[int, Any] = {}
        self._todo: list[Any] = []
        self._ran = {id(code) for code, _ in record.ran}
        self._known: dict[int, types.CodeType] = {}
        self._by_string = record.by_string
        self._left, self._bytes = _REFERENCES, _BYTES
        names: dict[str, None] = {}
        for code, _ in record.ran:
            names.update(dict.fromkeys(code.co_names))
        self._names = list(names)
        self._follow(starts)
        # Counts the registrations of virtual subclasses.
        self._look(_classes, None)
        for code, scope in record.ran:
            loaded, imported = _names_of(code)
            self._follow(self._look(functools.partial(_globals, loaded), scope))
            if imported:
                found = functools.partial(_modules, _candidates(imported, scope))
                self._follow(self._look(found, sys.modules))
        while self._todo:
            self._expand(self._todo.pop())
        if not all(id(code) in self._known for code, _ in record.ran):
            raise _OutOfSight
        del self._seen, self._todo, self._known, self._ran, self._names

    def stands(self) -> bool:
        """Whether every object still holds what it held."""
        for held, x, was in self._looks:
            now = held(x)
            if len(now) != len(was):
                return False
            if not all(map(is_, now, was)) and not all(map(_same, now, was)):
                return False
        return True

    def absorb(self) -> None:
        """Take plain data that has changed for what was there: the function itself has changed it.

        So a function that counts its traces is not traced again because another trace was counted.
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
        """Watch what `held` says of `x`."""
        content = held(x)
        self._left -= len(content) + 1
        if self._left < 0:
            raise _OutOfSight
        self._looks.append((held, x, content))
        return content

    def _follow(self, content: list[Any], *, of_jax: bool = False) -> None:
        for part in content:
            # What JAX keeps in C is its own affair.
            if not (of_jax and _is_opaque(type(part))):
                self._visit(part)

    def _expand(self, x: Any) -> None:
        kind = type(x)
        if issubclass(kind, Tracer):
            raise _OutOfSight
        if (
            issubclass(kind, (jax.Array, np.generic, np.dtype))
            or kind in _IMMUTABLE
            or x is _ABSENT
        ):
            return
        if kind is types.FunctionType:
            self._function(x)
        elif kind is types.BuiltinFunctionType or kind is types.MethodWrapperType:
            # A bound method of C code reads what it is bound to.
            if not isinstance(x.__self__, types.ModuleType):
                self._visit(x.__self__)
        elif issubclass(kind, types.ModuleType):
            self._module(x)
        elif issubclass(kind, type):
            self._class(x)
        elif kind in _FIXED:
            self._follow(_FIXED[kind](x))
        elif kind in _HELD:
            self._follow(self._look(_HELD[kind], x))
        elif kind is np.ndarray:
            self._bytes -= x.nbytes
            if self._bytes < 0 or x.dtype.hasobject or x.dtype.names:
                raise _OutOfSight
            self._look(_array, x)
        else:
            self._object(x)

    def _function(self, fn: types.FunctionType) -> None:
        self._know(fn.__code__)
        where = fn.__globals__.get("__name__")
        if is_pure(where):
            # A wrapper of a library leads to the user's function.
            if fn.__closure__ or fn.__defaults__ or fn.__kwdefaults__ or fn.__dict__:
                self._follow(self._look(_function, fn), of_jax=_is_jax(where))
        elif id(fn.__code__) in self._ran:
            self._follow(self._look(_function, fn))
        else:
            # Its attributes may have been read, and that it did not run.
            self._look(_shell, fn)
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
        content = self._look(functools.partial(_attributes, names), module)
        # What a library itself put there is its own affair.
        theirs = [
            pure and not isinstance(x, types.ModuleType) and is_pure(_origin(x)) for x in content
        ]
        self._follow([x for x, skip in zip(content, theirs, strict=True) if not skip])

    def _class(self, cls: type) -> None:
        where = home(cls)
        if is_pure(where) or _is_compiled(cls):
            return
        if _is_nnx(where):
            raise _OutOfSight
        self._look(_namespace, cls)
        self._follow([x for name, x in vars(cls).items() if name not in _INERT])
        self._follow([type(cls), *cls.__mro__[1:]])

    def _object(self, x: Any) -> None:
        kind = type(x)
        if _is_opaque(kind):
            raise _OutOfSight
        for content in (_HELD, _FIXED):
            base = next((b for b in kind.__mro__ if b in content), None)
            if base is not None:
                self._follow(self._look(content[base], x))
        of_jax = _is_jax(home(kind))
        if _is_nnx(home(kind)) or home(kind).startswith("jaxlib."):
            # What matters of a purified or a jitted function is the function.
            self._follow(self._look(_wrapped, x))
        elif _has_dict(x):
            self._follow(self._look(_instance, x), of_jax=of_jax)
        else:
            self._follow(self._look(_kind, x))
        if not of_jax and _slots_of(kind):
            self._follow(self._look(_slots, x))


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    kind = type(a)
    if kind is not type(b) or kind not in _VALUES:
        return False
    # The repr tells 0.0 from -0.0, and takes nan for nan.
    return repr(a) == repr(b) if kind in (float, complex) else a == b


# What objects of each kind hold, as lists to be compared.


def _classes(_: Any) -> list[Any]:
    return [abc.get_cache_token()]


def _globals(names: list[str], scope: dict[str, Any]) -> list[Any]:
    at, above = scope.get, builtins.__dict__
    return [above.get(n, _ABSENT) if (x := at(n, _ABSENT)) is _ABSENT else x for n in names]


def _modules(names: list[str], modules: dict[str, Any]) -> list[Any]:
    return [modules.get(n, _ABSENT) for n in names]


def _attributes(names: list[str], module: Any) -> list[Any]:
    at = module.__dict__.get
    return [at(n, _ABSENT) for n in names]


def _function(fn: types.FunctionType) -> list[Any]:
    return [*_shell(fn), *map(_cell, fn.__closure__ or ())]


def _shell(fn: types.FunctionType) -> list[Any]:
    held = [fn.__code__, fn.__name__, fn.__defaults__, fn.__kwdefaults__]
    return held + _dict(fn.__dict__) if fn.__dict__ else held


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _ABSENT


def _namespace(cls: type) -> list[Any]:
    return [cls.__bases__, *_dict(cls.__dict__)]


def _dict(d: Any) -> list[Any]:
    return [*d.keys(), *d.values()]


def _instance(x: Any) -> list[Any]:
    return [type(x), *_dict(object.__getattribute__(x, "__dict__"))]


def _slots(x: Any) -> list[Any]:
    return [_slot(slot, x) for slot in _slots_of(type(x))]


def _slot(slot: Any, x: Any) -> Any:
    try:
        return slot.__get__(x)
    except AttributeError:
        return _ABSENT


@functools.lru_cache(maxsize=1024)
def _slots_of(kind: type) -> list[Any]:
    members = (v for base in kind.__mro__ for v in vars(base).values())
    return [v for v in members if type(v) is types.MemberDescriptorType]


def _array(x: Any) -> list[Any]:
    return [x.dtype.str, x.tobytes(), *x.shape]


def _kind(x: Any) -> list[Any]:
    return [type(x)]


def _wrapped(x: Any) -> list[Any]:
    return [getattr(x, "__wrapped__", _ABSENT)]


def _items(base: Any) -> Callable[[Any], list[Any]]:
    # By the base class, since a subclass may have an `__iter__` that a user wrote.
    items = base.__iter__
    return lambda x: list(items(x))


# Of these the content cannot change.
_FIXED: dict[type, Callable[[Any], list[Any]]] = {
    tuple: _items(tuple),
    frozenset: _items(frozenset),
    types.MethodType: lambda x: [x.__func__, x.__self__],
    staticmethod: lambda x: [x.__func__],
    classmethod: lambda x: [x.__func__],
    property: lambda x: [x.fget, x.fset, x.fdel],
}
_HELD: dict[type, Callable[[Any], list[Any]]] = {
    list: _items(list),
    set: _items(set),
    deque: _items(deque),
    OrderedDict: lambda x: [*OrderedDict.keys(x), *OrderedDict.values(x)],
    dict: lambda x: [*dict.keys(x), *dict.values(x)],
    defaultdict: lambda x: [x.default_factory, *dict.keys(x), *dict.values(x)],
    bytearray: lambda x: [bytes(x)],
    types.MappingProxyType: _dict,
    types.SimpleNamespace: lambda x: _dict(vars(x)),
    functools.partial: lambda x: [x.func, x.args, *_dict(x.keywords), *_dict(vars(x))],
    functools.cached_property: lambda x: [x.func],  # pyright: ignore
}


def _has_dict(x: Any) -> bool:
    try:
        return type(object.__getattribute__(x, "__dict__")) is dict
    except AttributeError:
        return False


@functools.lru_cache(maxsize=1024)
def _is_opaque(kind: type) -> bool:
    """Whether objects of this kind may hold what Python cannot show, or are modules of nnx."""
    return any(
        (_is_compiled(base) and not (base in _VISIBLE or _is_jax(home(base))))
        or (_is_nnx(home(base)) and not is_pure(home(base)))
        for base in kind.__mro__
    )


_VISIBLE = frozenset(
    {types.FunctionType, types.BuiltinFunctionType, types.MethodWrapperType, types.ModuleType, type}
    | {np.generic, np.dtype, *_IMMUTABLE, *_FIXED, *_HELD}
)


def _is_compiled(cls: type) -> bool:
    """Whether a class is of C: then it has methods of C, or a constructor, of its own."""
    return any(
        (type(x) in _OF_C and x.__objclass__ is cls)
        or (name == "__new__" and type(x) is types.BuiltinFunctionType)
        for name, x in vars(cls).items()
    )


_OF_C = (
    *(types.MethodDescriptorType, types.WrapperDescriptorType),
    types.ClassMethodDescriptorType,
)


def _origin(x: Any) -> Any:
    return None if type(x) is functools.partial else getattr(x, "__module__", None)


def _is_jax(name: Any) -> bool:
    return type(name) is str and name.partition(".")[0] in ("jax", "jaxlib")


def _is_nnx(name: str) -> bool:
    return name.partition(".")[0] in ("nnx", "refx")


def _names_of(code: types.CodeType) -> tuple[list[str], list[str]]:
    """The globals that some code loads, and the modules that it imports."""
    loaded, imported = {}, {}
    for step in _steps(code):
        (imported if step[0] == "IMPORT_NAME" else loaded)[step[1]] = None
    return list(loaded), list(imported)


_LOADS = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS", "IMPORT_NAME"})


def _steps(code: types.CodeType) -> list[tuple[str, Any]]:
    return [(i.opname, i.argval) for i in dis.get_instructions(code) if i.opname in _LOADS]


def _candidates(imported: list[str], scope: dict[str, Any]) -> list[str]:
    """The full names that imports may mean."""
    package = scope.get("__package__") or ""
    return [full for n in imported for full in (n, n.partition(".")[0], f"{package}.{n}", package)]
