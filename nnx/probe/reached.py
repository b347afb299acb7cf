"""The modules that a function closes over or reads as globals, and the function with others."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax

from nnx.transforms.filtered.jit import _JitFilter
from nnx.transforms.jitted import Jit
from refx import Node, Ref, opened
from refx.node import is_identity

__all__: list[str] = []


def reached(fn: Any) -> dict[str, Any]:
    """The modules and Refs that a function reaches, by the names of the variables."""
    found: dict[int, tuple[str, Any]] = {}

    def note(name: str, x: Any) -> Any:
        found.setdefault(id(x), (name, x))
        return x

    _Walk(note).value("", fn)
    return dict(found.values())


def substituted(fn: Any, new: Mapping[int, Any]) -> Callable[..., Any]:
    """The function, with others in the place of some modules and Refs, by their ids."""
    return _Walk(lambda name, x: new.get(id(x), x)).value("", fn)


class _Walk:
    """A walk over what functions reach: variables, globals, helpers, compiled functions, containers.

    `visit(name, x)` gives what is to be in the place of a module or a Ref.
    """

    def __init__(self, visit: Callable[[str, Any], Any]):
        self._visit = visit
        self._done: dict[int, tuple[Any, Any]] = {}
        self._globals: dict[int, dict[str, Any]] = {}

    def value(self, name: str, x: Any) -> Any:
        """What is to be in the place of `x`."""
        if is_identity(x):
            return self._visit(name, x)
        if id(x) in self._done:
            return self._done[id(x)][1]
        self._done[id(x)] = (x, x)
        new = self._made(name, x)
        self._done[id(x)] = (x, new)
        return new

    def _made(self, name: str, x: Any) -> Any:
        if isinstance(x, types.FunctionType):
            return self._function(x)
        if isinstance(x, types.MethodType):
            owner, fn = self.value(name, x.__self__), self.value(name, x.__func__)
            return types.MethodType(fn, owner)
        if isinstance(x, Jit):
            fn = self.value(name, x._given[0])
            return x if fn is x._given[0] else Jit(fn, *x._given[1:])
        if isinstance(x, _JitFilter):
            fn = self.value(name, x._fn)
            none = {"donate_argnums": None, "donate_argnames": None}
            return x if fn is x._fn else _JitFilter(fn, x.options, **x.given, **none)
        if isinstance(x, functools.partial):
            fn, args, keywords = self.value(name, x.func), x.args, x.keywords
            return type(x)(
                fn,
                *(self.value(name, a) for a in args),
                **{k: self.value(k, v) for k, v in keywords.items()},
            )
        if isinstance(x, list | tuple | dict):
            leaves, treedef = opened.flatten(x)
            if any(isinstance(leaf, Node | Ref) for leaf in leaves):
                return jax.tree.unflatten(treedef, [self.value(name, leaf) for leaf in leaves])
        return x

    def _function(self, fn: types.FunctionType) -> Any:
        if _is_library(fn):
            return fn
        code = fn.__code__
        cells = list(fn.__closure__ or ())
        contents: list[Any] = []
        for name, cell in zip(code.co_freevars, cells, strict=True):
            try:
                contents.append(self.value(name, cell.cell_contents))
            except ValueError:
                contents.append(cell)  # a variable that is not bound yet
        defaults = self.value(fn.__name__, fn.__defaults__)
        keywords = {k: self.value(k, v) for k, v in (fn.__kwdefaults__ or {}).items()}
        names = self._read(fn)
        same = defaults is fn.__defaults__ and names is fn.__globals__
        same = same and all(v is (fn.__kwdefaults__ or {})[k] for k, v in keywords.items())
        new_cells = []
        for cell, content in zip(cells, contents, strict=True):
            unbound = content is cell
            changed = not unbound and content is not cell.cell_contents
            new_cells.append(types.CellType(content) if changed else cell)
            same = same and not changed
        if same:
            return fn
        new = types.FunctionType(code, names, fn.__name__, defaults, tuple(new_cells))
        new.__kwdefaults__ = keywords or None
        new.__qualname__, new.__module__ = fn.__qualname__, fn.__module__
        return new

    def _read(self, fn: types.FunctionType) -> dict[str, Any]:
        """The globals of a function, with others for the names that it reads."""
        names = fn.__globals__
        changed: dict[str, Any] = {}
        for name in _names(fn.__code__):
            if name in names and (new := self.value(name, names[name])) is not names[name]:
                changed[name] = new
        return {**names, **changed} if changed else names


def _names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            names |= _names(const)
    return names


_OURS = ("jax", "jaxlib", "numpy", "optax", "refx", "nnx", "flax")


def _is_library(fn: types.FunctionType) -> bool:
    # Functions of a test of ours are as much a user's as any.
    return (fn.__module__ or "").split(".")[0] in _OURS
