"""`nnx.grad` and `nnx.value_and_grad`: gradients by filter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnx.transforms.boundary import Call, Roots, close_call, open_call, run, until_lifted
from nnx.transforms.jit import function_name, unbound
from refx import Filter, Partition, to_predicate
from refx.errors import RefError
from refx.node import is_identity
from refx.partition import dotted
from refx.snapshot import snapshot

__all__ = ["DifferentiationError", "grad", "value_and_grad"]


class DifferentiationError(RefError, TypeError):
    """What was to be differentiated is nothing that can be, or there is nothing of it."""


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
    name: str,
    fn: Callable[..., Any],
    wrt: Filter,
    argnums: int | Sequence[int],
    has_aux: bool,
    holomorphic: bool,
    allow_int: bool,
) -> Callable[..., Any]:
    inner, bound = unbound(fn)
    name = f"{name}({function_name(fn)})"
    single = isinstance(argnums, int)
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    predicate = to_predicate(wrt)

    @functools.wraps(inner)
    def value_and_gradient(*args: Any, **kwargs: Any) -> Any:
        args = bound + args

        def attempt(roots: Roots) -> Any:
            call = open_call(args, kwargs, roots)
            targets = [_target(name, args, n, wrt, predicate, call, allow_int) for n in numbers]
            _check_disjoint(name, numbers, targets)

            def loss(given: Any) -> Any:
                flat = list(call.values), list(call.leaves), list(call.others)
                for target, part in zip(targets, given, strict=True):
                    target.put(part, *flat)
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


class _Target:
    """What is differentiated of one argument: the places of it in the flat lists of the call.

    `refs`, `leaves` and `others` are pairs of a name and a position; `restore` turns the gradients
    by name into what the user gets.
    """

    def __init__(self, restore: Callable[[dict[Any, Any]], Any]):
        self.refs: list[tuple[Any, int]] = []
        self.leaves: list[tuple[Any, int]] = []
        self.others: list[tuple[Any, int]] = []
        self._restore = restore

    def take(self, *lists: list[Any]) -> list[list[Any]]:
        places = (self.refs, self.leaves, self.others)
        return [[x[i] for _, i in at] for at, x in zip(places, lists, strict=True)]

    def put(self, parts: Any, *lists: list[Any]) -> None:
        for at, part, x in zip((self.refs, self.leaves, self.others), parts, lists, strict=True):
            for (_, i), value in zip(at, part, strict=True):
                x[i] = value

    def named(self, parts: Any) -> Any:
        pairs = zip((self.refs, self.leaves, self.others), parts, strict=True)
        return self._restore({n: g for at, p in pairs for (n, _), g in zip(at, p, strict=True)})


def _target(
    name: str,
    args: tuple[Any, ...],
    number: int,
    wrt: Filter,
    predicate: Callable[[Any, Any], bool],
    call: Call,
    allow_int: bool,
) -> _Target:
    if not -len(args) <= number < len(args):
        raise DifferentiationError(
            f"{name} was to differentiate argument {number}, but it was called with {len(args)} "
            f"positional arguments."
        )
    number %= len(args)
    flat, treedef = jax.tree.flatten(args[number], is_leaf=is_identity)
    if not any(map(is_identity, flat)):
        before = jax.tree.leaves(args[:number], is_leaf=is_identity)
        start = sum(not is_identity(x) for x in before)
        target = _Target(lambda grads: jax.tree.unflatten(treedef, list(grads.values())))
        target.others = [(i, start + i) for i in range(len(flat))]
        return target
    target = _Target(lambda grads: Partition(grads))
    kept = snapshot(args[number])
    positions = {id(ref): i for i, ref in enumerate(call.refs)}
    for path, ref, value in zip(kept.dagdef.ref_paths, kept.refs, kept.values(), strict=True):
        if predicate(path, ref):
            _check_differentiable(name, path, value, allow_int)
            target.refs.append((path, positions[id(ref)]))
    taken: set[tuple[int, int]] = set()
    for path, leaf in zip(kept.dagdef.leaf_paths, kept.leaves(), strict=True):
        if predicate(path, leaf):
            _check_differentiable(name, path, leaf, allow_int)
            at = next(
                (k, i)
                for k, where in enumerate((call.leaves, call.others))
                for i, x in enumerate(where)
                if x is leaf and (k, i) not in taken
            )
            taken.add(at)
            (target.others if at[0] else target.leaves).append((path, at[1]))
    if not (target.refs or target.leaves or target.others):
        there = sorted({repr(ref.collection) for ref in kept.refs})
        raise DifferentiationError(
            f"{name} with wrt={wrt!r} has nothing to differentiate in argument {number}: its "
            f"collections are {', '.join(there) or 'none'}."
        )
    return target


def _check_disjoint(name: str, numbers: Sequence[int], targets: list[_Target]) -> None:
    owner: dict[int, int] = {}
    for number, target in zip(numbers, targets, strict=True):
        for path, position in target.refs:
            first = owner.setdefault(position, number)
            if first != number:
                raise DifferentiationError(
                    f"{name} was to differentiate {dotted(path)!r} twice: arguments {first} and "
                    f"{number} share it. Pass both in one argument, as a tuple; the gradient of a "
                    f"shared Ref is then the sum over its uses."
                )


def _check_differentiable(name: str, path: Any, value: Any, allow_int: bool) -> None:
    for leaf in jax.tree.leaves(value):
        dtype = getattr(leaf, "dtype", None) or jnp.result_type(leaf)
        if not (allow_int or jnp.issubdtype(dtype, jnp.inexact)):
            raise DifferentiationError(
                f"{name} cannot differentiate {dotted(path)!r}: its dtype is {dtype}, and only "
                f"floating-point values have gradients. Choose a wrt that leaves it out, as "
                f"nnx.All(..., nnx.Not(...)), or put it in a collection of its own."
            )
