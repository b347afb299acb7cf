"""Loops and branches outside of compiled code: a program for each function, kept for the next call.

`jax.lax` knows a loop again by the function that is its body. A body is often a new lambda of the
same code, though, and what it closes over are modules whose values change. So a function is taken
apart, as a module is: its code and its settings are the key of a program, the arrays and modules
in its variables are arguments of it. What is left (globals, attributes of objects) is found by
looking, as for `nnx.jit`.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from nnx.transforms.closure import Closure
from nnx.transforms.jitted import Jit
from nnx.transforms.names import names_of
from nnx.transforms.objects import ARRAYS, SCALARS, content, data_in, is_plain
from refx import StructureError, opened
from refx.node import is_identity
from refx.static import NESTED, Same, Static, exact
from refx.trace import in_program, without_jit

__all__: list[str] = []


class OutsideError(StructureError):
    """The body of a loop or a branch set a variable, or changed a list, that is outside of it."""


# So many programs are kept; each holds what XLA made of it.
_MOST = 256


class _Weak:
    """An object as part of a key that does not keep it alive."""

    __slots__ = ("__weakref__", "_id", "_ref")

    def __init__(self, x: Any):
        self._id = id(x)
        self._ref = weakref.ref(x, _forget)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Weak) or self._id != other._id:
            return False
        return (x := self._ref()) is not None and x is other._ref()

    def __hash__(self) -> int:
        return self._id

    @property
    def is_dead(self) -> bool:
        return self._ref() is None


class _Parts:
    """Functions taken apart: `key` says what they are, `dynamic` are the arguments in them.

    Invariants: functions with one key compute alike on the same `dynamic`, if looking from `starts`
    finds the same; and `build` gives functions that are those that were taken apart, but for what is
    in `dynamic`.
    """

    def __init__(self, fns: tuple[Callable[..., Any], ...]):
        self.dynamic: list[Any] = []
        self.opaque: list[Any] = []
        self.weak: list[_Weak] = []
        self.functions: list[types.FunctionType] = []
        self._numbers: dict[int, int] = {}
        self._builders: dict[int, Any] = {}
        self.fns = fns
        # What the parts were built into, with the name and the value of each variable.
        self._bound: list[tuple[str, Any, Any]] = []
        self.key = tuple([self._take(fn, counts=True) for fn in fns])

    def _take(self, x: Any, *, counts: bool, read: bool = False) -> Any:
        """The key of `x`.

        With `counts` a plain container counts by what it holds; and with `read` by nothing else, as
        nobody puts anything into it.
        """
        kind = type(x)
        if kind in SCALARS:
            return Static(x)
        if is_identity(x) or isinstance(x, jax.Array | np.ndarray):
            self.dynamic.append(x)
            return "dynamic"
        if id(x) in self._numbers:
            return "again", self._numbers[id(x)]
        self._numbers[id(x)] = len(self._numbers)
        if kind is types.FunctionType:
            return self._take_function(x)
        if kind is types.MethodType:
            return (
                "method",
                self._take(x.__func__, counts=True),
                self._take(x.__self__, counts=True),
            )
        if kind is functools.partial:
            parts = (x.func, x.args, x.keywords)
            return ("partial", *[self._take(part, counts=True, read=True) for part in parts])
        if kind in (list, tuple, dict) and _holds_dynamic(x):
            leaves, treedef = jax.tree.flatten(x, is_leaf=lambda y: is_identity(y) or _is_opaque(y))
            return ("tree", treedef, *[self._take(leaf, counts=True) for leaf in leaves])
        if kind is tuple or kind is frozenset:
            return (kind, *[self._take(part, counts=counts) for part in x])
        if isinstance(x, list | dict | set) and _is_settings(x):
            held = exact(x, [], NESTED)
            if read:
                return held
            # It stays the same object, since the body may note something in it.
            return (Same(x), held) if counts else Same(x)
        return self._take_object(x)

    def _take_function(self, fn: types.FunctionType) -> Any:
        names = names_of(fn.__code__)
        self.functions.append(fn)
        cells = []
        for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            content = getattr(cell, "cell_contents", _EMPTY)
            if content is _EMPTY:
                cells.append("empty")
            elif type(content) in SCALARS and name in names.stored:
                # A variable that the body sets itself is not what it depends on.
                cells.append("set")
            else:
                counts, read = name not in names.sinks, name in names.read
                cells.append(self._take(content, counts=counts, read=read))
        defaults = (
            self._take(fn.__defaults__, counts=True),
            self._take(fn.__kwdefaults__, counts=True),
        )
        # The globals are those of the code, or looking finds other ones at their address.
        return "function", self._weakly(fn.__code__), id(fn.__globals__), tuple(cells), defaults

    def _take_object(self, x: Any) -> Any:
        if not isinstance(x, types.BuiltinFunctionType) and not is_plain(x):
            self.opaque.append(x)
        return self._weakly(x)

    def _weakly(self, x: Any) -> Any:
        try:
            weak = _Weak(x)
        except TypeError:
            return Same(x)
        self.weak.append(weak)
        return weak

    def build(self, dynamic: list[Any]) -> tuple[Callable[..., Any], ...]:
        """The functions around other arrays and modules."""
        todo = iter(dynamic)
        built: dict[int, Any] = {}
        self._bound = []
        return tuple([self._build(fn, todo, built) for fn in self.fns])

    def _build(self, x: Any, todo: Any, built: dict[int, Any]) -> Any:
        # In the order of `_take`.
        kind = type(x)
        if kind in SCALARS:
            return x
        if is_identity(x) or isinstance(x, jax.Array | np.ndarray):
            return next(todo)
        if id(x) in built:
            return built[id(x)]
        if kind is types.FunctionType:
            return self._build_function(x, todo, built)
        if kind is types.MethodType:
            built[id(x)] = x
            func = self._build(x.__func__, todo, built)
            new: Any = types.MethodType(func, self._build(x.__self__, todo, built))
        elif kind is functools.partial:
            built[id(x)] = x
            func, args, keywords = [
                self._build(part, todo, built) for part in (x.func, x.args, x.keywords)
            ]
            new = functools.partial(func, *args, **keywords)
        elif kind in (list, tuple, dict) and _holds_dynamic(x):
            built[id(x)] = x
            leaves, treedef = jax.tree.flatten(x, is_leaf=lambda y: is_identity(y) or _is_opaque(y))
            parts = [self._build(leaf, todo, built) for leaf in leaves]
            new = jax.tree.unflatten(treedef, parts)
            self._bound.append((f"a {kind.__name__} that it closes over", new, parts))
        elif kind is tuple:
            built[id(x)] = x
            new = tuple([self._build(part, todo, built) for part in x])
        else:
            new = x
        built[id(x)] = new
        return new

    def _build_function(self, fn: Any, todo: Any, built: dict[int, Any]) -> Any:
        cells = tuple(fn.__closure__ or ())
        inner = [types.CellType() for _ in cells]
        new = types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, None, tuple(inner))
        new.__qualname__ = fn.__qualname__
        new.__dict__.update(fn.__dict__)
        built[id(fn)] = new
        kept = []
        names = names_of(fn.__code__)
        for name, cell, own in zip(fn.__code__.co_freevars, cells, inner, strict=True):
            content = getattr(cell, "cell_contents", _EMPTY)
            if content is _EMPTY or (type(content) in SCALARS and name in names.stored):
                kept.append(cell)
                continue
            value = self._build(content, todo, built)
            if value is content:
                kept.append(cell)
            else:
                own.cell_contents = value
                self._bound.append((f"the variable {name!r}", own, value))
                kept.append(own)
        if any(a is not b for a, b in zip(kept, inner, strict=True)):
            # Variables without arguments stay the user's own, so that what the body notes is seen.
            filled = types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, None, tuple(kept))
            filled.__qualname__ = fn.__qualname__
            filled.__dict__.update(fn.__dict__)
            new = built[id(fn)] = filled
        new.__defaults__ = self._build(fn.__defaults__, todo, built)
        new.__kwdefaults__ = self._build(fn.__kwdefaults__, todo, built)
        return new

    def check(self, name: str) -> None:
        """Raise if the body set a variable, or changed a container, that holds arguments."""
        for what, holder, was in self._bound:
            if isinstance(holder, types.CellType):
                same = getattr(holder, "cell_contents", _EMPTY) is was
            else:
                now = jax.tree.leaves(holder, is_leaf=lambda y: is_identity(y) or _is_opaque(y))
                same = len(now) == len(was) and all(a is b for a, b in zip(now, was, strict=True))
            if not same:
                raise OutsideError(
                    f"The body of {name} changed {what}, which is outside of it. That would happen "
                    f"once, while tracing, and not in each step. Carry the value, or keep it in a "
                    f"Ref: total = nnx.Ref(...), then total.value += x in the body."
                )

    def starts(self) -> list[tuple[Any, Any, bool]]:
        """Where looking begins: the code of the functions, and the objects that are not taken apart."""
        bare = [
            types.FunctionType(
                fn.__code__,
                fn.__globals__,
                fn.__name__,
                None,
                tuple(types.CellType(None) for _ in fn.__code__.co_freevars),
            )
            for fn in self.functions
        ]
        return [(i, x, False) for i, x in enumerate([*bare, *self.opaque])]


_EMPTY: Any = object()


def _is_opaque(x: Any) -> bool:
    return isinstance(x, types.MethodType | functools.partial) or opened.hides(x)


def _holds_dynamic(x: Any) -> bool:
    try:
        leaves = jax.tree.leaves(x, is_leaf=lambda y: is_identity(y) or _is_opaque(y))
    except (TypeError, ValueError):
        return False  # a dict whose keys have no order is not a pytree
    return any(
        is_identity(y)
        or _is_opaque(y)
        or isinstance(y, jax.Array | np.ndarray | types.FunctionType)
        for y in leaves
    )


def _is_settings(x: Any) -> bool:
    """Whether a container holds numbers, texts and the like, and containers of them; no arrays."""
    held = data_in(x)
    return held is not None and not any(isinstance(y, ARRAYS) for c in held for y in content(c))


def _lasts(fn: types.FunctionType) -> bool:
    """Whether the globals of a function are those of an imported module."""
    module = sys.modules.get(fn.__globals__.get("__name__", ""))
    return module is not None and vars(module) is fn.__globals__


class _Current(threading.local):
    """The call that a program is run or traced for."""

    parts: _Parts | None = None
    impl: Callable[..., Any] | None = None
    name = ""
    traced = False


_current = _Current()
_lock = threading.RLock()
# A program, or None for functions that cannot be compiled with their variables as arguments.
_programs: OrderedDict[Any, Any] = OrderedDict()


def _forget(_: Any) -> None:
    # An object in a key died. Whoever holds the lock removes dead keys as well.
    if _lock.acquire(blocking=False):
        try:
            for key in [k for k, (_, weak) in _programs.items() if any(w.is_dead for w in weak)]:
                del _programs[key]
        finally:
            _lock.release()


def _run_current(dynamic: list[Any], args: tuple[Any, ...]) -> Any:
    parts, impl, name = _current.parts, _current.impl, _current.name
    assert parts is not None and impl is not None
    _current.traced = True
    try:
        return impl(parts.build(dynamic), args)
    finally:
        # Also where JAX raised, since a tracer in a variable is often why.
        parts.check(name)


def _starts() -> list[tuple[Any, Any, bool]]:
    return _current.parts.starts() if _current.parts is not None else []


def _program(name: str) -> Jit:
    jitted = Jit(_run_current, (None, None), None, (None, None), {})
    jitted._name_and_close_over(name, Closure(_run_current, _starts))
    return jitted


def compiled_once(
    impl: Callable[[tuple[Callable[..., Any], ...], tuple[Any, ...]], Any],
    name: str,
    fns: tuple[Callable[..., Any], ...],
    args: tuple[Any, ...],
    settings: Any,
    plain: Callable[[], Any],
) -> Any:
    """`impl(fns, args)`, outside of compiled code by a program that is kept.

    Args:
      impl: the loop or the branch, for code that is being compiled.
      name: what messages call it.
      fns: the user's functions.
      args: the arguments that may hold Refs.
      settings: what else the program depends on.
      plain: the same in plain Python, where `jax.disable_jit()` asks for that.
    """
    if without_jit() and not any(isinstance(x, Tracer) for x in jax.tree.leaves(args)):
        return plain()
    if in_program():
        return impl(fns, args)
    parts = _Parts(fns)
    key = (impl.__code__, settings, parts.key)
    try:
        with _lock:
            known = _programs.get(key)
            if known is None:
                known = _programs[key] = (_program(name), tuple(parts.weak))
                while len(_programs) > _MOST:
                    _programs.popitem(last=False)
            else:
                _programs.move_to_end(key)
    except TypeError:
        return impl(fns, args)  # a setting without a hash
    program = known[0]
    if program is None:
        return impl(fns, args)
    outer = dict(_current.__dict__)
    _current.parts, _current.impl, _current.name, _current.traced = parts, impl, name, False
    try:
        return program(parts.dynamic, args)
    except Exception as error:
        if not _current.traced or isinstance(error, OutsideError):
            raise
    finally:
        _current.__dict__.clear()
        _current.__dict__.update(outer)
        program._forget(only_roots=all(map(_lasts, parts.functions)))
    # The body needs a value while it is traced, or reads what looking cannot find, or is wrong. Its
    # variables as they are decide which, and give the error that speaks of them.
    out = impl(fns, args)
    with _lock:
        _programs[key] = (None, tuple(parts.weak))
    return out
