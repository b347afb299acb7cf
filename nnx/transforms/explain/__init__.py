"""Explain why a compiled function needs a new program.

We record a `Program` when a function is traced, so a call that does not trace costs nothing.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import jax

from nnx._ambient import ambient
from nnx.transforms.call import Call
from nnx.transforms.explain.differences import (
    ANOTHER,
    Difference,
    Program,
    View,
    avals_of,
    differences,
    placed_elsewhere,
    placement,
)
from nnx.transforms.layout import Layout

__all__: list[str] = []


class Explanation:
    """Says whether a call is already compiled, and if not, what is new. Its `str` is for people.

    Attributes:
      name: the function.
      compiled: whether there is a program for the call.
      reasons: the differences from the most similar program. Empty if the call is compiled.
    """

    def __init__(self, name: str, compiled: bool, reasons: list[str], count: int):
        self.name = name
        self.compiled = compiled
        self.reasons = reasons
        self._count = count

    def __str__(self) -> str:
        if self.compiled:
            return f"{self.name} is compiled for this call."
        ordinal = f"program number {self._count + 1}" if self._count else "the first program"
        return "\n  ".join([f"{self.name} compiles {ordinal}:", *self.reasons])

    def __repr__(self) -> str:
        return f"Explanation({str(self)!r})"


_UNASKED = Explanation("", False, [], 0)

listeners: list[Callable[[Any, Explanation], None]] = []
"""For each new trace, these are called with the jitted function and an Explanation, in the call's thread."""

# The jitted functions that have programs, by their code.
_by_code: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()


def programs_of(jitted: Any) -> list[Program]:
    """The programs of a jitted function."""
    return [p for layout in list(jitted._plans.layouts.values()) for p in layout.programs]


def note(jitted: Any, layout: Layout, call: Call) -> None:
    """Record that a function was traced for a call. This runs at the end of the trace."""
    if call.found:
        # The call starts again with more inputs.
        return
    new = Program(jitted, layout, call)
    explanation = _explained(jitted, new) if listeners else _UNASKED
    known = programs_of(jitted)
    if known and jitted._last_program in known:
        _warn_of_numbers(jitted, differences(View(jitted, jitted._last_program), View(jitted, new)))
    jitted._last_program = new
    before = [p for p in layout.programs if p.is_like(new)]
    new.placements = [x for p in before for x in p.placements] + new.placements
    # Change the list in place: layouts of one structure with several placements share it.
    layout.programs[:] = [p for p in layout.programs if p not in before] + [new]
    code = _code(jitted)
    if code is not None:
        _by_code.setdefault(code, weakref.WeakSet()).add(jitted)
    jitted._traces += 1
    for listener in list(listeners):
        listener(jitted, explanation)


# This many new programs in a row that differ only in one value are a mistake.
WARN_AFTER = 5
_ADVICE = {
    "setting": "A float is part of the program. Make it an array or a Ref, as in self.{} = nnx.Ref(...), or "
    "pass it as an argument.",
    "static argument": "A static argument is part of the program. Leave it out of static_argnums and "
    "static_argnames.",
    "variable": "A value that the function reads from a variable is part of the program. Keep it in a "
    "Ref (nnx.Ref), or pass it as an argument.",
}


def _warn_of_numbers(jitted: Any, found: list[Difference]) -> None:
    """Warn about a number that is part of the program and changes in each call."""
    (first, *others) = found
    values = [getattr(x, "value", x) for x in first.values]
    # A value that is compared by identity, such as an array, has a number instead of a Static.
    kinds = (float, int) if first.kind == "variable" else (float,)
    if others or not first.kind or not all(type(x) in kinds for x in values):
        jitted._number_changes = "", 0
        return
    name, count = jitted._number_changes
    jitted._number_changes = first.name, count + 1 if first.name == name else 1
    if jitted._number_changes[1] != WARN_AFTER:
        return
    last = "" if first.change == ANOTHER else f", the last time {first.change}"
    advice = _ADVICE[first.kind].format(first.name.rpartition(".")[2])
    warnings.warn(
        f"{jitted._name} was compiled again {WARN_AFTER} times in a row only because the value of "
        f"{first.name} changed{last}. {advice}",
        stacklevel=2,
    )


def explain(jitted: Any, call: Call) -> Explanation:
    """Explain whether a call has a program, and if not, what is new."""
    new = Program(jitted, call.layout, call)
    for program in call.layout.programs:
        if program.is_like(new):
            if new.placements[0] in program.placements:
                return Explanation(jitted._name, True, [], 0)
            reasons = placed_elsewhere(View(jitted, program), new)
            return Explanation(jitted._name, False, reasons, len(programs_of(jitted)))
    return _explained(jitted, new)


def note_compiled(event: str, duration_secs: float, **_: Any) -> None:
    """A listener for `jax.monitoring`: JAX has compiled, perhaps without a trace, for a new placement."""
    call: Call | None = ambient.call
    if call is None or not event.endswith("backend_compile_duration") or not call.layout.programs:
        return
    avals = avals_of(call)
    for program in call.layout.programs:
        if program.avals == avals and (now := placement(call)) not in program.placements:
            program.placements.append(now)


# JAX compiles again without a trace if inputs are on other devices. This listener tells us.
jax.monitoring.register_event_duration_secs_listener(note_compiled)


def _explained(jitted: Any, new: Program) -> Explanation:
    known = programs_of(jitted)
    reason = jitted.reason or "it was not called before"
    like = [p for p in new.layout.programs if p.is_like(new)]
    if like and new.placements[0] not in like[-1].placements:
        reasons = placed_elsewhere(View(jitted, like[-1]), new)
        return Explanation(jitted._name, False, reasons, len(known))
    if like:
        reason = (
            "the same call was traced before: JAX's caches were cleared, or dropped the program"
        )
    elif known:
        view = View(jitted, new)
        each = (differences(View(jitted, old), view) for old in reversed(known))
        reasons = [d.text for d in min(each, key=len)]
        return Explanation(jitted._name, False, reasons, len(known))
    elif any(programs_of(twin) for twin in _twins(jitted)):
        reason = (
            "another function: nnx.jit was called again on the same code, and each result compiles "
            "separately. Call nnx.jit once, outside of the loop, and keep its result"
        )
    elif jitted._plans.forgotten:
        reason = "there were more different calls than are remembered"
    return Explanation(jitted._name, False, [reason], len(known))


def _twins(jitted: Any) -> list[Any]:
    code = _code(jitted) if jitted.reason is None else None
    found = _by_code.get(code, ()) if code is not None else ()
    return [other for other in found if other is not jitted]


def _code(jitted: Any) -> Any:
    fn = jitted._fn
    while not hasattr(fn, "__code__") and hasattr(fn, "func"):
        fn = fn.func
    # For all loops and branches, the code is the same, and ours.
    return None if _is_ours(fn) else getattr(fn, "__code__", None)


def _is_ours(fn: Any) -> bool:
    return (getattr(fn, "__module__", None) or "").startswith("nnx.transforms.")
