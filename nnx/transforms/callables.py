"""The functions, modules and bound methods that transformations take."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from nnx._layer_names import LayerCall
from refx import Node

__all__: list[str] = []


def unbound(fn: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Take the module out of a module or a bound method: the function, and its bound arguments.

    Raises:
      TypeError: `fn` cannot be called.
    """
    if not callable(fn):
        node = isinstance(fn, Node)
        what = f"a {type(fn).__name__}, which has no __call__" if node else f"{fn!r:.60}"
        raise TypeError(
            f"An nnx transformation takes a function, a module or a method, but got {what}."
        )
    if isinstance(fn, types.MethodType) and isinstance(fn.__self__, Node):
        return fn.__func__, (fn.__self__,)
    if isinstance(fn, Node):
        call = inspect.getattr_static(type(fn), "__call__")
        # Its operations carry the name of the layer, under any transformation.
        return call.scoped if type(call) is LayerCall else type(fn).__call__, (fn,)  # pyright: ignore
    return fn, ()


def function_name(fn: Callable[..., Any]) -> str:
    """The name of a function in messages. For a module or another callable object, it is the class."""
    if isinstance(fn, functools.partial):
        return f"functools.partial({function_name(fn.func)})"
    names = (getattr(fn, "__qualname__", None), getattr(fn, "__name__", None))
    return next((name for name in names if isinstance(name, str)), type(fn).__qualname__)


def check_plain(fn: Any, name: str) -> None:
    """Refuse a function whose call runs nothing, but only makes a coroutine or a generator."""
    fn = inspect.unwrap(fn) if inspect.isfunction(fn) else fn
    if inspect.iscoroutinefunction(fn) or inspect.isasyncgenfunction(fn):
        raise TypeError(
            f"nnx.jit takes a plain function, but {name} is async: calling it runs nothing yet, so "
            f"there is nothing to compile. Jit the part that computes, and await outside of it."
        )
    if inspect.isgeneratorfunction(fn):
        raise TypeError(
            f"nnx.jit takes a plain function, but {name} is a generator function (it has a yield): "
            f"calling it runs nothing yet, so there is nothing to compile. Return a list or a "
            f"tuple, or use nnx.scan."
        )
