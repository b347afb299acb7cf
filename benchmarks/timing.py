"""Takes times: contenders take turns in shuffled order, for many rounds, with ratios round by round."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Ratio(NamedTuple):
    """Time of a contender divided by the baseline's in the same round: median, 10th and 90th percentile."""

    median: float
    low: float
    high: float
    microseconds: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


Contender = Callable[[int], Any]
"""Runs a number of calls and returns something to wait for."""


def interleave(
    contenders: dict[str, Contender], baseline: str, *, rounds: int, seconds: float = 0.02
) -> dict[str, Ratio]:
    """Time every contender once in each round, and compare within the round.

    The speed of a machine drifts, but hardly within a round of some tens of milliseconds.
    """
    calls = {name: _calls(run, seconds) for name, run in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    rng = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            rng.shuffle(order)
            for name in order:
                times[name].append(_time(contenders[name], calls[name]))
            gc.collect()
    finally:
        gc.enable()
    return {name: ratio(ts, times[baseline]) for name, ts in times.items()}


def _calls(run: Contender, seconds: float) -> int:
    run(1)
    once = min(_time(run, 2) for _ in range(3))
    return max(1, int(seconds / once))


def _time(run: Contender, calls: int) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(calls))
    return (time.perf_counter() - start) / calls


def ratio(times: list[float], base: list[float]) -> Ratio:
    """The times of a contender divided by those of the baseline, round by round."""
    ratios = sorted(t / b for t, b in zip(times, base, strict=True))
    at = len(ratios) - 1
    return Ratio(
        statistics.median(ratios),
        ratios[round(0.1 * at)],
        ratios[round(0.9 * at)],
        statistics.median(times) * 1e6,
    )


def repeat(fn: Callable[[], Any]) -> Contender:
    """A contender that calls `fn` again and again."""

    def run(calls: int) -> Any:
        out = None
        for _ in range(calls):
            out = fn()
        return out

    return run
