"""Finds the first difference between two modules, and says it in the words of a message."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

import refx
from refx.dagdef import DagDef, Leaf, NodeDef, RefDef, Tree
from refx.partition import Path, dotted
from refx.snapshot import snapshot
from refx.static import Static
from refx.text import a_kind

__all__: list[str] = []


def difference(a: Any, b: Any, here: str, there: str) -> str | None:
    """The first difference between two modules, apart from their values; None if there is none.

    Args:
      a, b: the modules.
      here, there: what the message calls them.
    """
    one, other = snapshot(a).dagdef, snapshot(b).dagdef
    if one is not other:
        path, x, y = _first(one, other)
        where = repr(dotted(path)) if path else "it"
        return f"{where} is {x} in {here} and {y} in {there}"
    values, others = refx.get_partition(a), refx.get_partition(b)
    for path, value in values.items():
        x, y = _text(value), _text(others[path])
        if x != y:
            return f"{dotted(path)!r} is {x} in {here} and {y} in {there}"
    return None


def _text(value: Any) -> str:
    leaves, treedef = jax.tree.flatten(value)
    shapes = [f"{jax.dtypes.result_type(x)}[{','.join(map(str, np.shape(x)))}]" for x in leaves]
    return shapes[0] if treedef == _ARRAY else f"{treedef} of {', '.join(shapes)}"


_ARRAY = jax.tree.structure(0)


def _first(a: DagDef, b: DagDef) -> tuple[Path, str, str]:
    todo: list[tuple[Any, Any, Path]] = [(a.root, b.root, ())]
    seen: set[int] = set()
    while todo:
        x, y, path = todo.pop()
        if x == y and type(x) is int:
            if x in seen:
                continue
            seen.add(x)
            x, y = a.nodes[x], b.nodes[y]
        elif type(x) is int and type(y) is int:
            kinds = _said(a.nodes[x]), _said(b.nodes[y])
            return (path, *kinds) if kinds[0] != kinds[1] else (path, "shared", "shared otherwise")
        if type(x) is not type(y) or not isinstance(x, NodeDef | Tree):
            if x != y:
                return path, _said(x, a), _said(y, b)
            continue
        if isinstance(x, NodeDef) and x.kind is not y.kind:
            return path, _said(x), _said(y)
        if x.names != y.names:
            own, others = list(map(str, x.names)), list(map(str, y.names))
            name = next((n for n in own + others if (n in own) != (n in others)), None)
            if name is None:
                return path, f"{own} in order", f"{others}"
            here, there = ("there" if name in names else "missing" for names in (own, others))
            return (*path, name), here, there
        pairs = zip(x.names, x.children, y.children, strict=True)
        todo += [(c, d, (*path, str(name))) for name, c, d in pairs][::-1]
    return (), "one class", "another"


def _said(x: Any, dagdef: DagDef | None = None) -> str:
    if type(x) is int and dagdef is not None:
        x = dagdef.nodes[x]
    if isinstance(x, Static):
        return f"{x.value!r:.60}"
    if isinstance(x, NodeDef):
        return a_kind(x.kind)
    if isinstance(x, RefDef):
        settings = "".join(f", {name}={value.value!r}" for name, value in x.metadata)
        return f"a Ref of {x.collection.value!r}{settings}"
    return "an array" if isinstance(x, Leaf) else "a tree"
