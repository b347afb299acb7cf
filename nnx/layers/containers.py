"""Modules made of modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from nnx.module import Module

__all__ = ["Sequential"]


class Sequential(Module):
    """Calls functions and modules one after the other, each with what the one before returned.

    A tuple that one returns is taken as the positional arguments of the next, a dict as its
    keyword arguments.

    Args:
      *fns: callables: modules, activations, or any other function. They are in the plain list
        `layers`, which may be changed.

    >>> import jax, jax.numpy as jnp, nnx
    >>> with nnx.scope(jax.random.key(0)):
    ...     mlp = nnx.Sequential(nnx.Linear(2, 8), nnx.relu, nnx.Linear(8, 1))
    >>> mlp(jnp.ones((5, 2))).shape
    (5, 1)
    """

    def __init__(self, *fns: Callable[..., Any]):
        for i, fn in enumerate(fns):
            if not callable(fn):
                raise TypeError(
                    f"Sequential takes callables, but number {i} is a {type(fn).__name__}: {fn!r}. "
                    f"A list of layers is unpacked with a star: Sequential(*layers)."
                )
            if inspect.isclass(fn):
                raise TypeError(
                    f"Sequential takes instances, but number {i} is the class {fn.__name__}. Make "
                    f"one of it: {fn.__name__}(...)."
                )
        self.layers = list(fns)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layers in order; without any, give back the one argument."""
        if not self.layers:
            return args[0] if len(args) == 1 and not kwargs else args
        out: Any = self.layers[0](*args, **kwargs)
        for layer in self.layers[1:]:
            if isinstance(out, tuple):
                out = layer(*out)
            elif isinstance(out, dict):
                out = layer(**out)
            else:
                out = layer(out)
        return out
