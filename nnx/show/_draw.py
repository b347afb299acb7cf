"""Draw a laid-out graph: as SVG text, or with matplotlib."""

from __future__ import annotations

import colorsys
import os
import zlib
from html import escape
from typing import Any

from nnx.show._layout import BACK_EDGE, SHARED, Box, Edge, Point

__all__ = ["to_matplotlib", "to_svg"]

_INK = "#1f2430"
_FAINT = "#5c6370"
_LINES = {SHARED: "#c2570c", BACK_EDGE: "#b91c1c"}
_LINE = "#9aa1ad"


def colors(box: Box) -> tuple[str, str]:
    """The colours of fill and border. Each class has the same hue in all models. Refs look like
    shared edges.
    """
    if not box.module:
        return "#fff7ed", _LINES[SHARED]
    hue = zlib.crc32(box.title.encode()) % 360 / 360
    return _hex(hue, 0.93, 0.65), _hex(hue, 0.55, 0.45)


def _hex(hue: float, light: float, saturation: float) -> str:
    rgb = colorsys.hls_to_rgb(hue, light, saturation)
    return "#" + "".join(f"{round(255 * c):02x}" for c in rgb)


def to_svg(boxes: list[Box], edges: list[Edge], size: tuple[float, float]) -> str:
    """The picture as SVG. Tooltips show what does not fit in the boxes."""
    width, height = size
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    order = sorted(edges, key=lambda e: e.kind)
    for edge in order:
        line = _LINES.get(edge.kind, _LINE)
        dashed = ' stroke-dasharray="5 3"' if edge.kind in _LINES else ""
        out.append(
            f'<path d="{_path(edge)}" fill="none" stroke="{line}" stroke-width="1.3"{dashed}/>'
        )
        tip = " ".join(f"{x:.1f},{y:.1f}" for x, y in _tip(edge))
        out.append(f'<polygon points="{tip}" fill="{line}"/>')
    for edge in order:
        x, y = edge.label_at
        out.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="end" '
            f'fill="{_LINES.get(edge.kind, _FAINT)}" stroke="#ffffff" stroke-width="3" '
            f'paint-order="stroke">{_text(edge.label)}</text>'
        )
    for box in boxes:
        out += _svg_box(box)
    return "\n".join([*out, "</svg>"])


def _svg_box(box: Box) -> list[str]:
    fill, border = colors(box)
    top, radius = box.y - box.height / 2, 7 if box.module else box.height / 2
    out = [f"<g><title>{_text(box.facts)}</title>"]
    if box.count > 1:
        # A second sheet behind the box shows that it stands for several.
        out.append(
            f'<rect x="{box.x + 4:.1f}" y="{top + 4:.1f}" width="{box.width:.1f}" '
            f'height="{box.height:.1f}" rx="{radius:.1f}" fill="{fill}" stroke="{border}"/>'
        )
    out.append(
        f'<rect x="{box.x:.1f}" y="{top:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" '
        f'rx="{radius:.1f}" fill="{fill}" stroke="{border}" stroke-width="1.3"/>'
    )
    times = f' <tspan fill="{border}">×{box.count}</tspan>' if box.count > 1 else ""
    title_y = box.y + (-3 if box.subtitle else 4.5)
    out.append(
        f'<text x="{box.x + 12:.1f}" y="{title_y:.1f}" font-size="13" font-weight="bold" '
        f'fill="{_INK}">{_text(box.title)}{times}</text>'
    )
    if box.subtitle:
        out.append(
            f'<text x="{box.x + 12:.1f}" y="{box.y + 13:.1f}" fill="{_FAINT}">'
            f"{_text(box.subtitle)}</text>"
        )
    return [*out, "</g>"]


def _path(edge: Edge) -> str:
    parts = []
    for i, points in enumerate(edge.path):
        command = "M" if i == 0 else "L" if len(points) == 1 else "C"
        parts.append(command + " ".join(f"{x:.1f},{y:.1f}" for x, y in points))
    return " ".join(parts)


def _tip(edge: Edge) -> list[Point]:
    if edge.kind == BACK_EDGE:
        x, y = edge.path[0][0]
        return [(x, y), (x + 7, y - 4), (x + 7, y + 4)]
    x, y = edge.path[-1][-1]
    return [(x, y), (x - 7, y - 4), (x - 7, y + 4)]


def _text(text: str) -> str:
    """Text that is safe in XML, which forbids most control characters."""
    return escape("".join(c if c.isprintable() or c == "\n" else "�" for c in text))


def to_matplotlib(
    boxes: list[Box], edges: list[Edge], size: tuple[float, float], path: str | os.PathLike[str]
) -> None:
    """Write the picture as PNG or PDF.

    Raises:
      ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
        from matplotlib.path import Path as Curve
        from matplotlib.patheffects import withStroke
    except ImportError as error:
        raise ImportError(
            "nnx.graph needs matplotlib to save a PNG or a PDF: pip install matplotlib. Or save "
            "to a path that ends in .svg, which works without it."
        ) from error
    width, height = size
    # Make the figure without pyplot, so that nothing is shown and the user's figures stay
    # untouched.
    figure = Figure(figsize=(width / 72, height / 72), dpi=144)
    FigureCanvasAgg(figure)
    axes: Any = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    for edge in sorted(edges, key=lambda e: e.kind):
        line = _LINES.get(edge.kind, _LINE)
        dashes: Any = (0, (4, 2.5)) if edge.kind in _LINES else "solid"
        codes = [Curve.MOVETO]
        for points in edge.path[1:]:
            codes += [Curve.LINETO] if len(points) == 1 else [Curve.CURVE4] * 3
        curve = Curve([point for points in edge.path for point in points], codes)
        axes.add_patch(PathPatch(curve, fill=False, edgecolor=line, linestyle=dashes, zorder=1))
        axes.add_patch(Polygon(_tip(edge), facecolor=line, zorder=1))
        halo = [withStroke(linewidth=3, foreground="#ffffff")]
        ink = _LINES.get(edge.kind, _FAINT)
        options: Any = {"horizontalalignment": "right", "path_effects": halo}
        _write(axes, *edge.label_at, edge.label, 9.5, ink, **options)
    for box in boxes:
        fill, border = colors(box)
        for offset in (4, 0) if box.count > 1 else (0,):
            corner = (box.x + offset, box.y - box.height / 2 + offset)
            radius = 7 if box.module else box.height / 2
            style = f"round,pad=0,rounding_size={radius}"
            axes.add_patch(
                FancyBboxPatch(
                    corner, box.width, box.height, style, facecolor=fill, edgecolor=border, zorder=2
                )
            )
        y = box.y + (-3 if box.subtitle else 4.5)
        _write(axes, box.x + 12, y, box.title, 11, _INK, fontweight="bold")
        if box.count > 1:
            x = box.x + box.width - 12
            times = f"×{box.count}"
            _write(axes, x, y, times, 11, border, fontweight="bold", horizontalalignment="right")
        _write(axes, box.x + 12, box.y + 13, box.subtitle, 9.5, _FAINT)
    figure.savefig(path)


def _write(axes: Any, x: float, y: float, text: str, size: float, ink: str, **options: Any) -> None:
    # matplotlib would read a dollar sign as the beginning of mathematics.
    text = text.replace("$", r"\$")
    axes.text(x, y, text, fontsize=size, color=ink, zorder=3, family="sans-serif", **options)
