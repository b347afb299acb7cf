"""`nnx.tabulate`: a model as a table, by abstract evaluation alone."""

from __future__ import annotations

import re
import shutil
import textwrap
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax

from nnx.show._calls import Arguments, Call, abstract, record
from nnx.show._cost import Costs
from nnx.show._format import bytes_text, clip, count_text
from nnx.show._placed import Placement
from nnx.show._walk import NODE, Walk
from nnx.show.text import collection_sizes, device_bytes
from refx import Node, Ref
from refx.partition import dotted
from refx.text import a_kind, array_text, is_arraylike

__all__ = ["Row", "Table", "tabulate"]


@dataclass(frozen=True)
class Row:
    """A module in a table. All figures include its submodules.

    Attributes: `path`, a tuple; `cls`, the name of the class; `inputs` and `outputs` of the first
    call, pytrees with `jax.ShapeDtypeStruct`s for arrays (None if it was not called); `calls`, the
    number of calls, where each step of a loop and each lane of `nnx.vmap` counts (a `while_loop`
    counts as one step); `sizes`, from collection to `(values, bytes)`; `flops` and
    `flops_with_backward`, over all calls, None if unknown; `device_bytes`, the bytes that one
    device holds, None if nothing is divided among devices.
    """

    path: tuple[str, ...]
    cls: str
    inputs: Any
    outputs: Any
    calls: int
    sizes: dict[str, tuple[int, int]]
    flops: float | None
    flops_with_backward: float | None
    device_bytes: int | None = None

    @property
    def facts(self) -> Any:
        """Everything that is shown of the row, except its path."""
        shapes = _shapes(self.inputs), _shapes(self.outputs)
        flops = self.flops, self.flops_with_backward
        return self.cls, shapes, self.calls, self.sizes, *flops, self.device_bytes


@dataclass(frozen=True)
class Table:
    """The result of `nnx.tabulate`. `print` shows it.

    Attributes: `rows`, a `Row` for each module, the model first; `depth` and `console_width`, as
    given; `sizes`, `flops` and `flops_with_backward` of the model.
    """

    rows: tuple[Row, ...]
    depth: int | None = None
    console_width: int | None = None
    called: bool = True
    # For each line: the number of its row, its path as text, and how many modules it stands for.
    _lines: tuple[tuple[int, str, int], ...] = field(default=(), repr=False)

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """The numbers of values and bytes by collection. Shared values count once."""
        return self.rows[0].sizes

    @property
    def flops(self) -> float | None:
        """The operations of a call of the model."""
        return self.rows[0].flops

    @property
    def flops_with_backward(self) -> float | None:
        """The operations of a call plus the gradient with respect to the parameters."""
        return self.rows[0].flops_with_backward

    @property
    def device_bytes(self) -> int | None:
        """The bytes that one device holds, if values are divided or a mesh is planned."""
        return self.rows[0].device_bytes

    def __str__(self) -> str:
        return self._text(
            self.console_width or max(shutil.get_terminal_size((120, 24)).columns, 60)
        )

    def __repr__(self) -> str:
        return str(self)

    def __rich_console__(self, console: Any, options: Any) -> Any:
        """The same table in colours, for rich to print in the width of its console."""
        from rich.text import Text

        text = Text(self._text(options.max_width), no_wrap=True, overflow="ignore")
        for pattern, style in _STYLES.items():
            text.highlight_regex(pattern, style)
        yield text

    def _text(self, width: int) -> str:
        header, cells = self._cells()
        return _text(header, cells, self._notes(), width)

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        collections = list(self.sizes)
        header = ["path", "class"]
        if self.called:
            header += ["inputs", "outputs"]
        header += collections
        placed = self.device_bytes is not None
        if placed:
            header.append("on each device")
        if self.called:
            header += ["FLOPs", "with backward"]
        cells = []
        for number, path, times in self._lines:
            row = self.rows[number]
            line = [path, row.cls + (f" ×{times}" if times > 1 else "")]
            if self.called:
                calls = f"{row.calls} calls: " if row.calls > 1 else ""
                inputs = _shapes(row.inputs) if row.calls else "not called"
                line += [calls + inputs, _shapes(row.outputs)]
            for name in collections:
                n, size = row.sizes.get(name, (0, 0))
                line.append(f"{count_text(n)} ({bytes_text(size)})" if n else "")
            if placed:
                own = row.device_bytes
                whole = sum(size for _, size in row.sizes.values())
                line.append(bytes_text(whole if own is None else own))
            if self.called:
                line += [_flops(row.flops), _flops(row.flops_with_backward)]
            cells.append(line)
        total = ["total", "", *([""] * 2 if self.called else [])]
        total += [f"{count_text(n)} ({bytes_text(size)})" for n, size in self.sizes.values()]
        if self.device_bytes is not None:
            total.append(bytes_text(self.device_bytes))
        if self.called:
            total += [_flops(self.flops), _flops(self.flops_with_backward)]
        return header, [*cells, total]

    def _notes(self) -> str:
        notes = ["Figures include submodules. Shared values count once."]
        if any(times > 1 for _, _, times in self._lines):
            notes.append("A row with ×n stands for n equal modules and has the figures of one.")
        return " ".join(notes)


_STYLES = {
    r"(?m)\A.*(?=\n)": "bold",
    r"─+": "dim",
    r"\b\w+\[[\d,]*\]": "cyan",
    r"\([\d.]+ [kMGT]?B\)": "dim",
    r"(?m)^total.*": "bold",
}


def tabulate(
    model: Any,
    *args: Any,
    depth: int | None = None,
    console_width: int | None = None,
    mesh: Any = None,
    specs: Any = None,
    **kwargs: Any,
) -> Table:
    """List the modules of a model with their shapes, sizes and operations, without computing anything.

    The model is called abstractly, so its size does not matter: make it with
    `nnx.eval_shape(lambda: Model.init(key)(...))`, and its Refs hold only shapes. Nothing is
    written. Random keys come from the ambient scope. Without a scope, arbitrary keys are used,
    because their values do not matter.

    XLA counts the operations in the lowered program: forward, and forward plus the backward pass to
    the parameters and (for submodules) the inputs. A `while_loop` counts as one step. Without
    arguments for the call, the table has only sizes.

    Args:
      model: a module, or a bound method of a module.
      *args, **kwargs: the arguments of the call: arrays, `jax.ShapeDtypeStruct`s or modules.
        Everything else is a constant.
      depth: how many levels of submodules to show; None for all.
      console_width: the width of the table in characters. The default is the width of the terminal.
      mesh: a mesh to plan for. It need not exist:
        `jax.sharding.AbstractMesh((8, 8), ("data", "model"))`. The table then shows the bytes that
        each device would hold. If values are divided already, it shows these bytes without `mesh`,
        too.
      specs: what goes where on that mesh, as for `nnx.shardings`. The default is the metadata.

    Returns:
      A `Table`. `print` shows it, and `rich.print` shows it in colours (extra `display`). `rows`
      has the figures. Equal neighbours share a line. If the width is not enough, the columns of
      inputs and outputs are left out, and a note says so. Figures and paths are never cut.

    Raises:
      TypeError: `model` is neither a module nor a method of a module.

    >>> import jax, nnx
    >>> with nnx.scope(jax.random.key(0)):
    ...     model = nnx.Sequential(nnx.Linear(3, 4), nnx.relu, nnx.Linear(4, 1))
    >>> table = nnx.tabulate(model, jax.ShapeDtypeStruct((8, 3), "float32"))
    >>> [(row.cls, row.flops) for row in table.rows]
    [('Sequential', 328.0), ('Linear', 224.0), ('Linear', 72.0)]
    >>> table.sizes
    {'params': (21, 84)}
    """
    function: Callable[..., Any] | None = None
    if isinstance(model, types.MethodType):
        function, model = model.__func__, model.__self__
    if not isinstance(model, Node):
        raise TypeError(
            "nnx.tabulate takes a module or a bound method of a module, but got "
            f"{a_kind(type(model))}: {clip(repr(model), 80)}. Flags and keys are set around it: "
            "`with nnx.scope(key, training=True):`."
        )
    called = bool(args or kwargs)
    arguments = Arguments.of(args, kwargs)
    calls = record(model, function, arguments) if called else {}
    walk, costs, placement = Walk(model), Costs(), Placement(model, specs, mesh)
    rows: list[Row] = []
    numbers: dict[int, int] = {}
    for i, item in enumerate(walk.items):
        if item.kind == NODE:
            numbers[i] = len(rows)
            path = walk.path(i)
            rows.append(_row(walk, i, calls.get(path, []), costs, function, placement))
    lines = tuple(_lines(walk, rows, numbers, depth))
    return Table(tuple(rows), depth, console_width, called, lines)


def _row(
    walk: Walk, i: int, calls: list[Call], costs: Costs, function: Any, placement: Placement
) -> Row:
    module, path = walk.items[i].obj, walk.path(i)
    flops: float | None = 0.0
    backward: float | None = 0.0
    for call in calls:
        cost = costs.of(module, call, function if i == 0 else None, i > 0)
        if cost is None or flops is None or backward is None:
            flops = backward = None
            break
        flops += cost[0] * call.times
        backward += cost[1] * call.times
    first = calls[0] if calls else None
    inputs = first.args.restore(map(abstract, first.args.arrays)) if first is not None else None
    return Row(
        path,
        type(module).__name__,
        inputs,
        first.out if first is not None else None,
        sum(call.times for call in calls),
        collection_sizes(walk, i),
        flops if calls else None,
        backward if calls else None,
        device_bytes(walk, placement, i),
    )


def _lines(walk: Walk, rows: list[Row], numbers: dict[int, int], depth: int | None) -> Any:
    """The lines of the table: those within `depth`, with equal neighbours on one line."""
    # An item, its path in the module around it, the number of those modules, the number that it
    # stands for.
    todo: list[tuple[int, str, int, int]] = [(0, "", 0, 1)]
    while todo:
        i, path, level, times = todo.pop()
        if i in numbers:
            if depth is not None and level > depth:
                continue
            yield numbers[i], "  " * level + (path or "(model)"), times
            level, path, times = level + 1, "", 1
        inner = []
        for run in walk.runs(i):
            parts = (
                [run] if len(run) > 1 and _alike(walk, rows, numbers, run) else [[j] for j in run]
            )
            for part in parts:
                name = _name([walk.items[j].name for j in part])
                inner.append(
                    (part[0], f"{path}.{name}" if path else name, level, times * len(part))
                )
        todo += reversed(inner)


def _name(names: list[Any]) -> str:
    if len(names) == 1:
        return str(names[0])
    if isinstance(names[0], int):
        return f"{names[0]}..{names[-1]}"
    return ", ".join(map(str, names)) if len(names) <= 4 else f"{names[0]} … {names[-1]}"


def _alike(walk: Walk, rows: list[Row], numbers: dict[int, int], run: list[int]) -> bool:
    def facts(i: int) -> list[Any]:
        return [rows[numbers[j]].facts for j in range(i, walk.items[i].end) if j in numbers]

    first = facts(run[0])
    return bool(first) and all(facts(i) == first for i in run[1:])


def _flops(n: float | None) -> str:
    return "" if n is None else count_text(n)


_MOST = 3
_SHORT = re.compile(r"^(bfloat|float|complex|uint|int)(?=\d)")


def _shorter(match: re.Match[str]) -> str:
    return {"bfloat": "bf", "float": "f", "complex": "c", "uint": "u", "int": "i"}[match[1]]


def _shapes(tree: Any) -> str:
    """The arrays of inputs or outputs. If there are many, only the first ones."""
    if tree is None:
        return ""
    flat, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: isinstance(x, Ref | Node)
    )
    parts = []
    for path, x in flat:
        if isinstance(x, Ref | Node):
            text = f"{type(x).__name__}(…)"
        elif is_arraylike(x):
            text = _SHORT.sub(_shorter, array_text(x))
        else:
            continue
        names = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        parts.append(f"{dotted(names)}={text}" if names else text)
    more = [f"{len(parts) - _MOST} more"] if len(parts) > _MOST else []
    return ", ".join(parts[:_MOST] + more)


# Columns that a narrow console leaves out, in this order. Inputs are mostly the outputs of the row
# above.
_SPARED = ("inputs", "outputs")
_BACKWARD = "with backward"


def _text(header: list[str], cells: list[list[str]], notes: str, width: int) -> str:
    """The table, with as many columns as fit in the width."""
    whole = sum(_widths([header, *cells])) + 2 * len(header) - 2
    spared: list[str] = []
    tops = [header]
    called = header[-1] == _BACKWARD
    if whole > width and called:
        # Two lines, because the numbers below are short.
        first, second = _BACKWARD.split()
        tops = [[first if name == _BACKWARD else "" for name in header], [*header[:-1], second]]
    for name in _SPARED if called else ():
        if sum(_widths([*tops, *cells])) + 2 * len(tops[-1]) - 2 > width:
            spared.append(name)
            at = tops[-1].index(name)
            tops = [[*line[:at], *line[at + 1 :]] for line in tops]
            cells = [[*line[:at], *line[at + 1 :]] for line in cells]
    if spared:
        notes += (
            f" There is no room for {' and '.join(spared)} in {width} columns, but in {whole}: "
            f"nnx.tabulate(..., console_width={whole})."
        )
    widths = _widths([*tops, *cells])
    # Columns of text come first.
    left = 4 - len(spared) if called else 2

    def text(line: list[str]) -> str:
        parts = [
            cell.ljust(size) if i < left else cell.rjust(size)
            for i, (cell, size) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(parts).rstrip()

    rule = "  ".join("─" * size for size in widths)
    body = [text(line) for line in cells]
    lines = [*map(text, tops), rule, *body[:-1], rule, body[-1]]
    return "\n".join([*lines, *textwrap.wrap(notes, max(width, 60), break_long_words=False)])


def _widths(lines: list[list[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*lines, strict=True)]
