"""The kinds of objects in the search for closed-over objects: data, containers, modules, code.

Nothing here runs the object's own code. We only look at its type, and use the methods of base classes.
"""

from __future__ import annotations

import array
import collections
import collections.abc
import enum
import functools
import gc
import sys
import types
import weakref
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from refx import Node, Ref, RefError
from refx.walk import walk

__all__: list[str] = []

# Code of these packages does not use a user's modules, and following it would take long.
LIBRARIES = sys.stdlib_module_names | frozenset(
    {"jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "optax", "orbax", "chex", "flax", "equinox"}
    | {"haiku", "torch", "tensorflow", "keras", "sklearn", "pandas", "matplotlib", "PIL", "tqdm"}
    | {"nnx", "refx", "pytest", "_pytest", "hypothesis", "IPython", "ipykernel", "wandb"}
)
# Objects of classes from these packages may hold anything, so we look into them as into containers.
HOLDERS = frozenset(
    {"builtins", "collections", "functools", "itertools", "types", "weakref", "queue", "nnx"}
    | {"argparse", "array", "configparser"}
)
ARRAYS = (np.ndarray, np.generic, np.dtype, Tracer, jax.Array)
# Nothing can be reached from these.
PLAIN = frozenset(
    {int, float, complex, bool, str, bytes, bytearray, type(None), type(...), range, slice}
    | {type(NotImplemented), types.CodeType, types.GetSetDescriptorType, type(len)}
    | {types.MemberDescriptorType, types.WrapperDescriptorType, types.MethodDescriptorType}
)
CONTAINERS = (list, tuple, dict, set, frozenset, collections.deque, bytearray, array.array)
# Classes whose items are in attributes that user code does not name.
COLLECTIONS = (
    collections.abc.MutableMapping,
    collections.abc.MutableSequence,
    collections.abc.MutableSet,
)
# These have special steps. Every other object from `HOLDERS` leads to everything that it refers to.
TAKEN_APART = frozenset(
    {types.FunctionType, types.MethodType, types.SimpleNamespace, functools.partial, staticmethod}
    | {classmethod, property, functools.cached_property, weakref.ref, type, object}
)
PYTREES = (list, tuple, dict)
# Up to this size, we watch even a container of plain data: it may later hold a module.
SMALL = 1024
# The largest number of nested lists and modules to go through.
_MOST = 4000


def is_plain(x: Any) -> bool:
    """Whether `x` leads to nothing of interest."""
    kind = type(x)
    if kind in PLAIN or issubclass(kind, ARRAYS):
        # A bound method in C, such as a dict's, leads to the bound object.
        return kind is not type(len) or type(x.__self__) in PLAIN | {types.ModuleType}
    if issubclass(kind, types.ModuleType):
        return kind is not types.ModuleType or is_library(vars(x).get("__name__"))
    return issubclass(kind, type) and is_library(home_of(x))


def is_module(x: Any) -> bool:
    """Whether `x` is a Node or a Ref. It looks only at the type, because `isinstance` may ask a proxy."""
    return issubclass(type(x), (Node, Ref))


def content(x: Any) -> list[Any]:
    """The items of a container, or the referents of a C object, to compare later."""
    if issubclass(type(x), collections.OrderedDict):
        return [part for item in collections.OrderedDict.items(x) for part in item]
    if issubclass(type(x), dict):
        return [*dict.keys(x), *dict.values(x)]
    return items_of(x) if is_container(x) else gc.get_referents(x)


def items_of(x: Any) -> list[Any]:
    # Use the base class, because a subclass may define its own `__iter__`.
    if issubclass(type(x), dict):
        return list(dict.values(x))
    return list(next(c for c in CONTAINERS if issubclass(type(x), c)).__iter__(x))


def is_holder(x: Any) -> bool:
    """Whether the steps from `x` lead to its content, which is watched as a whole."""
    return is_container(x) or (home_of(type(x)) in HOLDERS and type(x) not in TAKEN_APART)


def has_no_names(x: Any) -> bool:
    """Whether code reads the content of `x` without naming it: variables of a function, or items."""
    return type(x) is types.FunctionType or issubclass(type(x), (functools.partial, *COLLECTIONS))


def is_container(x: Any) -> bool:
    """Whether `x` is a list, a tuple, a dict, a set or the like."""
    return issubclass(type(x), CONTAINERS)


def is_plain_container(x: Any, far: bool) -> bool:
    """Whether `x` is a container of plain data that is unlikely to get a module."""
    return is_container(x) and (far or len(x) > SMALL) and all_plain(x)


def is_value(x: Any) -> bool:
    """Whether `x` is compared by type and value: a number, a string or an enum, even of a user's class."""
    return type(x) in SCALARS or issubclass(type(x), VALUES)


def is_data(x: Any) -> bool:
    """Whether `x` is data: a number, a string, an array, a container of these, or a library's class."""
    kind = type(x)
    return (
        is_value(x)
        or issubclass(kind, ARRAYS)
        or ((kind is type(len) or issubclass(kind, type)) and is_plain(x))
        or (is_container(x) and all_plain(x))
    )


# Base classes of values that are compared by type and value.
VALUES = (enum.Enum, int, float, complex, str, bytes)
SCALARS = frozenset({int, float, complex, bool, str, bytes, type(None), type(...), range, slice})


def data_in(x: Any, depth: int = 15) -> list[Any] | None:
    """`x` and the containers inside it, if they hold nothing but data; otherwise None."""
    if not is_container(x) or len(x) > SMALL:
        return None
    found = [x]
    if type(x) not in CONTAINERS and (own := _attributes(x)) is not None:
        found.append(own)
    if not all_plain(x):
        for part in items_of(x):
            if is_data(part) and not is_container(part):
                continue
            inner = data_in(part, depth - 1) if depth else None
            if inner is None or len(found) > SMALL:
                return None
            found += inner
    return found if len(found) <= SMALL else None


def _attributes(x: Any) -> Any:
    """The attributes of an instance of a subclass of a container."""
    try:
        return object.__getattribute__(x, "__dict__")
    except AttributeError:
        return None


def containers(x: Any) -> list[Any]:
    """The lists and dicts in `x`, including `x` itself."""
    found: list[Any] = []
    todo, seen = [x], set()
    while todo:
        at = todo.pop()
        if not issubclass(type(at), PYTREES) or id(at) in seen:
            continue
        seen.add(id(at))
        if not issubclass(type(at), tuple):
            found.append(at)
        todo += items_of(at)
    return found


def is_user_object(x: Any) -> bool:
    """Whether the search goes into the attributes of `x`."""
    kind = type(x)
    return kind not in TAKEN_APART and not is_holder(x) and not is_library(home_of(kind))


def home_of(cls: type) -> str:
    name = type.__dict__["__dict__"].__get__(cls).get("__module__", "builtins")
    return name if type(name) is str else ""


def is_library(name: Any) -> bool:
    return type(name) is str and name.partition(".")[0] in LIBRARIES


def holds_modules(x: Any) -> bool:
    """Whether lists, tuples and dicts in `x`, or bound methods there, hold modules or Refs."""
    todo, seen = [x], set()
    while todo and len(seen) < _MOST:
        at = todo.pop()
        if is_module(at):
            return True
        if issubclass(type(at), PYTREES):
            if id(at) not in seen and not all_plain(at):
                seen.add(id(at))
                todo += items_of(at)
        elif type(at) is types.MethodType:
            todo.append(at.__self__)
    return False


def all_plain(x: Any) -> bool:
    """Whether a container holds only plain data. It is fast, since there may be millions of numbers."""
    kinds = set(map(type, items_of(x))) - _PLAIN_DATA
    return all(issubclass(kind, jax.Array) for kind in kinds)


_PLAIN_DATA = (PLAIN - {type(len)}) | {np.ndarray}


def can_be_walked(x: Any) -> bool:
    try:
        walk(x)
    except RefError:
        return False
    return True
