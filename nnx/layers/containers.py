"""Modules made of modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from nnx.module import Module
from nnx.transforms import remat as nnx_remat
from nnx.transforms import scan, vmap

__all__ = ["Sequential", "Stack"]


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


class Stack(Module):
    """Layers of one kind, one after the other, compiled in the time of one.

    The parameters of the layers are stacked along a leading axis, and the layers run in `nnx.scan`.
    Each layer has initial values of its own, and takes what the one before returned.

    Args:
      make: makes one layer, such as a module class or a function; called without arguments.
      length: number of layers.
      remat: compute what is inside a layer again in the backward pass, instead of keeping it.
      policy: what to keep nevertheless, as for `jax.checkpoint`.
      unroll: as for `jax.lax.scan`.

    Attributes: `layers`, a module as `make` makes it, whose Refs have a leading axis.

    Raises:
      CarryError: a layer returns another shape or dtype than it takes.

    >>> import jax, jax.numpy as jnp, nnx
    >>> stack = nnx.Stack.init(jax.random.key(0))(lambda: nnx.Linear(4, 4), 8)
    >>> stack.layers.kernel.shape, stack(jnp.ones((2, 4))).shape
    ((8, 4, 4), (2, 4))
    """

    def __init__(
        self,
        make: Callable[[], Module],
        length: int,
        *,
        remat: bool = False,
        policy: Callable[..., bool] | None = None,
        unroll: int = 1,
    ):
        if length < 1:
            raise ValueError(f"Stack needs at least one layer, but its length is {length}.")
        self.layers = vmap(lambda: make(), axis_size=length)()
        self.length = length
        self.remat = remat
        self.policy = policy
        self.unroll = unroll

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the layers in order, each as `layer(x, *args, **kwargs)`."""

        def call(layer: Any, x: Any) -> Any:
            return layer(x, *args, **kwargs)

        body = nnx_remat(call, policy=self.policy) if self.remat else call
        return scan(lambda x, layer: (body(layer, x), None), x, self.layers, unroll=self.unroll)[0]
