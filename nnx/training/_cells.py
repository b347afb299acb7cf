"""Refs by path, which the optimizer and the moving average keep beside a model."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import refx
from nnx.module import Module
from refx import Filter, Node, Partition, Ref
from refx.dag import dtype_of
from refx.node import attributes
from refx.partition import Path, dotted, listed
from refx.selection import mistake
from refx.text import with_article

__all__: list[str] = []


class Cells(Module):
    """Refs under nested names. It is a module and not a dict, because trees compare modules faster."""


def nest(cells: Mapping[Path, Ref[Any]]) -> Any:
    """A tree of `Cells` with each Ref at its path. A Ref at the empty path is the whole tree."""
    if () in cells:
        return cells[()]
    root = Cells()
    for path, cell in cells.items():
        at: Any = root
        # The parts of a path are instances of a subclass of str, but attribute names are plain
        # strings.
        *outer, last = map(str, path)
        for name in outer:
            if name not in attributes(at):
                setattr(at, name, Cells())
            at = getattr(at, name)
        setattr(at, last, cell)
    return root


def selected(model: Any, filter: Filter) -> dict[Path, Ref[Any]]:
    """The Refs of a model that a filter selects, by their canonical paths."""
    selects = refx.to_predicate(filter)
    return {path: cell for path, cell in refx.refs(model).items() if selects(path, cell)}


def values_of(model: Any, cells: Mapping[Path, Ref[Any]]) -> Partition:
    """The values of some Refs of a model. They are read through the model, so that closures work."""
    chosen = {id(cell) for cell in cells.values()}
    return refx.get_partition(model, lambda path, cell: id(cell) in chosen)


def nothing_selected(what: str, model: Any, filter: Filter) -> str:
    """The error text for a filter that selects no Ref."""
    there = sorted({repr(cell.collection) for cell in refx.refs(model).values()})
    kind = type(model).__name__
    if there:
        found = f"its Refs are in the collections {', '.join(there)}."
    elif isinstance(model, Node) and refx.get_partition(model):
        found = (
            f"{with_article(kind)} has no Refs. Its arrays are plain attributes, which no training changes: "
            "declare them in the class, `w: jax.Array = nnx.param()`."
        )
    else:
        found = f"{with_article(kind)} has no Refs."
    text = f"{what}: the filter {filter!r} selects no Ref of the {kind}; {found}"
    return f"{text} {mistake(filter, model) or ''}".rstrip()


def paths_differ(what: str, got: Any, expected: Any, unknown_to: str) -> str | None:
    """How two sets of paths differ, for a message; None if they are equal."""
    missing = [path for path in expected if path not in got]
    unknown = [path for path in got if path not in expected]
    parts = []
    if missing:
        parts.append(f"{what} lack {listed(missing)}")
    if unknown:
        parts.append(f"{'they' if parts else what} have {listed(unknown)}, {unknown_to}")
    return "; ".join(parts) or None


def values_differ(
    what: str,
    got: Partition,
    expected: Partition,
    *,
    shapes_fit: Callable[[Any, Any], bool] = operator.eq,
    dtypes_fit: Callable[[Any, Any], bool] = operator.eq,
) -> str | None:
    """The first path where two partitions differ in structure, shape or dtype, for a message."""
    for path, old in expected.items():
        new = got[path]
        old_leaves, old_tree = jax.tree.flatten(old)
        new_leaves, new_tree = jax.tree.flatten(new)
        if old_tree != new_tree:
            return f"{what} at {dotted(path)!r} has the structure {new_tree}, not {old_tree}"
        for a, b in zip(old_leaves, new_leaves, strict=True):
            if not shapes_fit(np.shape(b), np.shape(a)):
                return f"{what} at {dotted(path)!r} has shape {np.shape(b)}, not {np.shape(a)}"
            if not dtypes_fit(dtype_of(b), dtype_of(a)):
                return f"{what} at {dotted(path)!r} has dtype {dtype_of(b)}, not {dtype_of(a)}"
    return None


def widens(new: Any, old: Any) -> bool:
    """Whether one dtype equals the other, or is a wider one of its kind (float32 and bfloat16)."""
    kinds = (jnp.floating, jnp.complexfloating)
    of_a_kind = any(jnp.issubdtype(new, k) and jnp.issubdtype(old, k) for k in kinds)
    return new == old or (of_a_kind and jnp.promote_types(new, old) == new)


def fresh(x: Any) -> jax.Array:
    """A copy with its own buffer, so it survives when the original is donated.

    It is not weakly typed: otherwise the first write changes the type, and a step compiles twice.
    """
    return strong(jnp.array(x, copy=True))


def strong(x: Any) -> Any:
    """The array without its weak type, if it has one."""
    weak = getattr(x, "weak_type", False)
    return jax.lax.convert_element_type(x, x.dtype) if weak else x
