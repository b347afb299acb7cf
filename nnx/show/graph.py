"""`nnx.graph`: a picture that shows which module holds which."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nnx.show._draw import to_matplotlib, to_svg
from nnx.show._format import bytes_text, clip, count_text, short
from nnx.show._layout import BACK_EDGE, SHARED, TREE_EDGE, Box, Edge, arrange
from nnx.show._walk import ARRAY, BACK, LIST, NODE, REF, STATIC, Walk
from nnx.show.text import collection_sizes
from refx import Node
from refx.text import a_kind

__all__ = ["Graph", "graph"]


class Graph:
    """The result of `nnx.graph`. Notebooks show it, and `save` writes it to a file.

    Attributes: `boxes`, the modules and shared Refs; `edges`, which say which module holds them
    under which name; `svg`, the picture as text.
    """

    def __init__(self, boxes: list[Box], edges: list[Edge]):
        self.boxes = boxes
        self.edges = edges
        self.size = arrange(boxes, edges)
        self.svg = to_svg(boxes, edges, self.size)

    def _repr_svg_(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return f"<nnx.Graph of {len(self.boxes)} boxes and {len(self.edges)} edges>"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture as `.svg`, or as `.png` or `.pdf` with matplotlib.

        Raises:
          ValueError: the name has another ending.
          ImportError: matplotlib is needed and not installed.
        """
        path = Path(path)
        kind = path.suffix.lower()
        if kind == ".svg":
            path.write_text(self.svg, encoding="utf-8")
        elif kind in (".png", ".pdf"):
            to_matplotlib(self.boxes, self.edges, self.size, path)
        else:
            raise ValueError(
                "nnx.graph saves .svg and, with matplotlib, .png and .pdf, but the path is "
                f"{str(path)!r}. Use one of these endings."
            )


def graph(
    model: Any, path: str | os.PathLike[str] | None = None, *, depth: int | None = None
) -> Graph:
    """Draw the modules of a model: each module once, with an edge from every module that holds it.

    A module in several places has several edges, labelled with its names. Refs that several modules
    share, such as tied weights, have several edges, too. Neighbours with equal structure become one
    box that shows their number.

    Args:
      model: a module.
      path: a file to save as well: `.svg` or, with matplotlib, `.png` or `.pdf`.
      depth: how many levels of submodules to draw; None for all.

    Returns:
      A `Graph`, which notebooks show.

    Raises:
      TypeError: `model` is not a module.

    >>> import jax, nnx
    >>> with nnx.scope(jax.random.key(0)):
    ...     model = nnx.Sequential(*(nnx.Linear(4, 4) for _ in range(12)), nnx.Linear(4, 1))
    >>> picture = nnx.graph(model)
    >>> [(box.title, box.count) for box in picture.boxes]
    [('Sequential', 1), ('Linear', 12), ('Linear', 1)]
    >>> picture.svg.startswith("<svg")
    True
    """
    if not isinstance(model, Node):
        raise TypeError(
            f"nnx.graph takes a module, but got {a_kind(type(model))}: {clip(repr(model), 80)}."
        )
    picture = Graph(*_Builder(Walk(model), depth).built())
    if path is not None:
        picture.save(path)
    return picture


class _Builder:
    """The boxes and edges of a walk. Folded items map to the equal item that is drawn."""

    def __init__(self, walk: Walk, depth: int | None):
        self.walk = walk
        self.depth = depth
        self.boxes: dict[int, Box] = {}
        self.edges: list[Edge] = []
        self.known: dict[tuple[Box, Box, int], Edge] = {}
        # The distance from an item to the one that is drawn in its place.
        self.shift = [0] * len(walk.items)
        self.again: list[tuple[int, list[int], str]] = []

    def built(self) -> tuple[list[Box], list[Edge]]:
        """All boxes, in the order of the model, and all edges."""
        todo: list[tuple[int, Box | None, int, str, int]] = [(0, None, 1, "", 0)]
        while todo:
            i, parent, count, label, level = todo.pop()
            box = self._module(i, count)
            if parent is not None:
                self._edge(parent, box, label, TREE_EDGE)
            if self.depth is not None and level >= self.depth:
                self._hidden(i)
                continue
            held = list(self._held(i))
            todo += [(j, box, n, name, level + 1) for j, n, name in reversed(held)]
        for source, run, label in self.again:
            self._again(source, run, label)
        order = sorted(self.boxes)
        return [self.boxes[i] for i in order], self.edges

    def _module(self, i: int, count: int) -> Box:
        walk = self.walk
        sizes = collection_sizes(walk, i)
        lines = [
            f"{count_text(n)} {name}" if name == "params" else f"{name}: {count_text(n)}"
            for name, (n, _) in sizes.items()
        ]
        item = walk.items[i]
        facts = [".".join(walk.path(i)) or "the model", type(item.obj).__name__]
        facts += [f"{k}: {count_text(n)} ({bytes_text(b)})" for k, (n, b) in sizes.items()]
        for j in walk.children(i):
            child = walk.items[j]
            if child.kind in (REF, ARRAY):
                facts.append(f"{child.name} = {child.text}")
            elif child.kind == STATIC:
                facts.append(f"{child.name}={child.text}")
        title = clip(type(item.obj).__name__, 40)
        subtitle = clip(", ".join(lines), 40)
        box = self.boxes[i] = Box(title, subtitle, count, "\n".join(facts), module=True)
        return box

    def _edge(self, source: Box, target: Box, label: str, kind: int) -> None:
        known = self.known.get((source, target, kind))
        if known is not None:
            known.label = clip(f"{known.label}, {label}", 32)
            return
        edge = self.known[source, target, kind] = Edge(source, target, clip(label, 32), kind)
        self.edges.append(edge)

    def _held(self, owner: int) -> Iterator[tuple[int, int, str]]:
        """The modules inside a module, also in lists and other containers: how many, and under
        which names.
        """
        walk = self.walk
        todo: list[tuple[int, int, str]] = [(owner, 1, "")]
        while todo:
            i, times, label = todo.pop()
            if walk.items[i].kind == NODE and i != owner:
                yield i, times, label
                continue
            inner = []
            for run in walk.runs(i):
                kind = walk.items[run[0]].kind
                name = self._name(i, run, label)
                if kind == BACK:
                    self.again.append((owner, run, name))
                elif kind not in (REF, ARRAY, STATIC):
                    for j in run[1:]:
                        for k in range(j, walk.items[j].end):
                            self.shift[k] = j - run[0]
                    inner.append((run[0], times * len(run), name))
            todo += reversed(inner)

    def _hidden(self, i: int) -> None:
        """Objects that are shared between other parts and the parts of a module that are too deep to draw."""
        items = self.walk.items
        above = len(self.walk.path(i))
        for k in range(i + 1, items[i].end):
            if items[k].kind == BACK and not i <= items[k].target < items[i].end:
                self.again.append((i, [k], ".".join(self.walk.path(k)[above:])))

    def _name(self, holder: int, run: list[int], prefix: str) -> str:
        names = [str(self.walk.items[j].name) for j in run]
        numbered = self.walk.items[holder].kind == LIST
        if len(names) > 1 and (numbered or len(names) > 4):
            names = [f"{names[0]}{'..' if numbered else ' … '}{names[-1]}"]
        name = ", ".join(names)
        if numbered:
            return f"{prefix}[{name}]"
        return f"{prefix}.{name}" if prefix else name

    def _drawn(self, i: int) -> int:
        while self.shift[i]:
            i -= self.shift[i]
        return i

    def _again(self, owner: int, run: list[int], label: str) -> None:
        """The edges to boxes that were drawn before."""
        walk = self.walk
        targets = {self._drawn(walk.items[j].target): walk.items[j] for j in run}
        for target, item in targets.items():
            name = label if len(targets) == 1 else f"{label}: {item.name}"
            self._to(owner, target, name)

    def _to(self, owner: int, target: int, label: str) -> None:
        walk = self.walk
        item, source = walk.items[target], self.boxes[owner]
        if item.kind == NODE:
            if target in self.boxes:
                around = walk.items[target].end > owner >= target
                kind = BACK_EDGE if around else SHARED
                self._edge(source, self.boxes[target], label, kind)
        elif item.kind == REF:
            if target not in self.boxes:
                holder, name = self._holder(target)
                label_of = item.obj.collection
                text = f"{item.text}  {label_of if type(label_of) is str else short(label_of)}"
                text = clip(text, 60)
                facts = "\n".join([".".join(walk.path(target)), item.text, "shared"])
                box = Box(str(item.name), text, 1, facts, module=False)
                self.boxes[target] = box
                self._edge(self.boxes[holder], box, name, SHARED)
            self._edge(source, self.boxes[target], label, SHARED)
        else:
            for run in walk.runs(target):
                self._to(owner, run[0], self._name(target, run, label))

    def _holder(self, i: int) -> tuple[int, str]:
        """The drawn module around an item, and the item's name in it."""
        names: list[str] = []
        while i not in self.boxes:
            names.append(str(self.walk.items[i].name))
            i = self._drawn(self.walk.items[i].parent)
        return i, ".".join(reversed(names))
