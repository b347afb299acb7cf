"""The layout of a graph, from left to right. Each box is in the column after all boxes that hold it."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field

__all__ = ["BACK_EDGE", "SHARED", "TREE_EDGE", "Box", "Edge", "arrange", "text_width"]

TREE_EDGE, SHARED, BACK_EDGE = range(3)
"""Kinds of edge: from the first holder, from a further holder, or back to a holder (a cycle)."""

Point = tuple[float, float]

_MARGIN = 16.0
_GAP = 14.0
_PORT = 16.0
_BEND = 40.0
_PAD = 9.0


@dataclass(eq=False)
class Box:
    """A module, or a Ref that several modules share. `x` is its left side, `y` its middle."""

    title: str
    subtitle: str
    count: int
    facts: str
    module: bool
    x: float = 0.0
    y: float = 0.0
    width: float = 0.0
    height: float = 0.0


@dataclass(eq=False)
class Edge:
    """An edge from a holder to what it holds under the name `label`.

    `path` goes from left to right, also for a cycle. It lists the start and then the points of each
    part: one point for a line, three for a curve. `label_at` is the end of the label.
    """

    source: Box
    target: Box
    label: str
    kind: int
    path: list[tuple[Point, ...]] = field(default_factory=list)
    label_at: Point = (0.0, 0.0)


def text_width(text: str, size: float, bold: bool = False) -> float:
    """The approximate width of a text. Fonts differ, so it is a little more than most need."""
    narrow = sum(c in "iljtf.,:;|![]()' " for c in text)
    wide = sum(c in "mwMWQO—…×@" for c in text)
    units = 0.58 * (len(text) - narrow - wide) + 0.34 * narrow + 0.9 * wide
    return size * units * (1.06 if bold else 1.0)


def arrange(boxes: list[Box], edges: list[Edge]) -> tuple[float, float]:
    """Place the boxes and edges. Return the width and height of the picture."""
    ports = Counter(right(e) for e in edges)
    for box in boxes:
        title = text_width(box.title, 13, bold=True)
        if box.count > 1:
            title += text_width(f" ×{box.count}", 13, bold=True) + 6
        box.width = max(title, text_width(box.subtitle, 11)) + 24
        box.height = max(42.0 if box.subtitle else 28.0, _PORT * ports[box] + 8)
    columns = _columns(boxes, edges)
    number = {box: i for i, column in enumerate(columns) for box in column}
    labels = [0.0] * len(columns)
    for edge in edges:
        i = number[right(edge)]
        labels[i] = max(labels[i], text_width(edge.label, 11))
    x = _MARGIN
    for i, column in enumerate(columns):
        if i:
            x += _BEND + labels[i] + 2 * _PAD
        for box in column:
            box.x = x
        x += max(box.width for box in column)
    bottom = _rows(boxes, edges)
    beside = _Router(columns, number, labels).connect(edges)
    return max(x, beside) + _MARGIN, bottom + _MARGIN


def right(edge: Edge) -> Box:
    """The box at the right end of an edge, next to its label: the held one, except in a cycle."""
    return edge.source if edge.kind == BACK_EDGE else edge.target


def _columns(boxes: list[Box], edges: list[Edge]) -> list[list[Box]]:
    """The boxes in columns, by the length of the longest path to them."""
    waiting = dict.fromkeys(boxes, 0)
    out: dict[Box, list[Box]] = {box: [] for box in boxes}
    for edge in edges:
        if edge.kind != BACK_EDGE:
            waiting[edge.target] += 1
            out[edge.source].append(edge.target)
    column = dict.fromkeys(boxes, 0)
    ready = [box for box, n in waiting.items() if n == 0]
    while ready:
        box = ready.pop()
        for target in out[box]:
            column[target] = max(column[target], column[box] + 1)
            waiting[target] -= 1
            if waiting[target] == 0:
                ready.append(target)
    found: list[list[Box]] = [[] for _ in range(max(column.values()) + 1)]
    for box in boxes:
        found[column[box]].append(box)
    return [boxes for boxes in found if boxes]


def _rows(boxes: list[Box], edges: list[Edge]) -> float:
    """Set heights as in a tree: a holder is level with the middle of what it holds."""
    children: dict[Box, list[Box]] = {box: [] for box in boxes}
    placed = {boxes[0]}
    for kind in (TREE_EDGE, SHARED):
        for edge in edges:
            if edge.kind == kind and edge.target not in placed:
                placed.add(edge.target)
                children[edge.source].append(edge.target)
    cursor = _MARGIN
    todo: list[tuple[Box, bool]] = [(boxes[0], False)]
    while todo:
        box, done = todo.pop()
        inner = children[box]
        if not inner:
            box.y = cursor + box.height / 2
            cursor += box.height + _GAP
        elif done:
            box.y = (inner[0].y + inner[-1].y) / 2
            cursor = max(cursor, box.y + box.height / 2 + _GAP)
        else:
            todo.append((box, True))
            todo += [(child, False) for child in reversed(inner)]
    return max(box.y + box.height / 2 for box in boxes)


class _Router:
    """Routes edges. Where an edge passes a column, it goes through a gap between boxes."""

    def __init__(self, columns: list[list[Box]], number: dict[Box, int], labels: list[float]):
        self.columns = [sorted(column, key=lambda box: box.y) for column in columns]
        self.number = number
        self.labels = labels
        # Edges that pass a column at the same place run side by side.
        self.passing: Counter[tuple[int, float]] = Counter()

    def connect(self, edges: list[Edge]) -> float:
        """Set the path of each edge. Return how far to the right the edges reach."""
        into: dict[Box, list[Edge]] = {}
        most = 0.0
        for edge in edges:
            if edge.source is edge.target:
                most = max(most, _loop(edge))
            else:
                into.setdefault(right(edge), []).append(edge)
        for box, arriving in into.items():
            arriving.sort(key=lambda e: (e.target if e.kind == BACK_EDGE else e.source).y)
            first = box.y - _PORT * (len(arriving) - 1) / 2
            for i, edge in enumerate(arriving):
                self._route(edge, first + _PORT * i)
        return most

    def _route(self, edge: Edge, y1: float) -> None:
        a, b = edge.source, edge.target
        if edge.kind == BACK_EDGE:
            a, b = b, a
        start, end = self.number[a], self.number[b]
        x, y = a.x + a.width, a.y + (10 if edge.kind == BACK_EDGE else 0)
        edge.path = [((x, y),)]
        for i in range(start + 1, end):
            part = (i - start) / (end - start)
            left = self.columns[i][0].x
            free = self._free(i, a.y + part * (y1 - a.y))
            bend = left - self.labels[i] - 2 * _PAD
            edge.path += [_curve((x, y), (bend, free))]
            x, y = left + max(box.width for box in self.columns[i]), free
            edge.path += [((x, y),)]
        # The last part is straight, because the label stands on it.
        bend = b.x - self.labels[end] - 2 * _PAD
        edge.path += [_curve((x, y), (bend, y1)), ((b.x, y1),)]
        edge.label_at = (b.x - _PAD, y1 - 4)

    def _free(self, i: int, wanted: float) -> float:
        """The height nearest to `wanted` at which a column is free."""
        column = self.columns[i]
        gaps = [column[0].y - column[0].height / 2 - _GAP / 2]
        gaps += [
            (above.y + above.height / 2 + below.y - below.height / 2) / 2
            for above, below in itertools.pairwise(column)
        ]
        gaps.append(column[-1].y + column[-1].height / 2 + _GAP / 2)
        if not any(abs(wanted - box.y) < box.height / 2 + 6 for box in column):
            return wanted
        gap = min(gaps, key=lambda y: abs(y - wanted))
        taken = self.passing[i, gap]
        self.passing[i, gap] += 1
        return gap + (0, 3, -3)[taken % 3]


def _curve(a: Point, b: Point) -> tuple[Point, Point, Point]:
    bend = (b[0] - a[0]) / 2
    return (a[0] + bend, a[1]), (b[0] - bend, b[1]), b


def _loop(edge: Edge) -> float:
    """The edge of a module that holds itself."""
    box = edge.source
    x, y, out = box.x + box.width, box.y, box.x + box.width + 40
    edge.path = [((x, y + 10),), ((out, y + 16), (out, y - 16), (x, y - 10))]
    edge.label_at = (out + text_width(edge.label, 11), y - 10)
    return edge.label_at[0]
