"""The transformations that take a function as a whole: remat, eval_shape, make_jaxpr, checkify."""

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


# Those that compute nothing: a ShapeDtypeStruct in a module stands for an array there.
_ABSTRACT = ("nnx.eval_shape", "nnx.make_jaxpr")


def _transformed(
    kind: str, fn: Callable[..., Any], transform: Callable[[Call, Callable[..., Packed]], Any]
) -> Callable[..., Any]:
    """A function that opens the boundary and leaves to `transform` what happens inside."""
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
    """Compute the intermediate values of `fn` again in the backward pass instead of keeping them.

    Args:
      fn: the function, a module, or a bound method of one. It may read and write Refs.
      prevent_cse, policy: as for `jax.checkpoint`.

    Returns:
      A function that computes what `fn` computes, with less memory under `nnx.grad`.

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
    """The output of `fn` with `jax.ShapeDtypeStruct`s for arrays, without computing anything.

    Modules in the arguments may hold arrays or `ShapeDtypeStruct`s. Nothing that `fn` writes is
    kept. So a model of any size can be looked at: `nnx.eval_shape(lambda: Model.init(key)(...))`.

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
    """A function of the arguments of `fn` that gives its jaxpr, to look at; nothing is written.

    The inputs of the jaxpr are the values of the Refs, by path, and then the other arguments; its
    outputs are those of `fn` and then the Refs that `fn` wrote, and no others.

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
    """Make `jax.experimental.checkify` checks of `fn` into an error value; Refs are written back.

    Args:
      fn: the function, a module, or a bound method of one.
      errors: which checks, as for `jax.experimental.checkify.checkify`.

    Returns:
      A function that returns `(error, out)`; `error.throw()` raises if a check failed. It must be
      compiled, by `nnx.jit`, if the checks are inside a compiled function.

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
