"""Checks whether the library has become slower than in the committed results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.timing import Ratio

# The names of this library's contenders begin with one of these.
OURS = ("nnx", "import nnx")


def worse(before: Any, now: Any) -> list[str]:
    """A line for each of our ratios that is worse than before by more than its spread.

    That means that its median is above the old 90th percentile, and its 10th percentile is above the
    old median: neither run could plausibly have given the other's ratio.
    """
    known = dict(_ratios(before, ()))
    lines = []
    for path, ratio in _ratios(now, ()):
        was = known.get(path)
        if was is None or not any(str(part).startswith(OURS) for part in path):
            continue
        if ratio.median > was.high and ratio.low > was.median:
            lines.append(f"{' / '.join(path)}: {ratio}, was {was}")
    return lines


def _ratios(raw: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Ratio]]:
    """Every Ratio in the results, with the names that lead to it. In JSON it is a list of numbers."""
    if isinstance(raw, dict):
        for name, part in raw.items():
            yield from _ratios(part, (*path, str(name)))
    elif isinstance(raw, list | tuple) and len(raw) == 4 and all(_is_number(x) for x in raw):
        yield path, Ratio(*raw)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)
