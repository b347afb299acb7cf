"""`nnx.grad` and `nnx.value_and_grad`: gradients by filter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnx._ambient import ambient
from nnx.transforms.boundary import close_call, run, until_lifted
from nnx.transforms.call import Roots, open_call
from nnx.transforms.callables import function_name, unbound
from nnx.transforms.targets import DifferentiationError, targets_of
from refx import Filter

__all__ = ["grad", "value_and_grad"]


def value_and_grad(
    fn: Callable[..., Any],
    *,
    wrt: Filter = "params",
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[..., Any]:
    """The value of a function and its gradient with respect to the Refs that a filter selects.

    Args:
      fn: a function of modules (or anything that holds Refs) that returns a scalar. It may write
        Refs, such as batch statistics: those writes propagate to the caller.
      wrt: a filter; the gradient has an entry for each Ref it selects, like `model[wrt]`. The
        gradient of a shared Ref is the sum over its uses.
      argnums: the argument, or arguments, to differentiate. One that holds no Refs is
        differentiated as `jax.grad` does.
      has_aux: `fn` returns `(scalar, aux)`.
      holomorphic, allow_int: as for `jax.grad`.

    Returns:
      A function with the arguments of `fn` that returns `(value, gradient)`, or
      `((value, aux), gradient)`. A gradient is a Partition for an argument that holds Refs, and a
      tuple of gradients for a sequence of `argnums`.

    Raises:
      DifferentiationError: `wrt` selects nothing, or a Ref whose dtype has no gradient.
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


def grad(
    fn: Callable[..., Any],
    *,
    wrt: Filter = "params",
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[..., Any]:
    """The gradient of a function; arguments and errors as for `value_and_grad`.

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
    name = f"{kind}({function_name(fn)})"
    single = isinstance(argnums, int)
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    @functools.wraps(inner)
    def value_and_gradient(*args: Any, **kwargs: Any) -> Any:
        args = bound + args
        if ambient.probe is not None:
            options = wrt, argnums, has_aux, holomorphic, allow_int
            return ambient.probe.gradient(kind, inner, args, kwargs, *options)

        def attempt(roots: Roots) -> Any:
            call = open_call(args, kwargs, roots)
            targets = targets_of(name, args, numbers, wrt, call, allow_int=allow_int)

            def loss(given: Any) -> Any:
                flat = list(call.values), list(call.leaves), list(call.others)
                for t, part in zip(targets, given, strict=True):
                    t.put(part, *flat)
                split_out = functools.partial(_split, name, has_aux)
                return run(inner, name, call, *flat, mode="constant", split_out=split_out)

            (value, packed), grads = jax.value_and_grad(
                loss, has_aux=True, holomorphic=holomorphic, allow_int=allow_int
            )([t.take(call.values, call.leaves, call.others) for t in targets])
            aux = close_call(call, packed)
            results = tuple(t.named(g) for t, g in zip(targets, grads, strict=True))
            return (value, aux) if has_aux else value, results[0] if single else results

        return until_lifted(attempt)

    return value_and_gradient


def _split(name: str, has_aux: bool, out: Any) -> tuple[Any, Any]:
    if has_aux:
        if not isinstance(out, tuple) or len(out) != 2:
            raise DifferentiationError(
                f"With has_aux=True, the function of {name} must return (scalar, aux), but it "
                f"returned {type(out).__name__}."
            )
        loss, aux = out
    else:
        loss, aux = out, None
    if not hasattr(loss, "shape") and not isinstance(loss, int | float | complex):
        hint = " Pass has_aux=True if it returns (scalar, aux)." if isinstance(loss, tuple) else ""
        raise DifferentiationError(
            f"The function of {name} must return a scalar, but it returned "
            f"{type(loss).__name__}.{hint}"
        )
    if jnp.shape(loss) != ():
        raise DifferentiationError(
            f"The function of {name} must return a scalar, but it returned an array of shape "
            f"{jnp.shape(loss)}. Reduce it, as with jnp.mean."
        )
    return loss, aux
