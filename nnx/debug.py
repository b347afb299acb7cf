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
    """Within this context each new trace of a compiled function is logged, with its reason.

    The reasons are those of `step.explain(...)`: what is new compared with the program of the function
    that is most like it. They go to the logger `"nnx"`, as warnings, and into the list that the context
    gives. Traces of this thread count, those for probes (`nnx.capture` and its kin) too.

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
    """A limit that holds from now on, or as long as the context does."""

    def __init__(self, jitted: Jit, limit: int):
        self._jitted = jitted
        self._limit = limit
        listeners.append(self)
        self._check(None)

    def __call__(self, jitted: Any, explanation: Explanation) -> None:
        if jitted is self._jitted:
            self._check(explanation)

    def _check(self, explanation: Explanation | None) -> None:
        traces = self._jitted.traces
        if traces <= self._limit:
            return
        self._remove()
        why = f" {explanation}" if explanation is not None else ""
        raise TooManyTracesError(
            f"{self._jitted._name} was traced {traces} times, and may be {self._limit} times.{why}"
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

    It holds from now on; as a context, `with nnx.debug.assert_max_traces(step, 1):`, as long as that.

    Args:
      fn: what `nnx.jit` returned.
      n: how many traces there may be, those before this call included. A closure that is found in
        the first trace, and a trace that only finds out what to donate, do not count.

    Raises:
      TooManyTracesError: there are more; the message says what was new.
      TypeError: `fn` was not made by `nnx.jit`.

    >>> import jax.numpy as jnp, nnx
    >>> step = nnx.jit(lambda x: x + 1)
    >>> with nnx.debug.assert_max_traces(step, 1):
    ...     _ = step(jnp.ones(3)), step(jnp.zeros(3))
    """
    jitted = fn._jit if isinstance(fn, BoundJit) else fn
    if not isinstance(jitted, Jit):
        raise TypeError(
            f"nnx.debug.assert_max_traces takes what nnx.jit returned, but got a "
            f"{type(fn).__name__}: {fn!r:.80}."
        )
    return _Limit(jitted, n)
