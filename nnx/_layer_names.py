"""Gives operations of a compiled program the path of their layer, so that a profile reads like the model.

A module that is called while JAX traces enters a `jax.named_scope`. The scope's name is the path
from the calling module: `blocks.0`, and inside it `attention`. A layer with two paths gets the path
that the call took. The outermost module adds no name. Outside a trace, `__call__` is the user's own
function and costs nothing extra.
"""

from __future__ import annotations

import collections
import functools
import inspect
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from refx import Node
from refx.frame import local
from refx.node import attributes
from refx.trace import EVAL

__all__: list[str] = []

# Weak references to the same object are the same object. Outside all traces, `trace_ref` returns this
# one.
_EAGER = weakref.ref(EVAL)


def layer_call(fn: Any) -> Any:
    """The object that a module class stores for a function that is its `__call__`."""
    if type(fn) is types.FunctionType and not hasattr(fn, "__isabstractmethod__"):
        return LayerCall(fn)
    return fn


class LayerCall:
    """The `__call__` of a module class: it runs the user's function, in a named scope while JAX traces.

    Class decorators (beartype, typeguard) look through the class dict for functions, so this object
    imitates the function that it wraps.
    """

    __slots__ = ("__dict__", "fn", "scoped")

    def __init__(self, fn: types.FunctionType):
        # Attributes that the class would supply. `__getattr__` asks the function for the others.
        vars(self).update(__module__=fn.__module__, __doc__=fn.__doc__)
        self.fn = fn
        self.scoped = _scoped(fn)

    @property
    def __class__(self) -> type:  # pyright: ignore
        return types.FunctionType

    def __getattr__(self, name: str) -> Any:
        if name == "fn":  # in a copy without attributes yet
            raise AttributeError(name)
        return getattr(self.fn, name)

    def __get__(
        self,
        module: Any,
        owner: Any = None,
        local: Any = local,
        eager: Any = _EAGER,
        method: Any = types.MethodType,
    ) -> Any:
        if module is None:
            return self.fn
        if local.frame is None and module._trace is eager:
            return method(self.fn, module)
        return method(self.scoped, module)

    def __call__(self, module: Any, /, *args: Any, **kwargs: Any) -> Any:
        return self.__get__(module)(*args, **kwargs)

    def __reduce__(self) -> Any:
        return LayerCall, (self.fn,)


def method_of(cls: type, name: str) -> Any:
    """The method of a class, as the user wrote it."""
    found = inspect.getattr_static(cls, name, None)
    return found.fn if type(found) is LayerCall else found


def _scoped(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def call(module: Any, /, *args: Any, **kwargs: Any) -> Any:
        around = _here.names
        if around is not None and around.holder is module:
            # A call such as `super().__call__`.
            return fn(module, *args, **kwargs)
        name = _name(module, around)
        _here.names = Names(module)
        try:
            if name is None:
                return fn(module, *args, **kwargs)
            with jax.named_scope(name):
                return fn(module, *args, **kwargs)
        finally:
            _here.names = around

    return call


class Names:
    """The names of the modules below one or more modules. Each is looked up on demand."""

    def __init__(self, holder: Any):
        self._found: dict[int, str] = {}
        self._further = _nearest_first(holder)
        self.holder = holder

    def name(self, module: Any) -> str | None:
        """The path from here to a module, or None."""
        if id(module) not in self._found:
            for name, x in self._further:
                self._found.setdefault(id(x), name)
                if x is module:
                    break
        return self._found.get(id(module))


class RootNames(Names):
    """The names below the objects that a body received. `inner` is in the order of `outer`, the originals."""

    def __init__(self, inner: Iterable[Any], outer: Iterable[Any]):
        inner, outer = tuple(inner), tuple(outer)
        super().__init__((*inner, *outer))
        self._outer = {id(i): o for i, o in zip(inner, outer, strict=True)}

    def outer(self, root: Any) -> Any:
        """The object outside the body that a root stands for."""
        return self._outer.get(id(root), root)


class _Here(threading.local):
    # The names below the module that is being called, while JAX traces.
    names: Names | None = None


_here = _Here()


def _name(module: Any, around: Names | None) -> str | None:
    frame = local.frame
    while True:
        if around is not None and (name := around.name(module)) is not None:
            return name
        if frame is None:
            return None
        if frame.roots is not None and (name := frame.roots.name(module)) is not None:
            if name:
                return name
            module = frame.roots.outer(module)
        frame = frame.parent


def _nearest_first(holder: Any) -> Iterator[tuple[str, Any]]:
    """All modules below a module, or a tuple of roots, with their paths from there."""
    todo = collections.deque(_below(holder))
    seen: set[int] = set()
    while todo:
        name, x = todo.popleft()
        yield name, x
        if id(x) not in seen:
            seen.add(id(x))
            todo += [(f"{name}.{below}".lstrip("."), y) for below, y in _below(x)]


def _below(holder: Any) -> Iterator[tuple[str, Any]]:
    """The modules in a module's attributes, also in lists and dicts there; or in a tuple of roots."""
    items = attributes(holder).items() if isinstance(holder, Node) else (("", x) for x in holder)
    for name, x in items:
        yield from _inside(name, x)


def _inside(name: str, x: Any, around: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    # Go one level at a time: JAX cannot sort dict keys of several types, and a list may hold
    # itself.
    if isinstance(x, Node):
        yield name.lstrip("."), x
    elif isinstance(x, dict | list | tuple | types.MethodType) and id(x) not in around:
        around = (*around, id(x))
        if isinstance(x, types.MethodType):
            parts: Iterable[tuple[Any, Any]] = [("__self__", x.__self__)]
        else:
            parts = x.items() if isinstance(x, dict) else enumerate(x)
        for key, part in parts:
            yield from _inside(f"{name}.{key}", part, around)
