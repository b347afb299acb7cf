"""The names that a program uses, twice: with nnx behind them, and with plain Python.

A program is the same text for both. `Python` says what it means: a Ref is an object with a `value`, `jit` is nothing, `cond` is
an `if`, a loop is a `for`, `vmap` calls the function once for each lane, and `grad` computes with dual numbers. It shares no
code with what it judges.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np

import nnx
from tests.laws import reference
from tests.laws.things import NAMES, SETTINGS, Boom, define

MISSING = object()


def _own(cls: type) -> dict[str, Any]:
    """The attributes of a class that belong to the program, and not to the library."""
    return {k: v for k, v in vars(cls).items() if not k.startswith("_") or k == "__call__"}


class Library:
    """The part that both libraries share: functions over modules in ordinary Python."""

    def __init__(self, name: str):
        self.name = name
        # Programs compute exactly with whole numbers, or with small real numbers if they differentiate.
        self.real = False
        self.classes = define(self)
        self._pristine = {cls: _own(cls) for cls in self.classes.values()}

    Ref: Any
    Module: Any

    def restore(self) -> None:
        """Undo what a program did to the classes."""
        for cls, was in self._pristine.items():
            for name in _own(cls).keys() - was.keys():
                delattr(cls, name)
            for name, value in was.items():
                if vars(cls).get(name) is not value:
                    setattr(cls, name, value)

    def changes(self) -> dict[str, Any]:
        """The attributes of classes that a program has set, with None for those that it deleted."""
        found = {}
        for cls, was in self._pristine.items():
            now = _own(cls)
            for name in sorted({*now, *was}):
                if now.get(name) is not was.get(name):
                    found[f"{cls.__name__}.{name}"] = now.get(name)
        return found

    def mix(self, a: Any, b: Any) -> Any:
        """A number of two numbers, in a fixed range, which depends on their order."""
        if self.real:
            return 0.5 * a + 0.125 * b * b + 0.25
        return (3 * a + b + 1) % 97

    def number(self, x: Any) -> Any:
        """A value as a scalar, whatever its shape."""
        return x.sum() if getattr(x, "shape", ()) else x

    def attributes(self, module: Any) -> list[tuple[str, Any]]:
        """The attributes of a module or a Box by name, with the Refs of its fields."""
        found = [(name, self.cell(module, name)) for name in NAMES]
        return [(name, value) for name, value in found if value is not MISSING]

    def parts(self, x: Any) -> list[tuple[Any, Any]] | None:
        """The items of a container, a module or a Box; None for anything else."""
        if isinstance(x, self.Module) or type(x).__name__.endswith("Box"):
            return self.attributes(x)
        if type(x) is dict:
            return list(x.items())
        if type(x) in (list, tuple):
            return list(enumerate(x))
        return None

    def total(self, x: Any) -> Any:
        """One number that depends on everything in a tree: values, sharing, structure, settings."""
        seen: dict[int, int] = {}

        def visit(x: Any) -> Any:
            parts = self.parts(x)
            # The identity of a tuple means nothing: Python may or may not merge two equal ones.
            if (parts is not None and type(x) is not tuple) or isinstance(x, self.Ref):
                if id(x) in seen:
                    return self.scaled(seen[id(x)])
                seen[id(x)] = len(seen) + 1
            if isinstance(x, self.Ref):
                return self.number(x.value)
            if parts is not None:
                acc = self.scaled(len(parts))
                for name, part in parts:
                    acc = self.mix(acc, visit(part) + self.scaled(SETTINGS["tag"](name)))
                return acc
            return self.number(x) if self.is_array(x) else self.scaled(SETTINGS["tag"](x))

        return visit(x)

    def scaled(self, n: int) -> Any:
        """A whole number in the form that programs compute with."""
        return n / 100 if self.real else n

    def bump(self, x: Any) -> None:
        """Write every Ref that can be reached from `x`, each once."""
        for i, ref in enumerate(self.refs(x)):
            ref.value = self.mix(ref.value, self.scaled(i + 1))

    def refs(self, x: Any) -> list[Any]:
        """Every Ref that can be reached from `x`, each once, in the order in which `total` meets them."""
        seen: set[int] = set()
        found: list[Any] = []
        todo = [x]
        while todo:
            x = todo.pop()
            if id(x) in seen:
                continue
            seen.add(id(x))
            if isinstance(x, self.Ref):
                found.append(x)
            else:
                todo += [part for _, part in reversed(self.parts(x) or [])]
        return found

    def namespace(self) -> dict[str, Any]:
        """The names for one run of a program."""
        names = ["Ref", "mix", "total", "bump", "array", "cell", "clone", "as_dict", "where"]
        names += ["jit", "remat", "checkify", "cond", "switch", "scan", "fori_loop", "while_loop"]
        names += ["map_", "vmap", "grad", "number", "fail"]
        own = {name: getattr(self, name) for name in names}
        return {
            "__name__": "program",
            "__builtins__": __builtins__,
            "partial": functools.partial,
            **SETTINGS,
            **self.classes,
            **own,
        }


def _boom() -> None:
    raise Boom


# JAX logs the error of a callback in addition to raising it.
logging.getLogger("jax._src.callback").setLevel(logging.CRITICAL)


class Nnx(Library):
    """The library under test."""

    Ref = nnx.Ref
    Module = nnx.Module
    param = staticmethod(nnx.param)
    ref = staticmethod(nnx.ref)
    clone = staticmethod(nnx.clone)
    where = staticmethod(jnp.where)
    jit = staticmethod(nnx.jit)
    remat = staticmethod(nnx.remat)
    cond = staticmethod(nnx.cond)
    switch = staticmethod(nnx.switch)
    scan = staticmethod(nnx.scan)
    fori_loop = staticmethod(nnx.fori_loop)
    while_loop = staticmethod(nnx.while_loop)
    map_ = staticmethod(nnx.map)
    vmap = staticmethod(nnx.vmap)
    grad = staticmethod(nnx.grad)

    def fail(self) -> None:
        """Raise when the program runs, but not when it is traced."""
        jax.experimental.io_callback(_boom, None, ordered=True)

    def array(self, x: Any) -> Any:
        return jnp.asarray(np.asarray(x, np.float32 if self.real else np.int32))

    def is_array(self, x: Any) -> bool:
        return isinstance(x, (jax.Array, np.ndarray))

    def cell(self, module: Any, name: str) -> Any:
        if isinstance(getattr(type(module), name, None), nnx.RefField):
            value = getattr(module, name, MISSING)
            return value if value is None or value is MISSING else nnx.get_ref(module, name)
        return getattr(module, name, MISSING)

    def checkify(self, f: Any) -> Any:
        return lambda *args, **kwargs: nnx.checkify(f)(*args, **kwargs)[1]

    def as_dict(self, partition: Any) -> Any:
        if not isinstance(partition, nnx.Partition):
            return partition
        return {k if isinstance(k, str) else ".".join(k): v for k, v in partition.items()}


class Stop(Exception):
    """A program was told to end at a call of a transformation."""


class Python(Library):
    """The meaning of a program.

    `turn` (1 to 7) chooses other branches than the program does, and `stop` ends it at one of the outermost
    calls of transformations. Both help to find the cause of an error.
    """

    turn = 0
    stop: int | None = None

    Ref = reference.Ref
    Module = reference.Module
    clone = staticmethod(reference.clone)
    jit = staticmethod(lambda f, **_: f)
    remat = staticmethod(lambda f: f)
    checkify = staticmethod(lambda f: f)
    while_loop = staticmethod(reference.while_loop)
    as_dict = staticmethod(lambda x: x)

    param = staticmethod(lambda: reference.Field("params"))
    ref = staticmethod(reference.Field)

    def namespace(self) -> dict[str, Any]:
        """The names; with `stop`, each transformation counts its calls."""
        names = super().namespace()
        if self.stop is None:
            return names
        self._calls = self._depth = 0
        for name in ("cond", "switch", "scan", "fori_loop", "while_loop", "map_"):
            names[name] = self._counted(names[name])
        for name in ("jit", "remat", "checkify", "vmap", "grad"):
            names[name] = self._counting(names[name])
        return names

    def _counting(self, transformation: Any) -> Any:
        return lambda *args, **kwargs: self._counted(transformation(*args, **kwargs))

    def _counted(self, fn: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._depth:
                self._calls += 1
                if self._calls > (self.stop or 0):
                    raise Stop
            self._depth += 1
            try:
                return fn(*args, **kwargs)
            finally:
                self._depth -= 1

        return call

    def cond(self, pred: Any, f: Any, g: Any, *operands: Any) -> Any:
        return reference.cond(bool(pred) != (self.turn >= 4), f, g, *operands)

    def switch(self, index: Any, branches: Any, *operands: Any) -> Any:
        index = min(max(int(index), 0), len(branches) - 1)
        return reference.switch((index + self.turn % 4) % len(branches), branches, *operands)

    def fail(self) -> None:
        raise Boom

    def array(self, x: Any) -> Any:
        kind = np.float64 if self.real else np.int64
        return np.asarray(x, kind) if isinstance(x, list) else kind(x)

    def is_array(self, x: Any) -> bool:
        return isinstance(x, (np.ndarray, reference.Dual, np.int64, np.float64))

    def where(self, c: Any, a: Any, b: Any) -> Any:
        return a if c else b

    def cell(self, module: Any, name: str) -> Any:
        if isinstance(getattr(type(module), name, None), reference.Field):
            return vars(module).get(name, MISSING)
        return getattr(module, name, MISSING)

    def scan(self, f: Any, init: Any = None, xs: Any = None, length: int | None = None) -> Any:
        return reference.scan(self, f, init, xs, length)

    def fori_loop(self, lower: Any, upper: Any, body: Any, init: Any) -> Any:
        for i in range(int(lower), int(upper)):
            init = body(self.array(i), init)
        return init

    def map_(self, f: Any, xs: Any) -> Any:
        return reference.scan(self, lambda _, x: (None, f(x)), None, xs, None)[1]

    def vmap(self, f: Any, in_axes: Any = 0) -> Any:
        return functools.partial(reference.vmap, self, f, in_axes)

    def grad(self, f: Any) -> Any:
        return functools.partial(reference.grad, self, f)
