"""The cached traces of a function, and when one of them can be used again.

The key of a trace covers its visible inputs: the types and the structure of the arguments, and the
settings that JAX's own caches use as a key. `guard` covers everything else that the function reads.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import jax
import numpy as np

from nnx.purify.guard import Guard, guard_of
from nnx.purify.record import Record, is_recording

__all__: list[str] = []

# The most traces that are kept for one function.
_MOST = 128
# After this many traces in vain, expect the next ones to be in vain, too.
_ATTEMPTS = 3


class Trace(Protocol):
    """The traces that may be kept."""

    def closes_over_tracers(self) -> bool: ...


T = TypeVar("T", bound=Trace)


@dataclass
class _Entry(Generic[T]):
    """The state for arguments of some types: a trace and its guard, unless the guard was refused.

    Recording makes a trace three times slower. So after a number of `vain` traces (refused, or
    outdated before they were used), the next `wait` traces are not recorded.
    """

    kept: tuple[Guard, T] | None = None
    vain: int = 0
    wait: int = 0


class Traces(Generic[T]):
    """The cached traces of `fn`.

    Args:
      fn: the function.
      make: traces `fn` for some arguments.
    """

    def __init__(self, fn: Callable[..., Any], make: Callable[[Any], T]):
        self._fn = fn
        self._make = make
        self._entries: dict[Any, _Entry[T]] = {}
        self._lock = threading.Lock()

    def get(self, args: Any) -> T:
        """The trace for arguments of these types: a cached one if it is still valid, or a new one."""
        key = None if is_recording() else _signature(args)
        if key is None:
            return self._make(args)
        entry = self._entry(key)
        trace = self._kept(entry)
        if trace is not None:
            return trace
        if entry.wait:
            entry.wait -= 1
            return self._make(args)
        return self._renew(entry, args)

    def get_kept(self, args: Any) -> T | None:
        """The same for a trace that will be compiled; None if it cannot be kept."""
        if is_recording():
            return self._make(args)
        key = _signature(args)
        if key is None:
            return None
        entry = self._entry(key)
        trace = self._kept(entry)
        if trace is not None:
            return trace
        if entry.kept is None and entry.vain >= _ATTEMPTS:
            return None
        trace = self._renew(entry, args)
        return None if entry.kept is None else trace

    def _entry(self, key: Any) -> _Entry[T]:
        entry = self._entries.get(key)
        if entry is None:
            with self._lock:
                while len(self._entries) >= _MOST:
                    del self._entries[next(iter(self._entries))]
                entry = self._entries.setdefault(key, _Entry())
        return entry

    def _kept(self, entry: _Entry[T]) -> T | None:
        kept = entry.kept
        if kept is None or not kept[0].stands():
            return None
        entry.vain = 0
        return kept[1]

    def _renew(self, entry: _Entry[T], args: Any) -> T:
        entry.kept = None
        guards = [kept[0] for other in list(self._entries.values()) if (kept := other.kept)]
        standing = [guard for guard in guards if guard.stands()]
        with Record() as record:
            trace = self._make(args)
        for guard in standing:
            guard.absorb()
        if not trace.closes_over_tracers():
            guard = guard_of(self._fn, _classes_of(args), record)
            entry.vain += 1
            entry.wait = min(2**entry.vain, _MOST) if entry.vain >= _ATTEMPTS else 0
            entry.kept = None if guard is None else (guard, trace)
        return trace


def _signature(args: Any) -> Any:
    """A key that differs for arguments that a function can distinguish; None if there is no such key."""
    # The only setting that a program depends on and that JAX's own caches ignore.
    keys: str = jax.config.jax_default_prng_impl  # pyright: ignore[reportAttributeAccessIssue]
    settings = _settings.eval_shape().number, keys
    if not args:
        return settings
    if not _is_plain(args):
        return None
    leaves, treedef = jax.tree.flatten(args)
    try:
        return *settings, treedef, *map(jax.typeof, leaves)
    except (TypeError, ValueError, OverflowError):
        # A traced function cannot take these arguments. JAX will say so.
        return None


def _is_plain(x: Any) -> bool:
    """Whether the treedef describes the structure of `x` completely, without classes of the user."""
    kind = type(x)
    if kind is tuple or kind is list or _is_namedtuple(kind):
        return all(map(_is_plain, x))
    if kind is dict:
        return all(type(key) is str for key in x) and all(map(_is_plain, x.values()))
    return x is None or isinstance(x, jax.Array | np.ndarray | np.generic | int | float | complex)


def _is_namedtuple(kind: type) -> bool:
    return issubclass(kind, tuple) and hasattr(kind, "_fields")


def _classes_of(x: Any) -> list[type]:
    """The classes of the namedtuples in some arguments."""
    found = [type(x)] if _is_namedtuple(type(x)) else []
    if isinstance(x, tuple | list | dict):
        for item in x.values() if isinstance(x, dict) else x:
            found += _classes_of(item)
    return found


@jax.tree_util.register_static
class _Settings:
    """A number for each combination of the JAX settings that a trace depends on."""

    _numbers = itertools.count()

    def __init__(self) -> None:
        self.number = next(self._numbers)


# JAX calls this once for each combination that its caches distinguish, and then returns the cached
# answer.
_settings = jax.jit(_Settings)
