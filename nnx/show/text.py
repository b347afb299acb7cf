"""How a model prints: a tree with names, classes, settings and shapes. Each shared part appears once."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from typing import Any

import jax

from nnx.show._format import bytes_text, count_text, short
from nnx.show._placed import Placement
from nnx.show._walk import ARRAY, BACK, LIST, MAP, NODE, REF, STATIC, Item, Walk, has_ended
from refx import Node
from refx.buffers import CONCRETE
from refx.text import is_arraylike

__all__ = ["collection_sizes", "device_bytes", "tree_repr"]

_WIDTH = 100
_DEPTH = 32
# Show two equal neighbours in full. Only more than two are worth a count.
_FOLD = 3
# This many items may repeat in turn, as layers and activations do.
_PERIOD = 4


def tree_repr(node: Node) -> str:
    """A module as text: names, classes, settings that differ from the defaults, shapes, collections.

    A module or Ref in several places is shown at the first and named at the others. Three or more
    equal neighbours are shown as one, with their number. In a list, so are groups of two to four
    items that repeat in turn. Anything deeper than 32 levels is only counted. If there are
    submodules, the last line has the number of values and the bytes of each collection; shared
    values count once. A number that is ready is shown by its value. Nothing else is copied from a
    device.

    >>> import jax, nnx
    >>> with nnx.scope(jax.random.key(0)):
    ...     model = nnx.Sequential(*(nnx.Linear(4, 4) for _ in range(12)), nnx.Linear(4, 1))
    >>> model
    Sequential(
      layers = [
        0..11: Linear ×12 (
          kernel = float32[4,4]  # params
          bias = float32[4]  # params
          in_features=4, out_features=4
        )
        12: Linear(
          kernel = float32[4,1]  # params
          bias = float32[1]  # params
          in_features=4, out_features=1
        )
      ]
    )  # params: 245 (980 B)
    """
    walk = Walk(node)
    out: list[str] = []
    # The stack of what is left to print: texts, or runs of equal items with their indentation.
    todo: list[Any] = [([0], 0)]
    while todo:
        task = todo.pop()
        if isinstance(task, str):
            out.append(task)
            continue
        run, depth = task
        _print(walk, run, depth, out, todo)
    text = "\n".join(out)
    if sum(item.kind == NODE for item in walk.items) > 1:
        text += _totals(walk)
    return text


def _print(walk: Walk, run: list[int], depth: int, out: list[str], todo: list[Any]) -> None:
    item = walk.items[run[0]]
    if len(run) > 1:
        walk.folded = max(walk.folded, item.end)
    indent = "  " * depth
    line = indent + _label(walk, run)
    if item.kind == BACK:
        out.append(f"{line}<same as {_targets(walk, run)}>")
    elif item.kind == REF:
        # One of several equal parts is shown, and their numbers may differ.
        text = (
            item.text
            if len(run) > 1 or run[0] < walk.folded
            else number_text(item.obj._value) or item.text
        )
        out.append(f"{line}{text}{_times(run)}  # {_facts(item)}")
    elif item.kind == ARRAY and walk.items[item.parent].kind == NODE:
        out.append(f"{line}{item.text}{_times(run)}  # no collection: not trained")
    elif item.kind in (STATIC, ARRAY):
        out.append(f"{line}{item.text}{_times(run)}")
    else:
        head, tail = _ends(item, run)
        # Some of our classes, such as the optimizer, show a summary instead of their parts.
        nested = item.kind == NODE and depth > 0
        summary = getattr(type(item.obj), "__nnx_summary__", None) if nested else None
        inner = (summary(item.obj) if summary else None) or list(_inner(walk, run[0]))
        if not inner:
            out.append(line + head + tail)
        elif item.kind == NODE and len(inner) == 1 and isinstance(inner[0], str):
            out.append(f"{line}{head}{inner[0]}{tail}")
        elif depth >= _DEPTH:
            out.append(f"{line}{head}… {item.end - run[0] - 1:,} more inside{tail}")
        else:
            out.append(line + head)
            todo.append(indent + tail)
            for part in reversed(inner):
                if isinstance(part, tuple):
                    first, times, last = part
                    names = [str(walk.items[j].name) for j in (first[0][0], last[-1])]
                    todo.append(f"{indent}  )")
                    todo += [(run, depth + 2) for run in reversed(first)]
                    part = f"{_span(names)}: {times:,} × ("
                todo.append(f"{indent}  {part}" if isinstance(part, str) else (part, depth + 1))


def _inner(walk: Walk, i: int) -> Any:
    """The contents of an item: runs of equal items, groups that repeat in turn, and lines of settings."""
    if walk.items[i].kind == LIST:
        yield from _in_turn(walk, list(_parts(walk, i)))
        return
    settings: list[str] = []
    for part in _parts(walk, i):
        item = walk.items[part[0]]
        if item.kind == STATIC and walk.items[i].kind != MAP:
            settings.append(f"{item.name}={item.text}")
            continue
        if settings:
            yield from _wrapped(settings)
            settings = []
        yield part
    if settings:
        yield from _wrapped(settings)


def _parts(walk: Walk, i: int) -> Iterator[list[int]]:
    for run in walk.runs(i):
        yield from [run] if _folds(walk, run) else [[j] for j in run]


def _in_turn(walk: Walk, parts: list[list[int]]) -> Iterator[Any]:
    """The parts of a list. Two to four that repeat in turn become (one round, number of rounds, the last)."""

    def same(a: list[int], b: list[int]) -> bool:
        x, y = walk.items[a[0]], walk.items[b[0]]
        if x.kind == BACK and y.kind == BACK:
            return x.target == y.target and len(a) == len(b) == 1
        return len(a) == len(b) and walk.equal(a[0], b[0])

    k = 0
    while k < len(parts):
        for period in range(2, _PERIOD + 1):
            end = k + period
            while end < len(parts) and same(parts[k + (end - k) % period], parts[end]):
                end += 1
            times = (end - k) // period
            if times >= _FOLD:
                yield parts[k : k + period], times, parts[k + times * period - 1]
                k += times * period
                break
        else:
            yield parts[k]
            k += 1


def _wrapped(settings: list[str]) -> list[str]:
    line = ", ".join(settings)
    if len(line) <= _WIDTH:
        return [line]
    return textwrap.wrap(line, _WIDTH, break_long_words=False)


def _folds(walk: Walk, run: list[int]) -> bool:
    first = walk.items[run[0]]
    if len(run) < _FOLD:
        return False
    return walk.items[first.parent].kind in (LIST, MAP) or first.kind not in (REF, ARRAY, STATIC)


def _label(walk: Walk, run: list[int]) -> str:
    item = walk.items[run[0]]
    if item.parent < 0:
        return ""
    holder = walk.items[item.parent].kind
    sep = ": " if holder in (LIST, MAP) else " = "
    if holder == LIST:
        return f"{_span([str(walk.items[j].name) for j in run])}{sep}"
    names = [short(walk.items[j].name) if holder == MAP else walk.items[j].name for j in run]
    if len(names) <= 4:
        return f"{', '.join(names)}{sep}"
    return f"{names[0]} … {names[-1]}{sep}"


def _span(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}"


def _times(run: list[int]) -> str:
    return f" ×{len(run)}" if len(run) > 1 else ""


def _ends(item: Item, run: list[int]) -> tuple[str, str]:
    if item.kind in (LIST, MAP):
        ends = item.text
        return (f"{len(run)} × {ends[0]}" if len(run) > 1 else ends[0]), ends[1]
    return (f"{item.text} ×{len(run)} (" if len(run) > 1 else f"{item.text}("), ")"


def _targets(walk: Walk, run: list[int]) -> str:
    first, last = walk.items[run[0]].target, walk.items[run[-1]].target
    path = ".".join(walk.path(first)) or "the root"
    return path if first == last else f"{path}..{walk.items[last].name}"


# NumPy's kinds of dtype for numbers.
_KINDS = frozenset("biufc")


def number_text(value: Any) -> str | None:
    """The value of a number that is ready; None for anything else."""
    number = (
        type(value) in CONCRETE and value.ndim == 0 and getattr(value.dtype, "kind", "V") in _KINDS
    )
    if not number or value.is_deleted() or not (value.is_fully_addressable and value.is_ready()):
        return None
    return short(value.item())


def _facts(item: Item) -> str:
    cell = item.obj
    facts = [f"{k}={short(v, 40)}" for k, v in cell._metadata.items()]
    name = cell._collection
    return ", ".join([name if isinstance(name, str) else short(name), *facts])


def collection_sizes(walk: Walk, i: int = 0) -> dict[str, tuple[int, int]]:
    """The numbers of values and bytes inside an item, by collection. Shared values count once.

    Arrays that are plain attributes count as `"arrays"`.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for item in _held(walk, i):
        label = item.obj._collection if item.kind == REF else "arrays"
        name = label if isinstance(label, str) else short(label)
        n, size = sizes.get(name, (0, 0))
        dn, dsize = _size(item.obj._value if item.kind == REF else item.obj)
        sizes[name] = (n + dn, size + dsize)
    return sizes


def device_bytes(walk: Walk, placement: Placement, i: int = 0) -> int | None:
    """The bytes of an item that one device holds; None if nothing is divided or planned."""
    total, divided = 0, placement.planned
    for item in _held(walk, i):
        value = item.obj._value if item.kind == REF else item.obj
        size, part = placement.bytes_of(item.obj, value)
        total, divided = total + size, divided or part
    return total if divided else None


def _held(walk: Walk, i: int) -> Iterator[Item]:
    """The Refs and arrays inside an item, each once."""
    items = walk.items
    seen: set[int] = set()
    todo = [range(i, items[i].end)]
    while todo:
        for j in todo.pop():
            if j in seen:
                continue
            seen.add(j)
            item = items[j]
            if item.kind == BACK:
                # Values that are shared with parts outside still belong to this part.
                if item.target not in seen:
                    todo.append(range(item.target, items[item.target].end))
            elif item.kind in (REF, ARRAY) and not (item.kind == REF and has_ended(item.obj)):
                yield item


def _size(value: Any) -> tuple[int, int]:
    leaves = [value] if is_arraylike(value) else jax.tree.leaves(value)
    arrays = [x for x in leaves if is_arraylike(x)]
    numbers = sum(isinstance(x, bool | int | float | complex) for x in leaves)
    return (
        sum(math.prod(x.shape) for x in arrays) + numbers,
        sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays),
    )


def _totals(walk: Walk) -> str:
    sizes = collection_sizes(walk)
    parts = [f"{k}: {count_text(n)} ({bytes_text(size)})" for k, (n, size) in sizes.items()]
    root = walk.items[0].obj
    here = device_bytes(walk, Placement(root, None, None))
    if here is not None:
        parts.append(f"on each device: {bytes_text(here)}")
    return f"  # {', '.join(parts)}" if parts else ""
