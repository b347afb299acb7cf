"""The traces of one function that are kept, and when one of them is used again.

A trace is keyed by what goes into it openly: the types and the structure of the arguments, and those
settings of JAX that its own caches are keyed by. What goes into it otherwise is the matter of `guard`.
"""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import jax
import numpy as np

from nnx.purify.guard import Guard, guard_of
from nnx.purify.record import Record, is_recording

__all__: list[str] = []

# So many traces are kept of one function.
_MOST = 128
# After so many traces without a guard, no other is expected.
_ATTEMPTS = 3


class Trace(Protocol):
    """What may be kept."""

    def closes_over_tracers(self) -> bool: ...


T = TypeVar("T", bound=Trace)


class _Kept(NamedTuple, Generic[T]):
    guard: Guard
    trace: T


class Traces(Generic[T]):
    """The traces of `fn` that are kept.

    Args:
      fn: the function.
      make: traces it for some arguments.
    """

    def __init__(self, fn: Callable[..., Any], make: Callable[[Any], T]):
        self._fn = fn
        self._make = make
        self._kept: dict[Any, _Kept[T]] = {}
        self._lock = threading.Lock()
        # How often there was no guard for arguments of these types.
        self._refused: collections.Counter[Any] = collections.Counter()

    def get(self, args: Any) -> T:
        """The trace for arguments of these types: a kept one if it still holds, otherwise new."""
        key = None if is_recording() else _signature(args)
        if key is None:
            return self._make(args)
        kept = self._kept.get(key)
        if kept is not None and kept.guard.stands():
            return kept.trace
        return self._renew(key, args)

    def get_kept(self, args: Any) -> T | None:
        """The same for a trace that is compiled; None where it cannot be kept."""
        if is_recording():
            return self._make(args)
        key = _signature(args)
        if key is None or self._refused[key] >= _ATTEMPTS:
            return None
        trace = self.get(args)
        return trace if key in self._kept else None

    def _renew(self, key: Any, args: Any) -> T:
        with self._lock:
            self._kept.pop(key, None)
        if self._refused[key] >= _ATTEMPTS:
            return self._make(args)
        others = [kept.guard for kept in list(self._kept.values()) if kept.guard.stands()]
        with Record() as record:
            trace = self._make(args)
        for guard in others:
            guard.absorb()
        if trace.closes_over_tracers():
            return trace
        guard = guard_of(self._fn, _classes_of(args), record)
        with self._lock:
            if guard is not None:
                while len(self._kept) >= _MOST:
                    del self._kept[next(iter(self._kept))]
                self._kept[key] = _Kept(guard, trace)
            elif len(self._refused) < _MOST:
                self._refused[key] += 1
        return trace


def _signature(args: Any) -> Any:
    """What tells apart arguments that a function may tell apart; None if that cannot be said."""
    # The one setting that a program depends on and JAX's own caches do not.
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
        # No arguments of a traced function, as JAX will say.
        return None


def _is_plain(x: Any) -> bool:
    """Whether the structure of `x` is what its treedef says and no more: no classes of a user's."""
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
    """A number for each combination of the settings of JAX that a trace depends on."""

    _numbers = itertools.count()

    def __init__(self) -> None:
        self.number = next(self._numbers)


# JAX calls this once for each combination that its caches tell apart, and gives the same answer again.
_settings = jax.jit(_Settings)
