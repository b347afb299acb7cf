"""Divide the arguments of a call into roots (modules and Refs) and values."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from refx import Node, Ref, RefError, opened
from refx.node import is_identity

__all__ = ["ArgumentError"]

# New types could fill this cache without end. A dropped entry is rebuilt.
_MOST = 512


class ArgumentError(RefError, TypeError, ValueError):
    """An argument is of a type that no transformation accepts."""


class Form:
    """The positions of the roots among the flattened arguments.

    Forms are interned, so a key that holds one hashes by identity.
    """

    __slots__ = ("__weakref__", "treedef", "where")

    def __init__(self, treedef: Any, where: tuple[int, ...]):
        self.treedef = treedef
        self.where = where


_forms: weakref.WeakValueDictionary[Any, Form] = weakref.WeakValueDictionary()

# The forms of calls whose arguments are some roots followed by single arrays or numbers.
_flat_forms: dict[tuple[type, ...], tuple[Form, int]] = {}
_SINGLE = frozenset({np.ndarray, bool, int, float, complex})


@functools.lru_cache(maxsize=256)
def _is_single(kind: type) -> bool:
    """Whether values of this type are one leaf: an array that is not a tracer, or a number."""
    return kind in _SINGLE or (issubclass(kind, jax.Array) and not issubclass(kind, Tracer))


def _check_others(others: list[Any], args: Any, kwargs: Any) -> None:
    """Raise for an argument that JAX cannot trace."""
    for x in others:
        if (what := getattr(type(x), "_as_argument", None)) is not None:
            raise ArgumentError(f"An argument is {what}.")
        if _is_single(type(x)) or hasattr(x, "dtype") or hasattr(x, "__jax_array__"):
            continue
        flat = opened.flatten_with_path((args, kwargs))[0]
        path = next(path for path, leaf in flat if leaf is x)[1:]
        where = jax.tree_util.keystr(path)
        advice = (
            "Pass a setting as a static argument of nnx.jit (static_argnames=...), as an attribute of a "
            "module, or by closure; put modules and Refs in a list, a tuple or a dict rather than in a set "
            "or a generator."
        )
        if len(path) == 1 and any(hasattr(f, "__wrapped__") for f in vars(type(x)).values()):
            advice = (
                "To transform a method of an ordinary class, transform the bound method, as in "
                f"self.step = nnx.jit(self._step) in __init__, or make {type(x).__name__} an nnx.Module."
            )
        raise ArgumentError(
            f"Argument {where} is a {type(x).__name__}, not an array, a number, a module, a Ref "
            f"or a pytree of these: {x!r:.80}. {advice}"
        )


def take_roots(
    args: tuple[Any, ...], kwargs: dict[str, Any], any_leaf: bool
) -> tuple[Form, list[Any], list[Any]]:
    types = tuple(map(type, args))
    known = _flat_forms.get(types) if not kwargs else None
    if known is not None:
        form, count = known
        return form, list(args[:count]), list(args[count:])
    flat, treedef = opened.flatten((args, kwargs))
    where = tuple(i for i, x in enumerate(flat) if is_identity(x))
    rest = tuple(i for i, x in enumerate(flat) if not is_identity(x))
    form = _forms.get((treedef, where)) or _forms.setdefault((treedef, where), Form(treedef, where))
    count = len(where)
    first, last = types[:count], types[count:]
    if not kwargs and all(issubclass(t, (Node, Ref)) for t in first) and all(map(_is_single, last)):
        if len(_flat_forms) >= _MOST:
            _flat_forms.clear()
        _flat_forms[types] = form, count
    others = [flat[i] for i in rest]
    if not (any_leaf or all(map(_is_single, map(type, others)))):
        _check_others(others, args, kwargs)
    return form, [flat[i] for i in where], others
