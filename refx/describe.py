"""Names for messages: of a Ref, and of the place where the code runs."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import jax

from refx.frame import local
from refx.partition import dotted
from refx.text import array_text, is_arraylike
from refx.trace import EVAL, current_trace, kind_of

if TYPE_CHECKING:
    from refx.ref import Ref

__all__: list[str] = []


def transformation() -> str:
    """The name of the innermost transformation that runs here, in a user's words."""
    frame, trace = local.frame, current_trace(())
    if frame is not None and frame.trace() is trace:
        return frame.name
    if trace is EVAL:
        return "code outside of every transformation"
    return kind_of(trace)


def describe(ref: Ref[Any], owner: Any = None) -> str:
    """Name a Ref for a message: by its path if a frame knows it, else by its owner.

    The owner is the module through which it was reached, or just a path if only that is known.
    """
    frame = local.frame
    while frame is not None:
        known = frame.describe(ref) if frame.describe is not None else None
        if known is not None:
            return f"Ref {known} ({summary(ref)})"
        frame = frame.parent
    if type(owner) is str:
        return f"Ref {owner!r} ({summary(ref)})"
    if owner is not None:
        for name, value in owner._dict.items():
            if value is ref:
                return f"Ref {type(owner).__name__}.{name} ({summary(ref)})"
    for root, (dagdef, refs) in list(copies.items()):
        for path, known in zip(dagdef.ref_paths, refs, strict=True):
            if known is ref:
                return f"Ref {dotted(path)!r} of a {type(root).__name__} ({summary(ref)})"
    return f"A Ref ({summary(ref)})"


copies: weakref.WeakKeyDictionary[Any, tuple[Any, list[Ref[Any]]]] = weakref.WeakKeyDictionary()
"""The live Nodes that JAX rebuilt around tracers, with their structure and their Refs."""


def summary(ref: Ref[Any]) -> str:
    """The collection and the shapes of a Ref. This does not touch its arrays."""
    if ref._value is None and ref._frame is not None and not ref._frame.open:
        return f"collection {ref._collection!r}"
    return f"collection {ref._collection!r}, {value_text(ref._value)}"


def value_text(value: Any) -> str:
    """The dtype and the shape of a value, or its repr."""
    if is_arraylike(value):
        return array_text(value)
    leaves = jax.tree.leaves(value)
    if len(leaves) == 1 and leaves[0] is value:
        return repr(value)
    return f"{type(value).__name__} of {len(leaves)} leaves"
