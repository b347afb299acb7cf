"""Loops and branches outside of compiled code: one program for each function, kept for the next call.

`jax.lax` recognizes a loop by its body function. But the body is often a new lambda of the same code,
and closes over modules whose values change. So we take a function apart, like a module. Its code and its
settings are the key of a program; the arrays and modules in its variables are arguments. A search finds
the rest (globals, attributes of objects), as for `nnx.jit`.
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
from nnx.transforms.objects import ARRAYS, SCALARS, content, data_in, is_container, is_plain
from refx import StructureError, opened
from refx.node import is_identity
from refx.static import NESTED, Same, Static, exact
from refx.trace import in_program, without_jit

__all__: list[str] = []


class OutsideError(StructureError):
    """The body of a loop or a branch changed a variable or a container outside of it."""


# How many programs are kept. Each holds its compiled code.
_MOST = 256


class _Weak:
    """An object as part of a key, without keeping it alive."""

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


class _Building:
    """One rebuild of functions around other arguments, `dynamic`.

    `built` has the rebuilt parts, by number. `bound` has the variables and containers into which we put
    arguments, with a name and their value.
    """

    def __init__(self, dynamic: list[Any]):
        self.dynamic = dynamic
        self.built: dict[int, Any] = {}
        self.bound: list[tuple[str, Any, Any]] = []


# A function that rebuilds a part; None if the part stays as it is.
_Make = Callable[[_Building], Any] | None


class _Parts:
    """Functions taken apart: `key` identifies them, and `dynamic` has the arguments inside them.

    Invariants: functions with equal keys compute alike on the same `dynamic`, if the search from
    `starts` finds the same objects. `build` returns the original functions, except for the objects in
    `dynamic`.
    """

    def __init__(self, fns: tuple[Callable[..., Any], ...]):
        self.dynamic: list[Any] = []
        self.opaque: list[Any] = []
        self.weak: list[_Weak] = []
        self.functions: list[types.FunctionType] = []
        self._numbers: dict[int, int] = {}
        # The names that the functions seen so far set themselves.
        self._stored: set[str] = set()
        # The numbers of the parts that need no rebuild.
        self._constant: set[int] = set()
        self._bound: list[tuple[str, Any, Any]] = []
        self.fns = fns
        self.key, self._makers = self._take_all(fns)

    def _take_all(self, parts: Any, **how: bool) -> tuple[tuple[Any, ...], list[_Make]]:
        taken = [self._take(part, **how) for part in parts]
        return tuple([key for key, _ in taken]), [make for _, make in taken]

    def _take(self, x: Any, *, counts: bool = True, read: bool = False) -> tuple[Any, _Make]:
        """The key of `x`, and a function that rebuilds it.

        With `counts`, the content of a plain container is part of the key. With `read`, only its content
        is, and not its identity, because no code puts anything into it.
        """
        if type(x) in SCALARS:
            return Static(x), None
        if is_identity(x) or isinstance(x, jax.Array | np.ndarray):
            n = len(self.dynamic)
            self.dynamic.append(x)
            return "dynamic", lambda building: building.dynamic[n]
        number = self._numbers.get(id(x))
        if number is not None:
            make = None if number in self._constant else lambda b: b.built.get(number, x)
            return ("again", number), make
        number = self._numbers[id(x)] = len(self._numbers)
        key, make = self._take_new(x, number, counts, read)
        if make is None:
            self._constant.add(number)
            return key, None

        def noted(building: _Building) -> Any:
            building.built[number] = new = make(building)
            return new

        return key, noted

    def _take_new(self, x: Any, number: int, counts: bool, read: bool) -> tuple[Any, _Make]:
        kind = type(x)
        if kind is types.FunctionType:
            return self._take_function(x, number)
        if kind is types.MethodType:
            parts, combine, how = (x.__func__, x.__self__), types.MethodType, {}
        elif kind is functools.partial:
            parts, how = (x.func, x.args, x.keywords), {"read": True}
            combine = lambda fn, args, kwargs: functools.partial(fn, *args, **kwargs)  # noqa: E731
        elif kind in (list, tuple, dict) and _holds_dynamic(x):
            leaves, treedef = jax.tree.flatten(x, is_leaf=_is_part)
            keys, makers = self._take_all(leaves)

            def tree(building: _Building) -> Any:
                parts = _made(leaves, makers, building)
                new = jax.tree.unflatten(treedef, parts)
                building.bound.append((f"a {kind.__name__} that it closes over", new, parts))
                return new

            return ("tree", treedef, *keys), tree
        elif kind is tuple or kind is frozenset:
            parts, combine, how = tuple(x), lambda *items: kind(items), {"counts": counts}
        elif is_container(x) and _is_settings(x):
            held = exact(x, [], NESTED)
            if read:
                return held, None
            # It stays the same object, because the body may put something into it.
            return (Same(x), held) if counts else Same(x), None
        else:
            if not isinstance(x, types.BuiltinFunctionType) and not is_plain(x):
                self.opaque.append(x)
            return self._weakly(x), None
        keys, makers = self._take_all(parts, **how)
        make = None if not any(makers) else lambda b: combine(*_made(parts, makers, b))
        return (kind.__name__, *keys), make

    def _take_function(self, fn: types.FunctionType, number: int) -> tuple[Any, _Make]:
        names = names_of(fn.__code__)
        self.functions.append(fn)
        keys: list[Any] = []
        cells: list[tuple[str, Any, _Make]] = []
        for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            content, make = getattr(cell, "cell_contents", _EMPTY), None
            if content is _EMPTY or (type(content) in SCALARS and name in names.stored):
                # The body does not depend on a variable that it sets itself.
                keys.append("empty" if content is _EMPTY else "set")
            else:
                counts, read = name not in names.sinks, name in names.read
                key, make = self._take(content, counts=counts, read=read)
                keys.append(key)
            cells.append((name, cell, make))
        self._stored |= names.stored
        attributes = [
            (name, x)
            for name, x in vars(fn).items()
            # Names such as `__wrapped__` and `__signature__` are for tools, not for the code.
            if name[:2] != "__" and (type(x) not in SCALARS or name not in self._stored)
        ]
        others = fn.__defaults__, fn.__kwdefaults__, *[x for _, x in attributes]
        other_keys, makers = self._take_all(others)

        def again(building: _Building) -> Any:
            # Keep the user's own cell if it holds no arguments, so that writes of the body take effect.
            inner = tuple([types.CellType() if make else cell for _, cell, make in cells])
            new = building.built[number] = _function(fn, inner)
            for own, (name, _, make) in zip(inner, cells, strict=True):
                if make is not None:
                    own.cell_contents = make(building)
                    building.bound.append((f"the variable {name!r}", own, own.cell_contents))
            new.__qualname__ = fn.__qualname__
            new.__defaults__, new.__kwdefaults__, *values = _made(others, makers, building)
            if any(makers[2:]):
                new.__dict__.update(fn.__dict__)
                new.__dict__.update(zip([name for name, _ in attributes], values, strict=True))
            else:
                new.__dict__ = fn.__dict__
            return new

        constant = not any(makers) and not any([make for *_, make in cells])
        # The id of the globals is enough: the search detects other globals at the same address.
        code = self._weakly(fn.__code__), id(fn.__globals__)
        key = "function", *code, tuple(keys), tuple([name for name, _ in attributes]), other_keys
        return key, None if constant else again

    def _weakly(self, x: Any) -> Any:
        try:
            weak = _Weak(x)
        except TypeError:
            return Same(x)
        self.weak.append(weak)
        return weak

    def build(self, dynamic: list[Any]) -> tuple[Callable[..., Any], ...]:
        """Rebuild the functions around other arrays and modules."""
        building = _Building(dynamic)
        self._bound = building.bound
        return tuple(_made(self.fns, self._makers, building))

    def check(self, name: str) -> None:
        """Raise if the body set a variable, or changed a container, that holds arguments."""
        for what, holder, was in self._bound:
            if isinstance(holder, types.CellType):
                same = getattr(holder, "cell_contents", _EMPTY) is was
            else:
                now = jax.tree.leaves(holder, is_leaf=_is_part)
                same = len(now) == len(was) and all(a is b for a, b in zip(now, was, strict=True))
            if not same:
                raise OutsideError(
                    f"The body of {name} changed {what}, which is outside of it. That would happen "
                    f"once, while tracing, and not in each step. Carry the value, or keep it in a "
                    f"Ref: total = nnx.Ref(...), and in the body, total.value += x."
                )

    def starts(self) -> list[tuple[Any, Any, bool]]:
        """The starts of the search: the code of the functions, and the objects that stayed whole."""
        bare = [
            _function(fn, tuple([types.CellType(None) for _ in fn.__code__.co_freevars]))
            for fn in self.functions
        ]
        return [(i, x, False) for i, x in enumerate([*bare, *self.opaque])]


_EMPTY: Any = object()


def _made(parts: Any, makers: list[_Make], building: _Building) -> list[Any]:
    """The parts, rebuilt where necessary."""
    return [x if make is None else make(building) for x, make in zip(parts, makers, strict=True)]


def _function(fn: types.FunctionType, cells: tuple[Any, ...]) -> types.FunctionType:
    return types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, None, cells)


def _is_opaque(x: Any) -> bool:
    return isinstance(x, types.MethodType | functools.partial) or opened.hides(x)


def _is_part(x: Any) -> bool:
    return is_identity(x) or _is_opaque(x)


def _holds_dynamic(x: Any) -> bool:
    try:
        leaves = jax.tree.leaves(x, is_leaf=_is_part)
    except (TypeError, ValueError):
        return False  # a dict whose keys have no order is not a pytree
    return any(
        _is_part(y) or isinstance(y, jax.Array | np.ndarray | types.FunctionType) for y in leaves
    )


def _is_settings(x: Any) -> bool:
    """Whether a container holds only numbers, strings and the like, or containers of these; no arrays."""
    held = data_in(x)
    return held is not None and not any(isinstance(y, ARRAYS) for c in held for y in content(c))


def _lasts(fn: types.FunctionType) -> bool:
    """Whether the globals of a function are those of an imported module."""
    module = sys.modules.get(fn.__globals__.get("__name__", ""))
    return module is not None and vars(module) is fn.__globals__


class _Current(threading.local):
    """The call for which a program is run or traced."""

    parts: _Parts | None = None
    impl: Callable[..., Any] | None = None
    name = ""
    traced = False


_current = _Current()
_lock = threading.RLock()
# By key, a program; or None if the functions cannot be compiled with their variables as arguments.
_programs: OrderedDict[Any, Any] = OrderedDict()


def _forget(_: Any) -> None:
    # An object in a key died. If the lock is taken, leave the dead keys for the next time.
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
        # Check even if JAX raised, since a tracer in a variable is often the reason.
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
    """Call `impl(fns, args)`. Outside of compiled code, use a program that is kept.

    Args:
      impl: the loop or the branch, for use inside compiled code.
      name: its name in messages.
      fns: the user's functions.
      args: the arguments, which may hold Refs.
      settings: everything else on which the program depends.
      plain: the same in plain Python, for `jax.disable_jit()`.
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
    # The body needs a concrete value, or reads an object that the search cannot find, or has an error. Run
    # it with its original variables to find out, so that an error refers to them.
    out = impl(fns, args)
    with _lock:
        _programs[key] = (None, tuple(parts.weak))
    return out
