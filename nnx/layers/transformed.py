"""Transformations as modules: each holds the callable that it transforms, and is saved and split with it.

Use them for a model that carries its own transformations: `nnx.Jit(nnx.VMap(model))` is one object that
you can pass on, save and load. For a function such as a training step, use `nnx.jit`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from nnx import transforms
from nnx.fields import static
from nnx.module import Module
from nnx.transforms.callables import unbound
from refx import Filter, to_predicate

__all__ = ["Grad", "Jit", "Partial", "Remat", "VMap"]


# Compiled methods of classes are cached here, so that all modules of a class share them. A compiled
# function may hold a whole model, so it is kept in its `Jit` instead.
@functools.lru_cache(maxsize=512)
def _jitted(fn: Callable[..., Any], options: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return transforms.jit(fn, **dict(options))


def _check(kind: str, fn: Any) -> None:
    if not callable(fn):
        raise TypeError(
            f"nnx.{kind} takes a module, a bound method of one, or a function, but got "
            f"{type(fn).__name__}: {fn!r:.80}."
        )
    if isinstance(fn, type):
        raise TypeError(
            f"nnx.{kind} takes an instance, but got the class {fn.__name__}. Call the class: "
            f"nnx.{kind}({fn.__name__}(...))."
        )


class Jit(Module, hidden_slots=True):
    """`nnx.jit` as a module: `Jit(model)(x)` is `nnx.jit(model)(x)`, and updates propagate.

    Modules of the same class share compiled programs. Compiled programs are not part of the module, so a
    clone of a `Jit` that holds a function compiles again.

    Args:
      fn: a module, a bound method of one, or a function.
      donate: as for `nnx.jit`.
      static_argnums, static_argnames: as for `nnx.jit`; the numbers count the arguments of the call.

    Attributes: `fn`, the same object, not a copy.

    Raises:
      TypeError: `fn` cannot be called.

    >>> import jax, jax.numpy as jnp, nnx
    >>> model = nnx.Linear.init(jax.random.key(0))(3, 2)
    >>> fast = nnx.Jit(model)
    >>> fast(jnp.ones((4, 3))).shape, fast.fn is model
    ((4, 2), True)
    """

    __slots__ = ("_compiled",)

    donate: Filter = static()
    static_argnums: tuple[int, ...] = static()
    static_argnames: tuple[str, ...] = static()

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        donate: Filter = None,
        static_argnums: int | Sequence[int] = (),
        static_argnames: str | Sequence[str] = (),
    ):
        _check("Jit", fn)
        if donate is not None and not isinstance(donate, bool):
            to_predicate(donate)
        self.fn = fn
        self.donate = donate
        numbers, names = static_argnums, static_argnames
        self.static_argnums = (numbers,) if isinstance(numbers, int) else tuple(numbers)
        self.static_argnames = (names,) if isinstance(names, str) else tuple(names)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the compiled function."""
        fn, bound = unbound(self.fn)
        numbers = tuple(n + len(bound) if n >= 0 else n for n in self.static_argnums)
        options = (
            ("donate", self.donate),
            ("static_argnums", numbers),
            ("static_argnames", self.static_argnames),
        )
        if bound:
            return _jitted(fn, options)(*bound, *args, **kwargs)
        kept = getattr(self, "_compiled", None)
        if kept is None or kept[0] is not fn or kept[1] != options:
            kept = (fn, options, transforms.jit(fn, **dict(options)))
            _keep(self, kept)
        return kept[2](*args, **kwargs)


# Set without the attribute machinery, because attributes are part of the structure.
_keep = Jit._compiled.__set__  # pyright: ignore[reportAttributeAccessIssue]


class VMap(Module):
    """`nnx.vmap` as a module: maps its callable over an axis of the arguments of the call.

    Args:
      fn: a module, a bound method of one, or a function. A module is the same in every lane.
      in_axes, out_axes, axis_name, axis_size: as for `nnx.vmap`; `in_axes` are for the arguments of the
        call.

    Attributes: `fn`, the same object, not a copy.

    Raises:
      TypeError: `fn` cannot be called.

    >>> import jax, jax.numpy as jnp, nnx
    >>> norm = nnx.VMap(lambda x: x / jnp.linalg.norm(x))
    >>> norm(jnp.array([[3.0, 4.0], [0.0, 2.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 1.0]]
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        in_axes: Any = 0,
        out_axes: Any = 0,
        *,
        axis_name: Hashable | None = None,
        axis_size: int | None = None,
    ):
        _check("VMap", fn)
        self.fn = fn
        self.in_axes = in_axes
        self.out_axes = out_axes
        self.axis_name = axis_name
        self.axis_size = axis_size

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the mapped function."""
        mapped = transforms.vmap(
            self.fn,
            self.in_axes,
            self.out_axes,
            axis_name=self.axis_name,
            axis_size=self.axis_size,
        )
        return mapped(*args, **kwargs)


class Grad(Module):
    """`nnx.grad` as a module: a call returns the gradient of its callable.

    Args:
      fn: a function to differentiate with respect to its first argument; or a module or a bound method,
        to differentiate with respect to the module.
      wrt, argnums, has_aux: as for `nnx.grad`. The module itself is argument 0.

    Attributes: `fn`, the same object, not a copy.

    Raises:
      TypeError: `fn` cannot be called.

    >>> import jax.numpy as jnp, nnx
    >>> class Parabola(nnx.Module):
    ...     a: float = nnx.param(default=2.0)
    ...     def __call__(self, x):
    ...         return self.a * x**2
    >>> float(nnx.Grad(Parabola())(3.0)["a"])
    9.0
    """

    wrt: Filter = static()

    def __init__(
        self,
        fn: Callable[..., Any],
        wrt: Filter = "params",
        *,
        argnums: int | Sequence[int] = 0,
        has_aux: bool = False,
    ):
        _check("Grad", fn)
        self.fn = fn
        self.wrt = wrt
        self.argnums = argnums if isinstance(argnums, int) else tuple(argnums)
        self.has_aux = has_aux

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The gradient, as `nnx.grad` returns it."""
        gradient = transforms.grad(
            self.fn, wrt=self.wrt, argnums=self.argnums, has_aux=self.has_aux
        )
        return gradient(*args, **kwargs)


class Remat(Module):
    """`nnx.remat` as a module: the backward pass computes its intermediate values again.

    Args:
      fn: a module, a bound method of one, or a function.
      prevent_cse, policy: as for `nnx.remat`.

    Attributes: `fn`, the same object, not a copy.

    Raises:
      TypeError: `fn` cannot be called.

    >>> import jax, jax.numpy as jnp, nnx
    >>> block = nnx.Remat(nnx.Linear.init(jax.random.key(0))(3, 3))
    >>> block(jnp.ones((2, 3))).shape
    (2, 3)
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        prevent_cse: bool = True,
        policy: Callable[..., bool] | None = None,
    ):
        _check("Remat", fn)
        self.fn = fn
        self.prevent_cse = prevent_cse
        self.policy = policy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        again = transforms.remat(self.fn, prevent_cse=self.prevent_cse, policy=self.policy)
        return again(*args, **kwargs)


class Partial(Module):
    """A module or function with some arguments already given: `functools.partial` as a module.

    Args:
      fn: a module, a bound method of one, or a function.
      *args, **kwargs: its first arguments, and some by name. Arrays, Refs and modules among them
        are values of this module; everything else is static.

    Attributes: `fn`, `args` and `keywords`.

    Raises:
      TypeError: `fn` cannot be called.

    >>> import jax, nnx
    >>> softmax = nnx.Partial(jax.nn.softmax, axis=0)
    >>> softmax(jax.numpy.zeros((2, 1))).tolist()
    [[0.5], [0.5]]
    """

    def __init__(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any):
        _check("Partial", fn)
        self.fn = fn
        self.args = args
        self.keywords = kwargs

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call the function with the stored arguments and those of the call."""
        return self.fn(*self.args, *args, **{**self.keywords, **kwargs})
