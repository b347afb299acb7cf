"""Tools to find out what a program does: why it compiles, and where the first nan comes from."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from nnx.probe.nonfinite import NonFinite, find_nonfinite
from nnx.transforms.explain import Explanation, listeners
from nnx.transforms.jit import BoundJit
from nnx.transforms.jitted import Jit
from refx import RefError
from refx.text import a_kind

__all__ = [
    "Explanation",
    "NonFinite",
    "TooManyTracesError",
    "assert_max_traces",
    "find_nonfinite",
    "retraces",
]

_log = logging.getLogger("nnx")


class TooManyTracesError(RefError, AssertionError):
    """A compiled function was traced more often than `nnx.debug.assert_max_traces` allows."""


@contextlib.contextmanager
def retraces() -> Iterator[list[Explanation]]:
    """Within this context, log each new trace of a compiled function, with its reason.

    The reasons are those of `step.explain(...)`: the differences from the most similar program of
    the function. They go to the logger `"nnx"` as warnings, and into the list that the context
    returns. Only traces in this thread are logged, including those for probes such as `nnx.capture`.

    >>> import jax.numpy as jnp, nnx
    >>> step = nnx.jit(lambda x: x + 1)
    >>> _ = step(jnp.ones(3))
    >>> with nnx.debug.retraces() as seen:
    ...     _ = step(jnp.ones(3)), step(jnp.ones(4))
    >>> print(*seen)
    nnx.jit(<lambda>) compiles program number 2:
      x: float32[3] → float32[4]
    """
    seen: list[Explanation] = []
    thread = threading.get_ident()

    def listen(jitted: Any, explanation: Explanation) -> None:
        if threading.get_ident() == thread:
            seen.append(explanation)
            _log.warning("%s", explanation)

    listeners.append(listen)
    try:
        yield seen
    finally:
        listeners.remove(listen)


class _Limit:
    """A limit on traces. It holds from now on, or within the context."""

    def __init__(self, jitted: Jit, limit: int):
        self._jitted = jitted
        self._limit = limit
        listeners.append(self)
        self._check(None)

    def __call__(self, jitted: Any, explanation: Explanation) -> None:
        if jitted is self._jitted:
            self._check(explanation)

    def _check(self, explanation: Explanation | None) -> None:
        traces = self._jitted._traces
        if traces <= self._limit:
            return
        self._remove()
        why = f" {explanation}" if explanation is not None else ""
        raise TooManyTracesError(
            f"{self._jitted._name} was traced {traces} times, but the limit is {self._limit}.{why}"
        )

    def _remove(self) -> None:
        if self in listeners:
            listeners.remove(self)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        self._remove()


def assert_max_traces(fn: Callable[..., Any], n: int) -> contextlib.AbstractContextManager[None]:
    """Raise as soon as a compiled function has been traced more than `n` times in all.

    The limit holds from now on. Used as a context, `with nnx.debug.assert_max_traces(step, 1):`, it
    holds within the block.

    Args:
      fn: a function that `nnx.jit` returned.
      n: the largest number of traces, including those before this call. Two kinds of trace do not
        count: the second trace for a closure that the first one found, and a trace that only finds
        out what to donate.

    Raises:
      TooManyTracesError: there were more; the message says what was new.
      TypeError: `fn` was not made by `nnx.jit`.

    >>> import jax.numpy as jnp, nnx
    >>> step = nnx.jit(lambda x: x + 1)
    >>> with nnx.debug.assert_max_traces(step, 1):
    ...     _ = step(jnp.ones(3)), step(jnp.zeros(3))
    """
    jitted = fn._jit if isinstance(fn, BoundJit) else fn
    if not isinstance(jitted, Jit):
        raise TypeError(
            "nnx.debug.assert_max_traces takes a function that nnx.jit returned, but got "
            f"{a_kind(type(fn))}: {fn!r:.80}."
        )
    return _Limit(jitted, n)
