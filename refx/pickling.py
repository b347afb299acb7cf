"""How a DagDef is pickled: its static values one by one, so that an error can say which attribute.

Pickle knows a function by its module and its name. JAX's own activations are objects that have both,
but that pickle does not know as functions, so they are looked up by name here.
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

from refx.dagdef import DagDef, NodeDef, RefDef, Tree
from refx.errors import UnpicklableStaticError
from refx.partition import Path, dotted
from refx.static import Static

__all__: list[str] = []


def _reduce_static(static: Static) -> tuple[Any, ...]:
    name = _global_name(static.value)
    return static.__reduce__() if name is None else (_by_name, name)


def _global_name(value: Any) -> tuple[str, str] | None:
    # Plain functions and classes are left to the pickler, which may take some of them by value.
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
    # Picklers that extend pickle's, as cloudpickle does, know more kinds of functions than it.
    pickler = sys._getframe(1).f_locals.get("self")
    kinds = (pickle.Pickler, pickle._Pickler)  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(pickler, kinds) or type(pickler) in kinds:
        for link, static in _statics(dagdef):
            _check(link, static)
    return dagdef.__reduce__()


_PICKLABLE = frozenset({int, float, bool, str, complex, bytes, type(None)})


def _check(link: Any, static: Static) -> None:
    value = static.value
    if type(value) in _PICKLABLE:
        return
    try:
        pickle.dumps(static)
    except Exception as error:
        what = getattr(value, "__qualname__", None) or type(value).__qualname__
        path = _path(link)
        where = f"Attribute {dotted(path)!r}" if path else "The tree"
        raise UnpicklableStaticError(
            f"{where} is {what}, which pickle cannot write ({error}). Define a function with `def` "
            f"at the top level of a module that both programs import, and in place of a lambda or a "
            f"local function use that one, or a functools.partial of it."
        ) from error


def _statics(dagdef: DagDef) -> Iterator[tuple[Any, Static]]:
    """Every static value with its path, a linked list, since a tree may be deep."""
    seen: set[int] = set()
    todo: list[tuple[Any, Any]] = [(dagdef.root, None)]
    while todo:
        child, link = todo.pop()
        if type(child) is int:
            if child in seen:
                continue
            seen.add(child)
            child = dagdef.nodes[child]
        if isinstance(child, Static):
            yield link, child
        elif isinstance(child, RefDef):
            yield link, child.collection
            yield from (((link, name), fact) for name, fact in child.metadata)
        elif isinstance(child, NodeDef | Tree):
            todo += [(c, (link, name)) for name, c in zip(child.names, child.children, strict=True)]


def _path(link: Any) -> Path:
    parts: list[str] = []
    while link is not None:
        link, name = link
        parts.append(str(name))
    return tuple(reversed(parts))


copyreg.pickle(Static, _reduce_static)  # pyright: ignore
copyreg.pickle(DagDef, _reduce_dagdef)  # pyright: ignore
