"""A model as HTML that folds, for the output of a notebook cell."""

from __future__ import annotations

import html

__all__ = ["tree_html"]

# This many levels are open at first, if the model is not wide.
_OPEN = 2
_SHORT = 40


def tree_html(text: str) -> str:
    """The printed model as HTML. Every part of more than one line can fold.

    It is self-contained: no script, no style sheet, no network.
    """
    lines = text.split("\n")
    out = ['<div style="font-family: monospace; white-space: pre; line-height: 1.4">']
    depth = 0
    for i, line in enumerate(lines):
        bare = line.lstrip(" ")
        level = (len(line) - len(bare)) // 2
        shown = _line(line)
        if bare[:1] in (")", "]", "}") and depth:
            out.append(f"{shown}\n</details>")
            depth -= 1
        elif i + 1 < len(lines) and line.endswith(("(", "[", "{")):
            wide = len(lines) > _SHORT
            attribute = " open" if level < (1 if wide else _OPEN) else ""
            out.append(
                f'<details{attribute} style="margin: 0"><summary style="cursor: pointer">'
                f"{shown}</summary>"
            )
            depth += 1
        else:
            out.append(f"{shown}\n")
    out.append("</details>" * depth + "</div>")
    return "".join(out)


def _line(line: str) -> str:
    code, mark, note = line.partition("  # ")
    text = html.escape(code)
    if mark:
        text += f'<span style="opacity: 0.6">{html.escape(mark + note)}</span>'
    return text
