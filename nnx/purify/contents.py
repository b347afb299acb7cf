"""The contents of objects of each kind, as lists to compare, and which kinds show all their contents."""

from __future__ import annotations

import abc
import builtins
import datetime
import decimal
import functools
import operator
import re
import types
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from nnx.purify.record import home, is_pure

__all__: list[str] = []

IMMUTABLE: frozenset[type] = frozenset(
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
ABSENT = type("Absent", (), {"__slots__": ()})()


def registrations(_: Any) -> list[Any]:
    return [abc.get_cache_token()]


def globals_of(names: list[str], scope: dict[str, Any]) -> list[Any]:
    at, above = scope.get, builtins.__dict__
    return [above.get(n, ABSENT) if (x := at(n, ABSENT)) is ABSENT else x for n in names]


def modules_of(names: list[str], modules: dict[str, Any]) -> list[Any]:
    return [modules.get(n, ABSENT) for n in names]


def attributes_of(names: list[str], module: Any) -> list[Any]:
    at = module.__dict__.get
    return [at(n, ABSENT) for n in names]


def function(fn: types.FunctionType) -> list[Any]:
    # The cells come last.
    return [*shell(fn), *map(_cell, fn.__closure__ or ())]


def shell(fn: types.FunctionType) -> list[Any]:
    held = [fn.__code__, fn.__name__, fn.__defaults__, fn.__kwdefaults__]
    return held + _dict(fn.__dict__) if fn.__dict__ else held


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return ABSENT


def namespace(cls: type) -> list[Any]:
    return [cls.__bases__, *_dict(cls.__dict__)]


def _dict(d: Any) -> list[Any]:
    return [*d.keys(), *d.values()]


def instance(x: Any) -> list[Any]:
    return [type(x), *_dict(object.__getattribute__(x, "__dict__"))]


def slots(members: list[Any], x: Any) -> list[Any]:
    return [_slot(member, x) for member in members]


def _slot(member: Any, x: Any) -> Any:
    try:
        return member.__get__(x)
    except AttributeError:
        return ABSENT


def slots_of(kind: type) -> list[Any]:
    """The descriptors of the `__slots__` of a class."""
    members = (v for base in kind.__mro__ for v in vars(base).values())
    return [v for v in members if type(v) is types.MemberDescriptorType]


def array(x: Any) -> list[Any]:
    return [x.dtype.str, x.tobytes(), *x.shape]


def kind_of(x: Any) -> list[Any]:
    return [type(x)]


def wrapped(x: Any) -> list[Any]:
    return [getattr(x, "__wrapped__", ABSENT)]


def _items(base: Any) -> Callable[[Any], list[Any]]:
    # Use the base class's method, because a subclass may have a user's `__iter__`.
    items = base.__iter__
    return lambda x: list(items(x))


# The content of these cannot change.
FIXED: dict[type, Callable[[Any], list[Any]]] = {
    tuple: _items(tuple),
    frozenset: _items(frozenset),
    types.MethodType: lambda x: [x.__func__, x.__self__],
    staticmethod: lambda x: [x.__func__],
    classmethod: lambda x: [x.__func__],
    property: lambda x: [x.fget, x.fset, x.fdel],
}
HELD: dict[type, Callable[[Any], list[Any]]] = {
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


def has_dict(x: Any) -> bool:
    try:
        return type(object.__getattribute__(x, "__dict__")) is dict
    except AttributeError:
        return False


def is_opaque(kind: type) -> bool:
    """Whether objects of this kind are nnx modules, or may hold something that Python cannot show."""
    return any(
        (is_compiled(base) and not (base in _VISIBLE or is_jax(home(base))))
        or (is_nnx(home(base)) and not is_pure(home(base)))
        for base in kind.__mro__
    )


_VISIBLE = frozenset(
    {types.FunctionType, types.BuiltinFunctionType, types.MethodWrapperType, types.ModuleType, type}
    | {np.generic, np.dtype, *IMMUTABLE, *FIXED, *HELD}
)


def is_compiled(cls: type) -> bool:
    """Whether a class is written in C: then it has its own C methods or a C constructor."""
    return any(
        (type(x) in _OF_C and x.__objclass__ is cls)
        or (name == "__new__" and type(x) is types.BuiltinFunctionType)
        for name, x in vars(cls).items()
    )


_OF_C = (
    *(types.MethodDescriptorType, types.WrapperDescriptorType),
    types.ClassMethodDescriptorType,
)


def origin(x: Any) -> Any:
    return None if type(x) is functools.partial else getattr(x, "__module__", None)


def is_jax(name: Any) -> bool:
    return type(name) is str and name.partition(".")[0] in ("jax", "jaxlib")


def is_nnx(name: str) -> bool:
    return name.partition(".")[0] in ("nnx", "refx")
