"""Pickling of a DagDef: one static value at a time, so that an error can name the attribute.

Pickle stores a function as its module and its name. JAX's own activations are objects with both, but
pickle does not treat them as functions, so we look them up by name here.
"""

from __future__ import annotations

import copyreg
import importlib
import operator
import pickle
import sys
import types
from collections.abc import Iterator
from typing import Any

from refx.dagdef import DagDef, RefDef, parts
from refx.errors import UnpicklableStaticError
from refx.partition import Path, dotted
from refx.static import Static

__all__: list[str] = []


def _reduce_static(static: Static) -> tuple[Any, ...]:
    name = _global_name(static.value)
    return static.__reduce__() if name is None else (_by_name, name)


def _global_name(value: Any) -> tuple[str, str] | None:
    # Leave plain functions and classes to the pickler, which may pickle some by value.
    if not callable(value) or isinstance(value, type | types.FunctionType):
        return None
    module = getattr(value, "__module__", None)
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module == "__main__":
        return None
    try:
        found = operator.attrgetter(name)(sys.modules[module])
    except (KeyError, AttributeError):
        return None
    return (module, name) if found is value else None


def _by_name(module: str, name: str) -> Static:
    return Static(operator.attrgetter(name)(importlib.import_module(module)))


def _reduce_dagdef(dagdef: DagDef) -> tuple[Any, ...]:
    # Picklers that extend pickle's, such as cloudpickle's, accept more kinds of functions.
    pickler = sys._getframe(1).f_locals.get("self")
    kinds = (pickle.Pickler, pickle._Pickler)  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(pickler, kinds) or type(pickler) in kinds:
        for path, static in _statics(dagdef):
            _check(path, static)
    return dagdef.__reduce__()


_PICKLABLE = frozenset({int, float, bool, str, complex, bytes, type(None)})


def _check(path: Path, static: Static) -> None:
    value = static.value
    if type(value) in _PICKLABLE:
        return
    try:
        pickle.dumps(static)
    except Exception as error:
        what = getattr(value, "__qualname__", None) or type(value).__qualname__
        where = f"Attribute {dotted(path)!r}" if path else "The tree"
        raise UnpicklableStaticError(
            f"{where} is {what}, which pickle cannot write ({error}). Instead of a lambda or a local "
            f"function, use one defined with `def` at the top level of a module that both programs "
            f"import, or a functools.partial of it."
        ) from error


def _statics(dagdef: DagDef) -> Iterator[tuple[Path, Static]]:
    """Every static value with its path."""
    for part, path in parts(dagdef):
        node = dagdef.nodes[part] if type(part) is int else part
        if isinstance(node, Static):
            yield path, node
        elif isinstance(node, RefDef):
            yield path, node.collection
            yield from (((*path, name), fact) for name, fact in node.metadata)


copyreg.pickle(Static, _reduce_static)  # pyright: ignore
copyreg.pickle(DagDef, _reduce_dagdef)  # pyright: ignore
