"""The steps from one object to the next: what a function may find in it, without running user code."""

from __future__ import annotations

import collections
import contextvars
import functools
import gc
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from nnx._layer_names import LayerCall
from nnx.transforms.objects import (
    HOLDERS,
    PLAIN,
    TAKEN_APART,
    content,
    home_of,
    is_holder,
    is_library,
    is_module,
    is_plain,
)
from refx import Node

__all__: list[str] = []

Step = tuple[Any, Any, Any, bool]
"""A name; the way to take the step again (see `Edge`); the value; whether it is far."""

# Packages with classes whose objects only hold settings.
_NAMESPACES = ("types", "argparse")


class _Absent:
    def __repr__(self) -> str:
        return "ABSENT"


ABSENT: Any = _Absent()
"""The value of a name that does not exist."""


DEFAULTS = ("__defaults__", "__kwdefaults__")


def _argument(x: Any, i: int) -> Any:
    return x.args[i] if i < len(x.args) else ABSENT


def of_closure(fn: Any) -> Iterator[Step]:
    """The steps from a function to its variables, defaults and attributes."""
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        get = functools.partial(getattr, cell, "cell_contents", None)
        yield name, (None, get), get(), False
    for attribute in DEFAULTS:
        # Defaults are assigned as a whole.
        if (defaults := getattr(fn, attribute)) is not None:
            yield attribute, (None, functools.partial(getattr, fn, attribute)), defaults, False
    for i, default in enumerate(fn.__defaults__ or ()):
        yield ("default", i), None, default, False
    for name, default in (fn.__kwdefaults__ or {}).items():
        yield ("default", name), (fn.__kwdefaults__, name), default, False
    for name, value in list(vars(fn).items()):
        yield ("attribute", name), (vars(fn), name), value, True


def of_object(x: Any) -> Iterator[Step]:
    """The steps from an object that is neither a function nor a class."""
    kind = type(x)
    if kind is types.MethodType:
        yield "__func__", None, x.__func__, False
        yield "__self__", None, x.__self__, False
    elif issubclass(kind, functools.partial):
        yield 0, None, x.func, False
        for i, part in enumerate(x.args):
            yield i + 1, (None, functools.partial(_argument, x, i)), part, False
        for name, part in x.keywords.items():
            yield name, (x.keywords, name), part, False
    elif kind is staticmethod or kind is classmethod:
        yield "__func__", None, x.__func__, False
    elif kind is property or kind is functools.cached_property:
        getter = x.fget if kind is property else x.func  # pyright: ignore
        yield "__func__", None, getter, False
    elif issubclass(kind, weakref.ref):
        get = functools.partial(weakref.ref.__call__, x)
        yield "()", (None, get), get(), True
    elif kind is contextvars.ContextVar:
        get = functools.partial(x.get, None)
        yield "()", (None, get), get(), True
    else:
        yield from _of_attributes(x)


def of_class(cls: Any) -> Iterator[Step]:
    """The steps from a class to its metaclass and to its attributes and those of its bases."""
    if type(cls) is not type and not is_library(home_of(type(cls))):
        yield "metaclass", (None, functools.partial(type, cls)), type(cls), True
    for base in type.__dict__["__mro__"].__get__(cls):
        if is_library(home_of(base)):
            continue
        own = class_dict(base)
        # What a Node class records about its fields follows from its attributes.
        ours = {"_fields", "_defaults", "_revision"} if issubclass(base, Node) else ()
        for name, value in list(own.items()):
            if name not in ours:
                yield (base.__qualname__, name), (own, name), value, type(value) in CODE


def attribute_dicts(x: Any) -> list[dict[str, Any]]:
    """The dicts in which Python looks up an attribute of an object: its own and those of its classes."""
    kind = type(x)
    if issubclass(kind, type):
        cls, own = x, None
    elif kind in TAKEN_APART or is_module(x) or is_plain(x) or is_holder(x):
        return []
    else:
        cls, own = kind, _own_dict(x)
    bases = [b for b in type.__dict__["__mro__"].__get__(cls) if not is_library(home_of(b))]
    return [*([own] if own is not None else []), *map(class_dict, bases)]


def class_dict(cls: Any) -> dict[str, Any]:
    """The dict behind `vars(cls)`. We only read it."""
    return gc.get_referents(type.__dict__["__dict__"].__get__(cls))[0]


CODE = (
    *(types.FunctionType, staticmethod, classmethod, property, functools.cached_property),
    LayerCall,
)


def _of_attributes(x: Any) -> Iterator[Step]:
    kind = type(x)
    home = home_of(kind)
    own = _own_dict(x)
    if kind is LayerCall:
        yield "fn", None, x.fn, False
        return
    if own is not None and "__wrapped__" in own:
        yield "__wrapped__", (own, "__wrapped__"), own["__wrapped__"], False
        if home.partition(".")[0] == "nnx":
            return
    if issubclass(kind, dict):
        # An OrderedDict has its own order.
        kind_of = collections.OrderedDict if issubclass(kind, collections.OrderedDict) else dict
        for key, value in list(kind_of.items(x)):
            known = type(key) in PLAIN
            yield key if known else ("key", id(key)), None, value, False
            if not known:
                yield ("keys", id(key)), None, key, True
    elif is_holder(x):
        # Unordered items are named by their identity.
        in_order = issubclass(kind, (list, tuple, collections.deque))
        for i, value in enumerate(content(x)):
            yield i if in_order else ("held", id(value)), None, value, False
    if is_library(home):
        if own is not None and (home in HOLDERS or home.partition(".")[0] == "nnx"):
            for name, value in list(own.items()):
                yield (
                    name,
                    (own, name),
                    value,
                    not (kind is types.SimpleNamespace or home in _NAMESPACES),
                )
        if home in _NAMESPACES:
            # A class of `dataclasses.make_dataclass` is in "types".
            yield from _of_slots(x)
        return
    for name, value in list((own or {}).items()):
        if not name.startswith("__"):
            yield name, (own, name), value, False
    yield "type", (None, _type_of(x)), kind, True
    yield from _of_slots(x)
    yield "__class__", None, kind, True


def _of_slots(x: Any) -> Iterator[Step]:
    for base in type(x).__mro__:
        for name, slot in list(vars(base).items()):
            if type(slot) is types.MemberDescriptorType:
                get = functools.partial(_slot, slot, x)
                yield name, (None, get), get(), True


def _type_of(x: Any) -> Callable[[], Any]:
    """A function that returns the class of `x`. It keeps `x` alive only if a weak reference is impossible."""
    try:
        ref = weakref.ref(x)
    except TypeError:
        return functools.partial(type, x)
    return lambda: type(ref())


def _slot(slot: Any, x: Any) -> Any:
    try:
        return slot.__get__(x)
    except AttributeError:
        return None


def _own_dict(x: Any) -> dict[str, Any] | None:
    """The attributes of `x`, ignoring any `__dict__` or `__getattribute__` of its class."""
    for base in type(x).__mro__:
        found = type.__dict__["__dict__"].__get__(base).get("__dict__")
        if found is not None:
            return found.__get__(x) if type(found) in _DESCRIPTORS else None
    return None


_DESCRIPTORS = (types.GetSetDescriptorType, types.MemberDescriptorType)
