"""A function by its content: two lambdas of one line that close over equal things are the same."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from refx import opened
from refx.node import is_identity
from refx.static import Same, Static

__all__: list[str] = []


class _Hole:
    """Where an array was."""

    def __repr__(self) -> str:
        return "<array>"


_HOLE = _Hole()


class Function:
    """A function apart from the arrays and modules that it closes over or has as defaults.

    Equality and hash are by content. `arrays` are those of the function it was made of, and
    `bind(arrays)` is the function with others in their place. A function that is shared between
    programs keeps none of its arrays: see `without_arrays`.
    """

    __slots__ = ("_key", "_make", "arrays")

    def __init__(self, fn: Callable[..., Any]):
        self.arrays: list[Any] = []
        self._key, self._make = _take(fn, self.arrays)

    def without_arrays(self) -> Function:
        """The same function, for others than its own arrays."""
        bare = object.__new__(Function)
        bare._key, bare._make, bare.arrays = self._key, self._make, []
        return bare

    def bind(self, arrays: list[Any]) -> Callable[..., Any]:
        """The function with these arrays."""
        return self._make(iter(arrays))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Function) and other._key == self._key

    def __hash__(self) -> int:
        return hash(self._key)


def _take(x: Any, arrays: list[Any]) -> tuple[Any, Callable[[Any], Any]]:
    """The key of a value, and what makes it again of an iterator over arrays."""
    if is_value(x):
        arrays.append(x)
        return _HOLE, next
    if type(x) is types.FunctionType:
        return _take_function(x, arrays)
    if isinstance(x, functools.partial):
        key, make = _take((x.func, tuple(x.args), tuple(sorted(x.keywords.items()))), arrays)
        kind = type(x)

        def again(given: Any) -> Any:
            func, args, keywords = make(given)
            return kind(func, *args, **dict(keywords))

        return (kind, key), again
    if type(x) is tuple:
        parts = [_take(part, arrays) for part in x]
        return (tuple, tuple(k for k, _ in parts)), lambda given: tuple(
            [m(given) for _, m in parts]
        )
    leaves, treedef = opened.flatten(x)
    if any(map(is_value, leaves)):
        key, make = _take(tuple(leaves), arrays)
        return (treedef, key), lambda given: jax.tree.unflatten(treedef, make(given))
    try:
        key: Any = Static(x)
        hash(key)
    except TypeError:
        key = Same(x)
    return key, lambda given: x


def _take_function(fn: Any, arrays: list[Any]) -> tuple[Any, Callable[[Any], Any]]:
    cells = tuple(_content(cell) for cell in fn.__closure__ or ())
    held = (cells, fn.__defaults__, tuple((fn.__kwdefaults__ or {}).items()))
    if any(cell is fn for cell in cells):
        # One that calls itself.
        return Same(fn), lambda given: fn
    key, make = _take(held, arrays)
    code, globals_, name, more = fn.__code__, fn.__globals__, fn.__name__, dict(fn.__dict__)

    def again(given: Any) -> Any:
        cells, defaults, keywords = make(given)
        new = types.FunctionType(code, globals_, name, defaults, tuple(map(_cell, cells)))
        new.__kwdefaults__ = dict(keywords) or None
        new.__dict__.update(more)
        return new

    return (types.FunctionType, code, Same(globals_), key), again


def is_value(x: Any) -> bool:
    """Whether `x` is an input of a program: an array, a module or a Ref."""
    return is_identity(x) or isinstance(x, jax.Array | np.ndarray)


class _Empty:
    pass


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _Empty


def _cell(content: Any) -> Any:
    return types.CellType() if content is _Empty else types.CellType(content)
