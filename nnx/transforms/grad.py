"""`nnx.grad` and `nnx.value_and_grad`: gradients by filter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, ParamSpec, TypeVar, overload

import jax
import jax.numpy as jnp

from nnx._ambient import ambient
from nnx.transforms.callables import unbound
from nnx.transforms.differentiate import differentiate
from nnx.transforms.targets import DifferentiationError, Target
from refx import Filter, Partition

__all__ = ["grad", "value_and_grad"]


P = ParamSpec("P")
R = TypeVar("R")
A = TypeVar("A")

# A Partition for an argument that holds Refs, and the result of `jax.grad` for any other.
Gradient = Partition | Any


@overload
def value_and_grad(
    fn: Callable[P, R],
    *,
    wrt: Filter = "params",
    argnums: int = 0,
    has_aux: Literal[False] = False,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[P, tuple[R, Gradient]]: ...
@overload
def value_and_grad(
    fn: Callable[P, R],
    *,
    wrt: Filter = "params",
    argnums: Sequence[int],
    has_aux: Literal[False] = False,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[P, tuple[R, tuple[Gradient, ...]]]: ...
@overload
def value_and_grad(
    fn: Callable[P, tuple[R, A]],
    *,
    wrt: Filter = "params",
    argnums: int = 0,
    has_aux: Literal[True],
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[P, tuple[tuple[R, A], Gradient]]: ...
@overload
def value_and_grad(
    fn: Callable[P, tuple[R, A]],
    *,
    wrt: Filter = "params",
    argnums: Sequence[int],
    has_aux: Literal[True],
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[P, tuple[tuple[R, A], tuple[Gradient, ...]]]: ...
@overload
def value_and_grad(
    fn: Callable[P, Any],
    *,
    wrt: Filter = "params",
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[P, Any]: ...
def value_and_grad(
    fn: Callable[..., Any],
    *,
    wrt: Filter = "params",
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[..., Any]:
    """Compute the value of a function and its gradient with respect to the Refs that a filter selects.

    Args:
      fn: a function of modules (or anything that holds Refs) that returns a scalar. It may write
        Refs, such as batch statistics, and the writes propagate to the caller.
      wrt: a filter. The gradient has an entry for each Ref that it selects, like `model[wrt]`. The
        gradient of a shared Ref is the sum over its uses.
      argnums: the argument, or arguments, to differentiate. An argument without Refs is
        differentiated as in `jax.grad`. For a bound method, argument 0 is its module.
      has_aux: whether `fn` returns `(scalar, aux)`.
      holomorphic, allow_int: as for `jax.grad`.

    Returns:
      A function with the arguments of `fn` that returns `(value, gradient)`, or
      `((value, aux), gradient)`. A gradient is a Partition for an argument that holds Refs, and a
      tuple of gradients for a sequence of `argnums`.

    Raises:
      DifferentiationError: `wrt` selects nothing, or selects a Ref whose dtype has no gradient.
      TraceLevelError: `fn` writes a Ref that it closes over, which is a constant here.

    >>> import jax, jax.numpy as jnp, nnx
    >>> class Scale(nnx.Module):
    ...     scale: jax.Array = nnx.param()
    ...     def __init__(self):
    ...         self.scale = jnp.array(3.0)
    >>> value, grads = nnx.value_and_grad(lambda m: m.scale ** 2)(Scale())
    >>> float(value), float(grads["scale"])
    (9.0, 6.0)
    """
    return _gradient("nnx.value_and_grad", fn, wrt, argnums, has_aux, holomorphic, allow_int)


@overload
def grad(
    fn: Callable[P, R],
    *,
    wrt: Filter = "params",
    argnums: int = 0,
    has_aux: Literal[False] = False,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[P, Gradient]: ...
@overload
def grad(
    fn: Callable[P, R],
    *,
    wrt: Filter = "params",
    argnums: Sequence[int],
    has_aux: Literal[False] = False,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[P, tuple[Gradient, ...]]: ...
@overload
def grad(
    fn: Callable[P, tuple[R, A]],
    *,
    wrt: Filter = "params",
    argnums: int = 0,
    has_aux: Literal[True],
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[P, tuple[Gradient, A]]: ...
@overload
def grad(
    fn: Callable[P, tuple[R, A]],
    *,
    wrt: Filter = "params",
    argnums: Sequence[int],
    has_aux: Literal[True],
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[P, tuple[tuple[Gradient, ...], A]]: ...
@overload
def grad(
    fn: Callable[P, Any],
    *,
    wrt: Filter = "params",
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[P, Any]: ...
def grad(
    fn: Callable[..., Any],
    *,
    wrt: Filter = "params",
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[..., Any]:
    """Compute the gradient of a function. Arguments and errors are those of `value_and_grad`.

    Returns:
      A function with the arguments of `fn` that returns the gradient, or `(gradient, aux)`.

    >>> import jax, jax.numpy as jnp, nnx
    >>> w = nnx.Ref(jnp.array(3.0), "params")
    >>> nnx.grad(lambda r: r.value ** 2)(w)
    Partition({
      '': float32[],
    })
    """
    both = _gradient("nnx.grad", fn, wrt, argnums, has_aux, holomorphic, allow_int)

    @functools.wraps(both)
    def gradient(*args: Any, **kwargs: Any) -> Any:
        value, grads = both(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return gradient


def _gradient(
    kind: str,
    fn: Callable[..., Any],
    wrt: Filter,
    argnums: int | Sequence[int],
    has_aux: bool,
    holomorphic: bool,
    allow_int: bool,
) -> Callable[..., Any]:
    inner, bound = unbound(fn)
    single = isinstance(argnums, int)
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    def transform(pure: Any, parts: Any, targets: list[Target], name: str) -> Any:
        both = jax.value_and_grad(pure, has_aux=True, holomorphic=holomorphic, allow_int=allow_int)
        (value, packed), grads = both(parts)
        return (value, [t.named(g) for t, g in zip(targets, grads, strict=True)]), packed

    @functools.wraps(inner)
    def value_and_gradient(*args: Any, **kwargs: Any) -> Any:
        if ambient.probe is not None:
            options = wrt, argnums, has_aux, holomorphic, allow_int
            return ambient.probe.gradient(kind, inner, bound + args, kwargs, *options)
        (value, grads), _, aux = differentiate(
            kind, fn, args, kwargs, numbers, wrt, has_aux, allow_int, transform, _check_scalar
        )
        return (value, aux) if has_aux else value, grads[0] if single else tuple(grads)

    return value_and_gradient


def _check_scalar(name: str, out: Any) -> None:
    if not hasattr(out, "shape") and not isinstance(out, int | float | complex):
        hint = " Pass has_aux=True if it returns (scalar, aux)." if isinstance(out, tuple) else ""
        raise DifferentiationError(
            f"The function of {name} must return a scalar, but it returned {type(out).__name__}.{hint}"
        )
    if jnp.shape(out) != ():
        raise DifferentiationError(
            f"The function of {name} must return a scalar, but it returned an array of shape "
            f"{jnp.shape(out)}. Reduce it, for example with jnp.mean."
        )
