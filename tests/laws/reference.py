"""The meaning of the transformations, in plain Python."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

# Every live Ref. Each lane of a `vmap` and each pass of `grad` must find them as they were.
alive: weakref.WeakSet[Ref] = weakref.WeakSet()


class Differs(Exception):
    """The lanes of a `vmap` wrote different values to a Ref that all share, which has no meaning."""


class Ref:
    """A mutable cell."""

    def __init__(self, value: Any, collection: Any = None):
        self.value = value
        self.collection = collection
        alive.add(self)


class Module:
    """An object with attributes."""


class Field:
    """An attribute whose value is in a Ref."""

    def __init__(self, collection: Any):
        self.collection = collection

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, obj: Any, owner: Any = None) -> Any:
        if obj is None:
            return self
        if self.name not in vars(obj):
            raise AttributeError(self.name)
        cell = vars(obj)[self.name]
        return None if cell is None else cell.value

    def __set__(self, obj: Any, value: Any) -> None:
        cell = vars(obj).get(self.name)
        if value is None or isinstance(value, Ref):
            vars(obj)[self.name] = value
        elif cell is None:
            vars(obj)[self.name] = Ref(value, self.collection)
        else:
            cell.value = value

    def __delete__(self, obj: Any) -> None:
        del vars(obj)[self.name]


class Dual:
    """A number and its derivative."""

    __array_ufunc__ = None

    def __init__(self, value: Any, slope: Any):
        self.value = value
        self.slope = slope

    def __add__(self, other: Any) -> Dual:
        return Dual(self.value + primal(other), self.slope + slope(other))

    def __sub__(self, other: Any) -> Dual:
        return Dual(self.value - primal(other), self.slope - slope(other))

    def __rsub__(self, other: Any) -> Dual:
        return Dual(primal(other) - self.value, slope(other) - self.slope)

    def __mul__(self, other: Any) -> Dual:
        a, b = primal(other), slope(other)
        return Dual(self.value * a, self.slope * a + self.value * b)

    def __neg__(self) -> Dual:
        return Dual(-self.value, -self.slope)

    def __lt__(self, other: Any) -> bool:
        return self.value < primal(other)

    def __gt__(self, other: Any) -> bool:
        return self.value > primal(other)

    __radd__ = __add__
    __rmul__ = __mul__


def primal(x: Any) -> Any:
    """A number without its derivative."""
    return x.value if isinstance(x, Dual) else x


def slope(x: Any) -> Any:
    """The derivative of a number."""
    return x.slope if isinstance(x, Dual) else 0.0


def cond(pred: Any, f: Callable[..., Any], g: Callable[..., Any], *operands: Any) -> Any:
    """An `if`."""
    return f(*operands) if pred else g(*operands)


def switch(index: Any, branches: Any, *operands: Any) -> Any:
    """One of several."""
    return branches[min(max(int(index), 0), len(branches) - 1)](*operands)


def while_loop(condition: Callable[..., Any], body: Callable[..., Any], init: Any) -> Any:
    """A `while`."""
    while condition(init):
        init = body(init)
    return init


def scan(lib: Any, f: Callable[..., Any], carry: Any, xs: Any, length: int | None) -> Any:
    """A `for` over slices. A Ref in `xs` holds its slice during a step, and the stack of them afterwards."""
    sliced = {ref: ref.value for ref in lib.refs(xs)}
    size = length if xs is None else len(next(iter([*sliced.values(), *_arrays(xs)])))
    assert size is not None
    new: dict[Ref, list[Any]] = {ref: [] for ref in sliced}
    ys = []
    for i in range(size):
        for ref, whole in sliced.items():
            ref.value = whole[i]
        carry, y = f(carry, _slice(xs, i))
        ys.append(y)
        for ref, values in new.items():
            values.append(ref.value)
    for ref, values in new.items():
        ref.value = np.stack(values)
    return carry, _stack(ys)


def vmap(lib: Any, f: Callable[..., Any], in_axes: Any, *args: Any) -> Any:
    """Run each lane separately. A Ref that is not mapped is the same in every lane, before and after."""
    axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
    mapped = [arg for arg, axis in zip(args, axes, strict=True) if axis == 0]
    sliced = {ref: ref.value for arg in mapped for ref in lib.refs(arg)}
    shared = {ref: ref.value for ref in alive if ref not in sliced}
    size = len(next(iter([*sliced.values(), *_arrays(mapped)])))
    new: dict[Ref, list[Any]] = {ref: [] for ref in (*sliced, *shared)}
    outs = []
    for i in range(size):
        for ref, whole in sliced.items():
            ref.value = whole[i]
        for ref, value in shared.items():
            ref.value = value
        lane = (_slice(a, i) if axis == 0 else a for a, axis in zip(args, axes, strict=True))
        outs.append(f(*lane))
        for ref, values in new.items():
            values.append(ref.value)
    for ref, values in new.items():
        if ref in sliced:
            ref.value = np.stack(values)
        elif any(np.any(primal(v) != primal(values[0])) for v in values):
            raise Differs
    return _stack(outs)


def grad(lib: Any, f: Callable[..., Any], *args: Any) -> Any:
    """The derivative, one target at a time; the writes of `f` stay."""
    before = {ref: ref.value for ref in alive}

    def run(*args: Any) -> float:
        out = f(*args)
        for ref, value in before.items():
            ref.value = value
        return np.float64(slope(out))

    if lib.is_array(args[0]) or isinstance(args[0], float):
        result: Any = run(Dual(args[0], 1.0), *args[1:])
    else:
        result = {}
        for path, ref in _params(args[0]).items():
            ref.value = Dual(ref.value, 1.0)
            result[path] = run(*args)
    f(*args)
    return result


def clone(x: Any, memo: dict[int, Any] | None = None) -> Any:
    """The same tree, made of new objects."""
    memo = {} if memo is None else memo
    if id(x) in memo:
        return memo[id(x)]
    if isinstance(x, Ref):
        memo[id(x)] = Ref(x.value, x.collection)
    elif isinstance(x, Module):
        memo[id(x)] = new = object.__new__(type(x))
        for name, value in vars(x).items():
            vars(new)[name] = clone(value, memo)
    elif type(x) is list:
        memo[id(x)] = new = []
        new += [clone(v, memo) for v in x]
    elif type(x) is dict:
        memo[id(x)] = new = {}
        new |= {k: clone(v, memo) for k, v in x.items()}
    elif type(x) is tuple:
        return tuple(clone(v, memo) for v in x)
    else:
        return x
    return memo[id(x)]


def _params(root: Any) -> dict[str, Ref]:
    """Refs of the collection "params" by canonical path: the first in the order of the attributes."""
    found: dict[str, Ref] = {}
    seen: set[int] = set()
    todo: list[tuple[Any, tuple[str, ...]]] = [(root, ())]
    while todo:
        x, path = todo.pop()
        if isinstance(x, (Ref, Module)) or type(x) in (list, dict):
            if id(x) in seen:
                continue
            seen.add(id(x))
        if isinstance(x, Ref) and x.collection == "params":
            found[".".join(path)] = x
        if isinstance(x, Module):
            items: Any = vars(x).items()
        elif type(x) is dict:
            items = x.items()
        else:
            items = enumerate(x) if type(x) in (list, tuple) else ()
        todo += [(part, (*path, str(name))) for name, part in reversed(list(items))]
    return found


def _arrays(x: Any) -> list[Any]:
    if type(x) in (tuple, list):
        return [a for part in x for a in _arrays(part)]
    return [x] if isinstance(x, np.ndarray) else []


def _slice(x: Any, i: int) -> Any:
    if type(x) in (tuple, list):
        return type(x)(_slice(part, i) for part in x)
    return x[i] if isinstance(x, np.ndarray) else x


def _stack(ys: list[Any]) -> Any:
    first = ys[0]
    if type(first) is tuple:
        return tuple(_stack(list(parts)) for parts in zip(*ys, strict=True))
    return None if first is None else np.stack(ys)
