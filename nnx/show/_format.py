"""Short texts for values, shapes and sizes. Nothing here reads the data of an array."""

from __future__ import annotations

import functools
import re
import types
from typing import Any

import numpy as np

from refx import Node, Ref
from refx.text import array_text, is_arraylike

__all__ = ["bytes_text", "clip", "count_text", "dtype_text", "short"]


def dtype_text(x: Any) -> str:
    """The dtype of anything that is like an array, by its name."""
    return str(x.dtype)


def count_text(n: float) -> str:
    """A number as a person reads it: `1,234`, `70.6 B`."""
    return f"{n:,.0f}" if n < 100_000 else _scaled(n, ("", "k", "M", "B", "T", "P"))


def bytes_text(n: float) -> str:
    """A size in decimal units: `512 B`, `141 GB`."""
    return f"{n:.0f} B" if n < 1000 else _scaled(n, ("B", "kB", "MB", "GB", "TB", "PB"))


def _scaled(n: float, units: tuple[str, ...]) -> str:
    i = 0
    while n >= 999.5 and i < len(units) - 1:
        n, i = n / 1000, i + 1
    # Three digits, but never as 1e+03.
    return f"{n:.3g} {units[i]}" if n < 999.5 else f"{n:,.0f} {units[i]}"


def clip(text: str, width: int) -> str:
    """The text on one line, with its middle left out where it is longer than `width`."""
    if len(text) > 4 * width:
        text = text[: 2 * width] + text[-2 * width :]
    text = " ".join(text.split())
    if len(text) <= width:
        return text
    tail = width // 4
    return f"{text[: width - tail - 1]}…{text[-tail:]}"


_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_ITEMS = 6


def short(x: Any, width: int = 60, depth: int = 3) -> str:
    """A static value as text: functions and classes by name, long things clipped, no addresses."""
    kind = type(x)
    if kind is str:
        return repr(x) if len(x) <= width else repr(clip(x, width - 2))
    if x is None or kind in (bool, int, float, complex):
        return clip(repr(x), width)
    if isinstance(x, Ref | Node):
        return f"{kind.__name__}(…)"
    if isinstance(x, np.dtype):
        return str(x)
    if is_arraylike(x):
        return array_text(x)
    if isinstance(x, functools.partial):
        inner = [short(x.func, width, depth - 1), *(short(a, width, depth - 1) for a in x.args)]
        inner += [f"{k}={short(v, width, depth - 1)}" for k, v in x.keywords.items()]
        return clip(f"partial({', '.join(inner)})", width)
    if isinstance(x, tuple | list | set | frozenset | dict) and depth <= 0:
        return f"{kind.__name__} of {len(x)}"
    if isinstance(x, dict):
        items = [f"{short(k, 20, 0)}: {short(v, 30, depth - 1)}" for k, v in _first(x.items(), x)]
        return clip(_joined(items, len(x), "{", "}"), width)
    if isinstance(x, tuple | list | set | frozenset):
        items = [short(v, 30, depth - 1) for v in _first(x, x)]
        if isinstance(x, tuple) and hasattr(x, "_fields"):
            items = [f"{n}={v}" for n, v in zip(x._fields, items)]  # pyright: ignore
            return clip(_joined(items, len(x), f"{kind.__name__}(", ")"), width)
        ends = {list: "[]", tuple: "()"}.get(kind, "{}")
        tail = ",)" if kind is tuple and len(x) == 1 else ends[1]
        return clip(_joined(items, len(x), ends[0], tail), width)
    if isinstance(x, types.MethodType):
        return f"{type(x.__self__).__name__}.{x.__func__.__name__}"
    name = getattr(x, "__name__", None)
    if isinstance(name, str) and callable(x):
        return name
    try:
        text = repr(x)
    except Exception:
        # A model has to print also where a setting of it cannot.
        text = f"<{kind.__name__}>"
    return clip(_ADDRESS.sub("", text), width)


def _first(values: Any, sized: Any) -> list[Any]:
    return [v for _, v in zip(range(_ITEMS if len(sized) > _ITEMS + 2 else len(sized)), values)]


def _joined(items: list[str], total: int, head: str, tail: str) -> str:
    more = f", … {total - len(items)} more" if total > len(items) else ""
    return f"{head}{', '.join(items)}{more}{tail}"
