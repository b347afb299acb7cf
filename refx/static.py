"""Static values: the parts of a structure, and the rule for when two of them are the same.

Static values are compared by type and content, whatever their `==` says, because they are part of the
key of a compiled program. Programs for `1`, `True` and `1.0`, or for a string and an enum that equals it,
are different.
"""

from __future__ import annotations

import collections
import collections.abc
import copy
import enum
import functools
import pathlib
import sys
import types
from typing import Any

import jax
import numpy as np

__all__: list[str] = []

# For values of one of these types, `==` is right.
_PLAIN = frozenset({int, bool, str, bytes, type(None), type, type(len), types.FunctionType})
# Values of these types cannot change, and hold nothing.
SIMPLE = frozenset({int, float, bool, str, complex, bytes, type(None), type(len), type})
_CHANGING = (
    collections.abc.MutableMapping,
    collections.abc.MutableSequence,
    collections.abc.MutableSet,
)
_CONTAINERS = (list, dict, set, bytearray, collections.deque, np.ndarray, jax.Array)
# Packages whose objects are compared by `==`: users do not change these in place, or the objects keep
# caches beside their content. Installed packages all count; a package under development adds its name.
TRUSTED = set(sys.stdlib_module_names) | {"jax", "jaxlib", "numpy", "ml_dtypes", __package__}
# Read objects inside objects four deep, and containers inside containers sixteen deep. Anything deeper
# is compared by identity.
_OBJECT, _CONTAINER = 16, 4
_DEPTH = 4 * _OBJECT
# At this depth `exact` also reads lists and dicts, as it does inside a static value.
NESTED = _DEPTH - 1


WITH_IDENTITY: set[type] = set()
"""The classes whose instances are compared by identity: Ref, and each class of Nodes."""


class Static:
    """A value that is part of the structure. Two are equal if their types and contents are equal.

    `contents` has everything in the value that may change in place: its dicts and lists, and a Changing
    for each other object. With the depth NESTED, the value may itself be a list or a dict.
    """

    __slots__ = ("_copy", "_key", "contents", "value")

    def __init__(self, value: Any, depth: int | None = None):
        self.value = value
        contents: list[Any] = []
        self._key = exact(value, contents, _DEPTH if depth is None else depth)
        self.contents = contents
        self._copy: Any = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def keep(self) -> None:
        """Copy a value that may change in place: trees with an equal value may be built from this one."""
        if self.contents and self._copy is None and not _is_unique(self.value):
            try:
                self._copy = _copied(self.value)
            except Exception:  # its class cannot be copied, so keep the value itself
                self._copy = self.value

    def current(self) -> Any:
        """The value, or a copy of its original content if it has changed since."""
        if self._copy is None or self._copy is self.value or exact(self.value, []) == self._key:
            return self.value
        return _copied(self._copy)

    def __repr__(self) -> str:
        return repr(self.value)

    def __reduce__(self) -> Any:
        return Static, (self.value,)


class Same:
    """An object as part of a key: equal only to itself."""

    __slots__ = ("_object",)

    def __init__(self, x: Any):
        self._object = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other._object is self._object

    def __hash__(self) -> int:
        return id(self._object)


def exact(value: Any, contents: list[Any], depth: int = _DEPTH) -> Any:
    """A key that is equal only for values that compute alike.

    Args:
      value: any object.
      contents: a list to which this adds the parts of the value that may change in place.
      depth: how many objects deep to read.
    """
    kind = type(value)
    if kind is float:
        return kind, value.hex()
    if kind in _PLAIN:
        return kind, value
    if kind is complex:
        return kind, value.real.hex(), value.imag.hex()
    if isinstance(value, enum.Enum):
        return kind, Same(value)
    if kind is tuple or kind is frozenset:
        return kind, kind([exact(x, contents, depth) for x in value])
    if isinstance(value, np.generic):
        return kind, value.dtype.str, value.tobytes()
    if kind is slice:
        return kind, exact((value.start, value.stop, value.step), contents, depth)
    if depth < _DEPTH and isinstance(value, _CONTAINERS):
        return _inside(value, contents, depth)
    if kind is types.MethodType:
        # The content of the bound object may change.
        return kind, Same(value.__func__), exact(value.__self__, contents, depth)
    if kind is functools.partial and depth > 0:
        parts = value.func, value.args, value.keywords
        return kind, *[exact(part, contents, min(depth, NESTED)) for part in parts]
    by_identity = kind.__eq__ is object.__eq__
    hashable = _has_hash(value)
    if hashable and _is_trusted(kind.__module__):
        return (kind, Same(value)) if by_identity else (kind, value)
    config = isinstance(value, _CHANGING) and not isinstance(value, _CONTAINERS)
    if config or kind is types.MappingProxyType:
        # A config of a library, or a view: compare its items, however it stores them.
        key = (kind, _inside(_plain(value), [], depth)) if depth > 0 else (kind, Same(value))
        contents.append(Changing(value, key, depth))
        return key
    if isinstance(value, type | types.ModuleType) or kind in WITH_IDENTITY:
        return kind, Same(value)
    if isinstance(value, _CONTAINERS):
        # It has no hash. Callers that need one raise an error with an explanation.
        return kind, value
    base: Any = ()
    if isinstance(value, tuple):
        base = tuple([exact(x, contents, depth) for x in value])
    elif isinstance(value, int | str | bytes):
        plain: Any = next(b for b in (int, str, bytes) if isinstance(value, b))
        base = plain(value)
    elif isinstance(value, float):
        base = float(value).hex()
    elif by_identity:
        base = Same(value)
    state = _state(value, contents)
    if state is None:
        # Its content cannot be read, so compare by `==` or by identity.
        return kind, base or (value if hashable else Same(value))
    if depth <= 0:
        return kind, Same(value)
    key = kind, base, tuple([(name, exact(x, contents, depth - _OBJECT)) for name, x in state])
    if _has_slots(kind):
        contents.append(Changing(value, key, depth))
    return key


class Changing:
    """A part of a static value, other than a dict or a list, that may change in place.

    It compares keys to detect a change.
    """

    __slots__ = ("_depth", "_key", "_value")

    def __init__(self, value: Any, key: Any, depth: int):
        self._value = value
        self._key = key
        self._depth = depth

    def same(self) -> bool:
        """Whether it is unchanged."""
        return exact(self._value, [], self._depth) == self._key

    def held(self) -> list[Any]:
        """Its attributes or items."""
        state = _state(self._value, [])
        return [x for _, x in state] if state is not None else list(self._value)


def _is_unique(value: Any) -> bool:
    """Whether no other object has the same key."""
    kind = type(value)
    if kind is types.MethodType:
        return _is_unique(value.__self__)
    return kind is not functools.partial and kind.__eq__ is object.__eq__


def _copied(value: Any) -> Any:
    if type(value) is types.MappingProxyType:
        return types.MappingProxyType(copy.deepcopy(dict(value)))
    if type(value) is functools.partial:
        args = map(_copied_container, value.args)
        named = {name: _copied_container(x) for name, x in value.keywords.items()}
        return functools.partial(value.func, *args, **named)
    return copy.deepcopy(value)


def _copied_container(value: Any) -> Any:
    changes = isinstance(value, _CONTAINERS) and not isinstance(value, jax.Array)
    return copy.deepcopy(value) if changes else value


def _plain(value: Any) -> Any:
    """Convert a library's mapping, sequence or set to Python's own."""
    if isinstance(value, collections.abc.Mapping):
        return dict(value.items())
    return set(value) if isinstance(value, collections.abc.Set) else list(value)


@functools.lru_cache(maxsize=1024)
def _has_slots(kind: type) -> bool:
    """Whether objects of a class have slots that may be set."""
    params = getattr(kind, "__dataclass_params__", None)
    slots = any(set(_slots(base)) - {"__dict__", "__weakref__"} for base in kind.__mro__)
    return slots and not (params is not None and params.frozen)


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _has_hash(value: Any) -> bool:
    """Whether `value` has a hash. Even a hashable class may fail for an instance that holds a list."""
    try:
        hash(value)
    except Exception:  # whatever a user's __hash__ raises
        return False
    return True


@functools.lru_cache(maxsize=1024)
def _is_trusted(module: Any) -> bool:
    if not isinstance(module, str):
        return False
    top = module.partition(".")[0]
    file = getattr(sys.modules.get(top), "__file__", None) or ""
    return top in TRUSTED or not _INSTALLED.isdisjoint(pathlib.PurePath(file).parts)


_INSTALLED = {"site-packages", "dist-packages"}


def _inside(value: Any, contents: list[Any], depth: int) -> Any:
    """The key of an unhashable part of a static value."""
    kind = type(value)
    if isinstance(value, np.ndarray):
        return kind, value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, jax.Array) or depth <= 0:
        return kind, Same(value)
    depth -= _CONTAINER
    if isinstance(value, dict):
        items = [(exact(k, contents, depth), exact(x, contents, depth)) for k, x in value.items()]
    else:
        items = [exact(x, contents, depth) for x in value]
    key = kind, frozenset(items) if isinstance(value, set) else tuple(items)
    own = getattr(value, "__dict__", None)
    if type(own) is dict:
        # Its class is a subclass, so it may have attributes beside its items.
        key = *key, exact(own, contents, depth)
    if isinstance(value, list | dict):
        contents.append(value)
    else:
        contents.append(Changing(value, key, depth + _CONTAINER))
    return key


def _state(value: Any, contents: list[Any]) -> list[tuple[str, Any]] | None:
    """The attributes of an object by name; None if they cannot be read."""
    kind = type(value)
    found: list[tuple[str, Any]] = []
    readable = False
    for base in kind.__mro__:
        for name in _slots(base):
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                readable = True
                found.append((name, getattr(value, name)))
    own = getattr(value, "__dict__", None)
    if type(own) is dict:
        readable = True
        found += own.items()
        params = getattr(kind, "__dataclass_params__", None)
        if params is None or not params.frozen:
            contents.append(own)
    return found if readable else None
