"""Static arguments: hashable constants of a compiled program, said by number or by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax

from refx import StructureError, UnhashableStaticError
from refx.node import is_identity
from refx.static import Static

__all__: list[str] = []


class Statics:
    """Which arguments are static, and how they are taken out of a call and put back."""

    def __init__(self, fn: Any, nums: Any, names: Any, *, bound: int):
        nums = (nums,) if isinstance(nums, int) else tuple(nums or ())
        names = (names,) if isinstance(names, str) else tuple(names or ())
        self.active = bool(nums or names)
        if not self.active:
            return
        nums = tuple(n + bound if n >= 0 else n for n in nums)
        try:
            parameters = list(inspect.signature(fn).parameters.values())
        except (TypeError, ValueError):
            parameters = []
        positional = [
            p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        # As in jax.jit: what is static by number is static by name too, and the other way round.
        by_num = {n % len(positional) if n < 0 and positional else n for n in nums}
        self.names = set(names) | {positional[n] for n in by_num if n < len(positional)}
        self.nums = by_num | {i for i, name in enumerate(positional) if name in names}

    def take(self, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
        fixed = {i: a for i, a in enumerate(args) if i in self.nums}
        named = {k: v for k, v in kwargs.items() if k in self.names}
        for where, value in (*fixed.items(), *named.items()):
            _check_static(where, value)
        # As `Static`, since programs for 2 and 2.0 differ, although the numbers are equal.
        statics = (
            len(args),
            tuple((i, Static(value)) for i, value in fixed.items()),
            tuple((k, Static(named[k])) for k in sorted(named)),
        )
        rest = tuple(a for i, a in enumerate(args) if i not in self.nums)
        return rest, {k: v for k, v in kwargs.items() if k not in self.names}, statics

    def restore(self, fn: Callable[..., Any], statics: Any) -> Callable[..., Any]:
        if statics is None:
            return fn
        count, fixed, named = statics
        fixed = {i: static.value for i, static in fixed}
        named = {k: static.value for k, static in named}

        def with_statics(*args: Any, **kwargs: Any) -> Any:
            rest = iter(args)
            full = [fixed[i] if i in fixed else next(rest) for i in range(count)]
            return fn(*full, **kwargs, **named)

        return with_statics


def check_plain(fn: Any, name: str) -> None:
    """Refuse a function whose call only makes a coroutine or a generator, and runs nothing."""
    if inspect.iscoroutinefunction(fn) or inspect.isasyncgenfunction(fn):
        raise TypeError(
            f"nnx.jit takes a plain function, but {name} is async: a call of it runs nothing yet, so "
            f"there is nothing to compile. Jit the part that computes, and await outside of it."
        )
    if inspect.isgeneratorfunction(fn):
        raise TypeError(
            f"nnx.jit takes a plain function, but {name} is a generator function (it has a yield): "
            f"a call of it runs nothing yet, so there is nothing to compile. Return a list or a "
            f"tuple, or use nnx.scan."
        )


def _check_static(where: Any, value: Any) -> None:
    which = f"argument {where}" if isinstance(where, int) else f"argument {where!r}"
    if any(map(is_identity, jax.tree.leaves(value, is_leaf=is_identity))):
        raise StructureError(
            f"Static {which} of nnx.jit holds a module or a Ref, whose updates would not be seen. "
            f"Pass it as an ordinary argument: its structure is static there by itself."
        )
    try:
        hash(value)
    except TypeError:
        raise UnhashableStaticError(
            f"Static {which} of nnx.jit is a {type(value).__name__}, which cannot be hashed: "
            f"{value!r}. Use a tuple for a list, or make the argument an ordinary one."
        ) from None
