"""Static arguments: hashable constants of a compiled program, given by number or by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from nnx.transforms.arguments import ArgumentError
from refx import StructureError, UnhashableStaticError, opened
from refx.static import Static

__all__: list[str] = []


def select_arguments(
    name: str, fn: Any, nums: Any, names: Any, *, bound: int, option: str
) -> tuple[set[int], set[str]]:
    """The numbers and the names of the arguments that `nums` and `names` select.

    As in `jax.jit`, an argument selected by number is also selected by name, and the other way round.

    Args:
      name: the transformation, for messages.
      fn: the function.
      nums: a number or several. A negative number counts from the last positional argument.
      names: a name or several.
      bound: how many of the first arguments do not count.
      option: the purpose of the arguments, `"static"` or `"donate"`, for messages.

    Raises:
      ArgumentError: the function does not have an argument of that number or name.
    """
    nums = (nums,) if isinstance(nums, int) else tuple(nums if nums is not None else ())
    names = (names,) if isinstance(names, str) else tuple(names if names is not None else ())
    if not nums and not names:
        return set(), set()
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        return {n + bound if n >= 0 else n for n in nums}, set(names)
    kinds = {p.kind for p in parameters}
    positional = [
        p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    own = len(positional) - bound
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        wrong = [n for n in nums if not -own <= n < own]
        if wrong:
            raise ArgumentError(
                f"{name} has {option}_argnums={nums}, but its function takes {own} positional "
                f"arguments."
            )
    known = {p.name for p in parameters[bound:] if p.kind in _BY_NAME}
    unknown = [n for n in names if n not in known]
    if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
        raise ArgumentError(
            f"{name} has {option}_argnames={names}, but its function has no argument "
            f"{unknown[0]!r}; it has {', '.join(map(repr, sorted(known))) or 'none'}."
        )
    # With *args, only the call tells what a negative number means.
    last = 0 if inspect.Parameter.VAR_POSITIONAL in kinds else len(positional)
    by_num = {n + bound if n >= 0 else n + last for n in nums}
    by_name = set(names) | {positional[n] for n in by_num if 0 <= n < len(positional)}
    return by_num | {i for i, p in enumerate(positional) if p in names}, by_name


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Statics:
    """Take the static arguments out of a call, and put them back."""

    def __init__(self, name: str, fn: Any, nums: Any, names: Any, *, bound: int):
        self._name = name
        self.nums, self.names = select_arguments(
            name, fn, nums, names, bound=bound, option="static"
        )
        self.active = bool(self.nums or self.names)

    def numbers(self, args: Any) -> set[int]:
        """The numbers of the static arguments among these positional ones."""
        return {n % len(args) if n < 0 and args else n for n in self.nums}

    def take(self, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
        nums = self.numbers(args)
        fixed = {i: a for i, a in enumerate(args) if i in nums}
        named = {k: v for k, v in kwargs.items() if k in self.names}
        for where, value in (*fixed.items(), *named.items()):
            _check_static(self._name.split("(")[0], where, value)
        # Wrapped in `Static`, since 2 and 2.0 need different programs although they are equal.
        statics = (
            len(args),
            tuple((i, Static(value)) for i, value in fixed.items()),
            tuple((k, Static(named[k])) for k in sorted(named)),
        )
        rest = tuple(a for i, a in enumerate(args) if i not in nums)
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


def _check_static(name: str, where: Any, value: Any) -> None:
    which = f"argument {where}" if isinstance(where, int) else f"argument {where!r}"
    if opened.holds_identity(value):
        raise StructureError(
            f"Static {which} of {name} holds a module or a Ref, so its updates would go unnoticed. "
            f"Pass it as an ordinary argument: its structure is static anyway."
        )
    try:
        hash(value)
    except TypeError:
        raise UnhashableStaticError(
            f"Static {which} of {name} is a {type(value).__name__}, which cannot be hashed: "
            f"{value!r}. Use a tuple instead of a list, or make it an ordinary argument."
        ) from None
