"""The results as markdown, JSON and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.timing import Ratio


def by_size(title: str, results: dict[int, dict[str, Ratio]]) -> str:
    sizes = list(results)
    lines = [f"### {title}", "", "| | " + " | ".join(f"{s} arrays" for s in sizes) + " |"]
    lines.append("| --- " * (len(sizes) + 1) + "|")
    for name in results[sizes[0]]:
        cells = [str(results[s][name]) for s in sizes]
        if name == "jax.jit":
            cells = [f"1 = {results[s][name].microseconds:.0f} µs" for s in sizes]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def by_name(title: str, results: dict[str, Ratio], baseline: str) -> str:
    lines = [f"### {title}", "", "| | ratio |", "| --- | --- |"]
    for name, ratio in results.items():
        cell = f"1 = {ratio.microseconds:.0f} µs" if name == baseline else str(ratio)
        lines.append(f"| {name} | {cell} |")
    return "\n".join(lines) + "\n"


def by_row(title: str, rows: dict[str, dict[str, Ratio]], baseline: str) -> str:
    """A table of ratios. Each row has a baseline, whose time it shows."""
    flat = {
        name: {
            k: f"1 = {r.microseconds:.0f} µs" if k == baseline else str(r) for k, r in row.items()
        }
        for name, row in rows.items()
    }
    return table(title, flat)


def table(title: str, rows: dict[str, dict[str, Any]], digits: int = 2) -> str:
    columns = list(next(iter(rows.values())))
    lines = [f"### {title}", "", "| | " + " | ".join(columns) + " |"]
    lines.append("| --- " * (len(columns) + 1) + "|")
    for name, row in rows.items():
        cells = [f"{v:.{digits}f}" if isinstance(v, float) else str(v) for v in row.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, dict[int, dict[str, Ratio]]], path: Path) -> None:
    """Ratios by size, one panel for each kind of step."""
    figure, axes = plt.subplots(
        1,
        len(results),
        figsize=(4.0 * len(results), 4.0),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    names = list(dict.fromkeys(n for by in results.values() for row in by.values() for n in row))
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    for axis, (title, by) in zip(axes[0], results.items(), strict=True):
        sizes = list(by)
        for name in by[sizes[0]]:
            ratios = [by[s][name] for s in sizes]
            axis.plot(
                sizes,
                [r.median for r in ratios],
                "o-",
                label=name,
                markersize=4,
                color=colors[name],
            )
            axis.fill_between(
                sizes,
                [r.low for r in ratios],
                [r.high for r in ratios],
                alpha=0.15,
                color=colors[name],
            )
        axis.set(xscale="log", yscale="log", title=title, xlabel="parameter arrays")
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("time ÷ hand-written jax.jit")
    lines = {line.get_label(): line for axis in axes[0] for line in axis.lines}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The existing pages, each with its text and its data."""
    path = folder / "results.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(folder: Path, header: str, pages: dict[str, dict[str, Any]]) -> None:
    """Write pages. Existing pages that were not measured now stay as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = read(folder) | pages
    text = "\n".join([header, *(page["text"] for page in pages.values())])
    (folder / "results.md").write_text(text)
    (folder / "results.json").write_text(json.dumps(pages, indent=1, default=str) + "\n")
