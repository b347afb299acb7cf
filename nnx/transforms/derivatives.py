"""Derivatives other than the gradient: `vjp`, `jvp`, `linearize`, `jacfwd`, `jacrev`, `hessian`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from nnx.transforms.callables import function_name, unbound
from nnx.transforms.differentiate import differentiate, pure_of
from nnx.transforms.targets import DifferentiationError, Parts, Target
from refx import Filter

__all__ = ["hessian", "jacfwd", "jacrev", "jvp", "linearize", "vjp"]


def _own(has_aux: bool, result: Any) -> tuple[Any, ...]:
    """Put the caller's own modules into the output."""
    (out, more), own, aux = result
    return (own(out), more, aux) if has_aux else (own(out), more)


def _pull(targets: list[Target], pull: Callable[..., Any], cotangent: Any) -> tuple[Any, ...]:
    (grads,) = pull(pure_of(cotangent))
    return tuple(t.named(g) for t, g in zip(targets, grads, strict=True))


def vjp(
    fn: Callable[..., Any], *primals: Any, wrt: Filter = "params", has_aux: bool = False
) -> tuple[Any, ...]:
    """Compute the output of a function, and return it with its vector-Jacobian product function.

    Args:
      fn: a function of modules, Refs and arrays. Its writes to Refs propagate to the caller.
      *primals: the arguments of `fn`.
      wrt: a filter that selects Refs in the primals.
      has_aux: whether `fn` returns `(out, aux)`.

    Returns:
      `(out, vjp_fn)` or `(out, vjp_fn, aux)`. `vjp_fn(cotangent)` returns a tuple with an entry for
      each primal, which is a Partition for a primal that holds Refs. For a bound method, the first
      entry is for its module. Where the output holds a module, the cotangent has a Partition of its
      floating-point values, or a module like it. `vjp_fn` is a pytree, so compiled functions may
      return it.

    Raises:
      DifferentiationError: `wrt` selects nothing at all, or selects a Ref that two primals share.
      TraceLevelError: `fn` writes a Ref that it closes over, which is a constant here.

    >>> import jax.numpy as jnp, nnx
    >>> w = nnx.Ref(jnp.array([1.0, 2.0]), "params")
    >>> out, vjp_fn = nnx.vjp(lambda w, x: w.value * x, w, 3.0)
    >>> dw, dx = vjp_fn(jnp.ones(2))
    >>> dw[""].tolist(), float(dx)
    ([3.0, 3.0], 3.0)
    """

    def transform(pure: Any, parts: Any, targets: list[Target], name: str) -> Any:
        out, pull, packed = jax.vjp(pure, parts, has_aux=True)
        # Keep the places, but not their values.
        bare = [t.without_values() for t in targets]
        return (out, jax.tree_util.Partial(functools.partial(_pull, bare), pull)), packed

    return _own(
        has_aux, differentiate("nnx.vjp", fn, primals, {}, None, wrt, has_aux, True, transform)
    )


def jvp(
    fn: Callable[..., Any],
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    wrt: Filter = "params",
    has_aux: bool = False,
) -> tuple[Any, ...]:
    """Compute the output of a function, and its derivative in the direction of the tangents.

    Args:
      fn: a function of modules, Refs and arrays. Its writes to Refs propagate to the caller.
      primals: the arguments of `fn`.
      tangents: one for each primal. For a primal that holds Refs it is a Partition (or another
        mapping by path) of the Refs that `wrt` selects; missing paths are zero.
      wrt: a filter that selects Refs in the primals.
      has_aux: whether `fn` returns `(out, aux)`.

    Returns:
      `(out, tangent_out)` or `(out, tangent_out, aux)`. Where the output holds a module, the
      tangent has a Partition of its floating-point values.

    Raises:
      UnknownPathError, ShapeError: a tangent has a path that is not differentiated, or its shape or
        dtype is not that of the value.
      DifferentiationError: as for `vjp`; or the number of tangents is not that of the primals, a
        tangent does not have its primal's structure, or the tangent of a primal with Refs is not a
        mapping.

    >>> import jax.numpy as jnp, nnx
    >>> w = nnx.Ref(jnp.array(2.0), "params")
    >>> out, tangent = nnx.jvp(lambda w, x: w.value ** 2 * x, (w, 3.0), ({"": jnp.array(1.0)}, 0.0))
    >>> float(out), float(tangent)
    (12.0, 12.0)
    """
    if len(primals) != len(tangents):
        raise DifferentiationError(
            f"nnx.jvp({function_name(fn)}) got {len(primals)} primals and {len(tangents)} tangents. "
            f"Give one tangent for each primal. For a module that does not move, give {{}}."
        )
    bound = unbound(fn)[1]

    def transform(pure: Any, parts: Any, targets: list[Target], name: str) -> Any:
        given = (*({} for _ in bound), *tangents)
        moved = [t.parts(name, d) for t, d in zip(targets, given, strict=True)]
        out, tangent, packed = jax.jvp(pure, (parts,), (moved,), has_aux=True)
        return (out, tangent), packed

    return _own(
        has_aux,
        differentiate("nnx.jvp", fn, tuple(primals), {}, None, wrt, has_aux, True, transform),
    )


def _push(name: str, targets: list[Target], linear: Callable[..., Any], *given: Any) -> Any:
    if len(given) != len(targets):
        raise DifferentiationError(
            f"The function that {name} returned takes {len(targets)} tangents, one for each primal, but "
            f"it got {len(given)}. For a module that does not move, give {{}}."
        )
    return linear([t.parts(name, tangent) for t, tangent in zip(targets, given, strict=True)])


def linearize(
    fn: Callable[..., Any], *primals: Any, wrt: Filter = "params", has_aux: bool = False
) -> tuple[Any, ...]:
    """Compute the output of a function, and its derivative as a linear function of the tangents.

    It is `nnx.jvp` for many tangents: `fn` runs once, and `jvp_fn` keeps what the derivative needs.

    Args:
      fn: a function of modules, Refs and arrays. Its writes to Refs propagate to the caller, once.
      *primals: the arguments of `fn`.
      wrt: a filter that selects Refs in the primals.
      has_aux: whether `fn` returns `(out, aux)`.

    Returns:
      `(out, jvp_fn)` or `(out, jvp_fn, aux)`. `jvp_fn(*tangents)` takes one tangent for each primal,
      like `nnx.jvp`, and returns the tangent of the output. For a bound method, the first tangent is
      for its module. `jvp_fn` is a pytree, so compiled functions may return it.

    Raises:
      DifferentiationError, UnknownPathError, ShapeError: as for `nnx.jvp`. `jvp_fn` raises those
        that concern a tangent.
      TraceLevelError: `fn` writes a Ref that it closes over, which is a constant here.

    >>> import jax.numpy as jnp, nnx
    >>> w = nnx.Ref(jnp.array(2.0), "params")
    >>> out, jvp_fn = nnx.linearize(lambda w, x: w.value ** 2 * x, w, 3.0)
    >>> float(out), float(jvp_fn({"": jnp.array(1.0)}, 0.0)), float(jvp_fn({}, 1.0))
    (12.0, 12.0, 4.0)
    """

    def transform(pure: Any, parts: Any, targets: list[Target], name: str) -> Any:
        out, linear, packed = jax.linearize(pure, parts, has_aux=True)
        push = functools.partial(_push, name, [t.without_values() for t in targets])
        return (out, jax.tree_util.Partial(push, linear)), packed

    return _own(
        has_aux,
        differentiate("nnx.linearize", fn, primals, {}, None, wrt, has_aux, True, transform),
    )


def _jacobian(
    kind: str, transforms: Sequence[Callable[..., Any]], fn: Callable[..., Any], options: Any
) -> Callable[..., Any]:
    wrt, argnums, has_aux, holomorphic, allow_int = options
    single = isinstance(argnums, int)
    numbers = (argnums,) if single else tuple(argnums)

    def named(tree: Any, targets: list[Target]) -> Any:
        """Convert every list of Parts in a tree of derivatives for the user, innermost first."""

        def one(parts: Any) -> Any:
            inner = [
                t.named(Parts([named(v, targets) for v in p.values]))
                for t, p in zip(targets, parts, strict=True)
            ]
            return inner[0] if single else tuple(inner)

        return jax.tree.map(lambda x: one(x) if _is_parts(x) else x, tree, is_leaf=_is_parts)

    def transform(pure: Any, parts: Any, targets: list[Target], name: str) -> Any:
        derivative = pure
        for jacobian in transforms:
            kwargs = {} if jacobian is jax.jacfwd else {"allow_int": allow_int}
            derivative = jacobian(derivative, has_aux=True, holomorphic=holomorphic, **kwargs)
        result, packed = derivative(parts)
        return named(result, targets), packed

    @functools.wraps(unbound(fn)[0])
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result, _, aux = differentiate(
            kind, fn, args, kwargs, numbers, wrt, has_aux, allow_int, transform
        )
        return (result, aux) if has_aux else result

    return wrapped


def _is_parts(x: Any) -> bool:
    return isinstance(x, list) and bool(x) and all(isinstance(p, Parts) for p in x)


def jacrev(
    fn: Callable[..., Any],
    *,
    wrt: Filter = "params",
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[..., Any]:
    """Compute the Jacobian of a function in reverse mode. Arguments and errors are those of `nnx.grad`.

    Returns:
      A function with the arguments of `fn` that returns the Jacobian, or `(jacobian, aux)`. The
      Jacobian has the structure of the output, with a derivative in place of each array: a Partition,
      or the result of `jax.jacrev` for an argument without Refs. A module in the output becomes a
      Partition of its floating-point values, with a derivative for each.

    >>> import jax.numpy as jnp, nnx
    >>> w = nnx.Ref(jnp.array([1.0, 2.0]), "params")
    >>> nnx.jacrev(lambda w: w.value ** 2)(w)[""].tolist()
    [[2.0, 0.0], [0.0, 4.0]]
    """
    options = (wrt, argnums, has_aux, holomorphic, allow_int)
    return _jacobian("nnx.jacrev", (jax.jacrev,), fn, options)


def jacfwd(
    fn: Callable[..., Any],
    *,
    wrt: Filter = "params",
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
) -> Callable[..., Any]:
    """Compute the Jacobian of a function in forward mode. Everything else is as for `nnx.jacrev`.

    >>> import jax.numpy as jnp, nnx
    >>> w = nnx.Ref(jnp.array([1.0, 2.0]), "params")
    >>> nnx.jacfwd(lambda w: w.value ** 2)(w)[""].tolist()
    [[2.0, 0.0], [0.0, 4.0]]
    """
    options = (wrt, argnums, has_aux, holomorphic, False)
    return _jacobian("nnx.jacfwd", (jax.jacfwd,), fn, options)


def hessian(
    fn: Callable[..., Any],
    *,
    wrt: Filter = "params",
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
) -> Callable[..., Any]:
    """Compute the Hessian of a function, forward over reverse. Arguments and errors are those of `nnx.grad`.

    Returns:
      A function with the arguments of `fn` that returns the Hessian, or `(hessian, aux)`. The Hessian
      is a Partition of Partitions, or the result of `jax.hessian` for an argument without Refs.

    >>> import jax.numpy as jnp, nnx
    >>> w = nnx.Ref(jnp.array([1.0, 2.0]), "params")
    >>> nnx.hessian(lambda w: (w.value ** 3).sum())(w)[""][""].tolist()
    [[6.0, 0.0], [0.0, 12.0]]
    """
    options = (wrt, argnums, has_aux, holomorphic, False)
    return _jacobian("nnx.hessian", (jax.jacrev, jax.jacfwd), fn, options)
