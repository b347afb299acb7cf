"""JAX's traces: which one runs here, which are around it, and what users call it.

Only this file knows how JAX represents traces. `tests/refx/test_trace.py` states its assumptions.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.extend import core as jex_core

__all__: list[str] = []

current_trace: Callable[[Any], Any] = jex_core.find_top_trace
"""`current_trace(())` is JAX's current trace object. Never keep it: keep a weak reference."""


def _root_trace() -> Any:
    # This module may be imported inside a transformation, so take the last trace of the chain, and
    # not just the current one.
    trace = current_trace(())
    while (parent := getattr(trace, "parent_trace", None)) is not None:
        trace = parent
    return trace


EVAL = _root_trace()
"""JAX's evaluating trace, a singleton. Code outside of all transformations runs in it."""


def trace_ref() -> Callable[[], Any]:
    """A weak reference to the current trace. JAX's leak checker would report a strong one."""
    return weakref.ref(current_trace(()))


class Marker:
    """Takes the place of the trace reference in Refs and Nodes that follow a special rule.

    A marker is never a live trace, so it fails the identity test before a write.
    """

    def __init__(self, name: str):
        self.name = name

    def __call__(self) -> None:
        return None


READ_ONLY = Marker("read-only")
CONSTANT = Marker("constant")
# For a Ref that JAX rebuilt around something that is not an array: a bool of a mask, an axis, a
# shape, a sharding. Any program may read it as a constant. It may be written only outside of programs.
LABEL = Marker("label")
# For a Ref of a frozen tree. Any program may read it as a constant. It must not be written.
FROZEN = Marker("frozen")


def runs(trace: Any) -> bool:
    """Whether `trace` is the current trace or one around it."""
    at = current_trace(())
    while at is not None and at is not trace:
        at = getattr(at, "parent_trace", None)
    return at is not None


def program_between(home: Any, trace: Any) -> Any:
    """The first trace from `trace` out to `home` whose program JAX keeps; None if there is none."""
    while trace is not None and trace is not home:
        if type(trace).__name__ == "DynamicJaxprTrace":
            return trace
        trace = getattr(trace, "parent_trace", None)
    return None


def in_program() -> bool:
    """Whether this code is being traced into a program that JAX compiles and keeps."""
    return program_between(EVAL, current_trace(())) is not None


def without_jit() -> bool:
    """Whether `jax.disable_jit()` is active, so code should run step by step."""
    return jax.config.jax_disable_jit  # pyright: ignore[reportAttributeAccessIssue]


def is_batched(value: Any) -> bool:
    """Whether `value` differs between the lanes of the current `vmap`."""
    trace = current_trace(())
    return any(
        isinstance(x, Tracer) and x._trace is trace and getattr(x, "batch_dim", None) is not None
        for x in jax.tree.leaves(value)
    )


def kind_of(trace: Any) -> str:
    """The name of a plain jax trace, in a user's words."""
    kinds = {
        "DynamicJaxprTrace": "a plain jax transformation that compiles (jax.jit, lax.scan, ...)",
        "BatchTrace": "a plain jax.vmap",
        "LinearizeTrace": "a plain jax.grad (or vjp, linearize)",
        "JVPTrace": "a plain jax.grad or jax.jvp",
    }
    return kinds.get(type(trace).__name__, "a plain jax transformation")


_ABSTRACT = {"eval_shape": "jax.eval_shape", "make_jaxpr_f": "jax.make_jaxpr"}


def only_looked_at(trace: Any) -> str | None:
    """The name of a jax function that traces here but compiles nothing. Slow, so only for messages."""
    if type(trace).__name__ != "DynamicJaxprTrace":
        return None
    frame = sys._getframe()
    while frame is not None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module.startswith("jax."):
            if name in _ABSTRACT:
                return _ABSTRACT[name]
            if name in ("cache_miss", "scan", "cond", "while_loop", "checkpoint"):
                return None
        frame = frame.f_back
    return None
