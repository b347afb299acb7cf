"""How a module prints: a tree with names, classes, settings and shapes, shared parts once."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from refx import Node, Ref
from refx.node import attributes

__all__: list[str] = []


def tree_repr(node: Node) -> str:
    """The module as text. Nothing is copied from a device."""
    return _show(node, "", {})


def _show(x: Any, indent: str, seen: dict[int, str], path: str = "") -> str:
    if isinstance(x, Ref | Node | list | dict):
        if id(x) in seen:
            return f"<same as {seen[id(x)] or 'the root'}>"
        seen[id(x)] = path
    if isinstance(x, Ref):
        return f"{_leaf(x._value)}  # {x.collection}"
    if isinstance(x, Node):
        return _block(f"{type(x).__name__}(", attributes(x).items(), ")", " = ", indent, seen, path)
    if isinstance(x, dict):
        return _block("{", x.items(), "}", ": ", indent, seen, path)
    if isinstance(x, list | tuple) and any(isinstance(v, Ref | Node | list | dict) for v in x):
        ends = "[]" if isinstance(x, list) else "()"
        return _block(ends[0], enumerate(x), ends[1], ": ", indent, seen, path)
    return _leaf(x)


def _block(
    head: str, items: Any, tail: str, sep: str, indent: str, seen: dict[int, str], path: str
) -> str:
    inner = indent + "  "
    lines = [
        f"{inner}{k}{sep}{_show(v, inner, seen, f'{path}.{k}' if path else str(k))}\n"
        for k, v in items
    ]
    return f"{head}\n{''.join(lines)}{indent}{tail}" if lines else head + tail


def _leaf(x: Any) -> str:
    if isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    if jax.tree_util.all_leaves([x]) or not jax.tree.leaves(x):
        return getattr(x, "__name__", None) or repr(x)
    return f"{type(x).__name__} of {len(jax.tree.leaves(x))} leaves"
