"""The transformations that need no more than the boundary: remat, eval_shape, make_jaxpr, checkify."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, overload

import jax
from jax.experimental import checkify as jax_checkify

from nnx._ambient import ambient
from nnx.transforms.boundary import abstractly, close_call, run, to_its_end, until_lifted
from nnx.transforms.call import Call, Roots, Values, open_call
from nnx.transforms.callables import function_name, unbound
from nnx.transforms.naming import named
from nnx.transforms.result import Packed, fresh_output

__all__ = ["checkify", "eval_shape", "make_jaxpr", "remat"]


# These compute nothing, so a module may hold ShapeDtypeStructs in place of arrays.
_ABSTRACT = ("nnx.eval_shape", "nnx.make_jaxpr")


def _transformed(
    kind: str, fn: Callable[..., Any], transform: Callable[[Call, Callable[..., Packed]], Any]
) -> Callable[..., Any]:
    """Wrap `fn` so that a call opens the boundary and lets `transform` do the rest."""
    inner, bound = unbound(fn)
    name = f"{kind}({function_name(fn)})"

    @functools.wraps(inner)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if ambient.probe is not None:
            return ambient.probe.whole(kind, inner, bound + args, kwargs, transform)

        def attempt(roots: Roots) -> Any:
            call = open_call(bound + args, kwargs, roots, abstract=kind in _ABSTRACT)

            def pure(values: Values) -> Packed:
                return run(inner, name, call, values, mode="read")

            return transform(call, named(pure, inner, call))

        return until_lifted(attempt)

    return wrapped


P = ParamSpec("P")
R = TypeVar("R")


@overload
def remat(
    fn: Callable[P, R],
    *,
    prevent_cse: bool = True,
    policy: Callable[..., bool] | None = None,
) -> Callable[P, R]: ...
@overload
def remat(
    fn: None = None,
    *,
    prevent_cse: bool = True,
    policy: Callable[..., bool] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def remat(
    fn: Callable[..., Any] | None = None,
    *,
    prevent_cse: bool = True,
    policy: Callable[..., bool] | None = None,
) -> Callable[..., Any]:
    """Recompute the intermediate values of `fn` in the backward pass instead of keeping them.

    Args:
      fn: the function, a module, or a bound method of a module. It may read and write Refs.
      prevent_cse, policy: as for `jax.checkpoint`.

    Returns:
      A function that computes the same as `fn`, with less memory under `nnx.grad`.

    >>> import jax.numpy as jnp, nnx
    >>> w = nnx.Ref(jnp.array(2.0), "params")
    >>> float(nnx.grad(nnx.remat(lambda w: jnp.sin(w.value) ** 2))(w)[""]).__round__(4)
    -0.7568
    """
    if fn is None:
        return functools.partial(remat, prevent_cse=prevent_cse, policy=policy)

    def transform(call: Call, pure: Callable[..., Packed]) -> Any:
        def again(pure: Callable[..., Packed]) -> Packed:
            checkpointed = jax.checkpoint(pure, prevent_cse=prevent_cse, policy=policy)
            return checkpointed(call.values)

        return close_call(call, to_its_end(again, pure))

    return _transformed("nnx.remat", fn, transform)


def eval_shape(fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Find the output of `fn`, with `jax.ShapeDtypeStruct`s for arrays, without computing anything.

    Modules in the arguments may hold arrays or `ShapeDtypeStruct`s. Writes of `fn` are dropped. You can
    inspect a model of any size: `nnx.eval_shape(lambda: Model.init(key)(...))`.

    >>> import jax, nnx
    >>> class Wide(nnx.Module):
    ...     w: jax.Array = nnx.param()
    ...     def __init__(self, n):
    ...         self.w = jax.random.normal(self.make_rng("params"), (n, n))
    >>> nnx.eval_shape(lambda: Wide.init(jax.random.key(0))(100_000))
    Wide(
      w = float32[100000,100000]  # params
    )
    """

    def transform(call: Call, pure: Callable[..., Packed]) -> Any:
        packed = abstractly(pure, call.values)
        if packed.spec.graph is None:
            return packed.out
        return fresh_output(call, packed, jax.eval_shape(lambda: call.values))

    return _transformed("nnx.eval_shape", fn, transform)(*args, **kwargs)


def make_jaxpr(fn: Callable[P, Any]) -> Callable[P, Any]:
    """Make a function with the arguments of `fn` that returns its jaxpr. It writes nothing.

    The inputs of the jaxpr are the values of the Refs, by path, and then the other arguments. Its
    outputs are the outputs of `fn` and then only the Refs that `fn` wrote.

    >>> import jax.numpy as jnp, nnx
    >>> n = nnx.Ref(jnp.array(0), "counters")
    >>> def count(n, x):
    ...     n.value += x
    >>> len(nnx.make_jaxpr(count)(n, 2).jaxpr.outvars)
    1
    """

    def transform(call: Call, pure: Callable[..., Packed]) -> Any:
        return jax.make_jaxpr(pure)(call.values)

    return _transformed("nnx.make_jaxpr", fn, transform)


def checkify(
    fn: Callable[P, R], errors: Any = jax_checkify.user_checks
) -> Callable[P, tuple[jax_checkify.Error, R]]:
    """Turn the `jax.experimental.checkify` checks in `fn` into an error value. Refs are written back.

    Args:
      fn: the function, a module, or a bound method of a module.
      errors: the set of checks, as for `jax.experimental.checkify.checkify`.

    Returns:
      A function that returns `(error, out)`. `error.throw()` raises if a check failed. If the checks
      are inside a compiled function, compile this one too, with `nnx.jit`.

    >>> import jax.numpy as jnp, nnx
    >>> from jax.experimental import checkify
    >>> def log(x):
    ...     checkify.check(x > 0, "x must be positive")
    ...     return jnp.log(x)
    >>> error, _ = nnx.checkify(log)(jnp.array(-1.0))
    >>> error.get() is not None
    True
    """

    def transform(call: Call, pure: Callable[..., Packed]) -> Any:
        def checked(pure: Callable[..., Packed]) -> Any:
            return jax_checkify.checkify(pure, errors)(call.values)

        error, packed = to_its_end(checked, pure)
        return error, close_call(call, packed)

    return _transformed("nnx.checkify", fn, transform)
