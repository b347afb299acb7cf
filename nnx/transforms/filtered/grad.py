"""`nnx.grad_filter` and `nnx.value_and_grad_filter`: gradients with value semantics, leaf by leaf."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import jax

from nnx._ambient import ambient
from nnx.transforms.axes import along, assign
from nnx.transforms.call import open_call
from nnx.transforms.callables import function_name, unbound
from nnx.transforms.filtered.leaves import is_inexact_array, says
from nnx.transforms.targets import DifferentiationError
from refx import clone, opened, split
from refx.buffers import dead_error, is_dead
from refx.node import is_identity

__all__ = ["grad_filter", "value_and_grad_filter"]


def value_and_grad_filter(
    fn: Callable[..., Any] | None = None,
    *,
    filter_fn: Callable[[Any], bool] | None = None,
    filter_tree: Any = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
) -> Callable[..., Any]:
    """Compute the value of a function and its gradient with respect to leaves of its arguments.

    Args:
      fn: a function that returns a scalar. It gets copies of the modules in its arguments.
      filter_fn: a function from leaf to bool that says whether to differentiate the leaf. With neither
        `filter_fn` nor `filter_tree`, all floating-point and complex arrays are differentiated.
      filter_tree: a pytree prefix of the argument (of a tuple of the arguments, if there are several)
        with bools that decide instead. In place of a bool, it may have a function from leaf to bool,
        or, for a module, a dict from filter to bool. If `filter_fn` is given too, a leaf is
        differentiated if both say so.
      argnums: the position of the argument to differentiate, or several positions. For a bound
        method, argument 0 is its module.
      has_aux: whether `fn` returns `(scalar, aux)`.

    Returns:
      A function that returns `(value, gradient)`, or `((value, aux), gradient)`. The gradient looks
      like the argument, with None for each leaf that is held constant. For a sequence of `argnums`
      it is a tuple. A shared Ref has one gradient, the sum over its uses.

    Raises:
      DifferentiationError: no leaf is selected, the function does not return a scalar, or an argument
        does not exist.

    >>> import jax.numpy as jnp, nnx
    >>> value, grads = nnx.value_and_grad_filter(lambda p: p["w"] ** 2)({"w": jnp.array(3.0), "n": 1})
    >>> float(value), float(grads["w"]), grads["n"]
    (9.0, 6.0, None)
    """
    if fn is None:
        return functools.partial(
            value_and_grad_filter,
            filter_fn=filter_fn,
            filter_tree=filter_tree,
            argnums=argnums,
            has_aux=has_aux,
        )
    return _gradient("nnx.value_and_grad_filter", fn, filter_fn, filter_tree, argnums, has_aux)


def grad_filter(
    fn: Callable[..., Any] | None = None,
    *,
    filter_fn: Callable[[Any], bool] | None = None,
    filter_tree: Any = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
) -> Callable[..., Any]:
    """Compute only the gradient. Everything else is as for `value_and_grad_filter`.

    >>> import jax.numpy as jnp, nnx
    >>> frozen = {"a": False, "b": True}
    >>> loss = lambda p: p["a"] * p["b"]
    >>> nnx.grad_filter(loss, filter_tree=frozen)({"a": jnp.array(2.0), "b": jnp.array(3.0)})
    {'a': None, 'b': Array(2., dtype=float32, weak_type=True)}
    """
    if fn is None:
        return functools.partial(
            grad_filter,
            filter_fn=filter_fn,
            filter_tree=filter_tree,
            argnums=argnums,
            has_aux=has_aux,
        )
    both = _gradient("nnx.grad_filter", fn, filter_fn, filter_tree, argnums, has_aux)

    @functools.wraps(both)
    def gradient(*args: Any, **kwargs: Any) -> Any:
        value, grads = both(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return gradient


def _gradient(
    kind: str, fn: Any, filter_fn: Any, filter_tree: Any, argnums: Any, has_aux: bool
) -> Callable[..., Any]:
    inner, bound = unbound(fn)
    name = f"{kind}({function_name(fn)})"
    single = isinstance(argnums, int)
    numbers: tuple[int, ...] = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    if filter_fn is None and filter_tree is None:
        filter_fn = is_inexact_array

    @functools.wraps(inner)
    def value_and_gradient(*args: Any, **kwargs: Any) -> Any:
        args = bound + args
        if ambient.probe is not None:
            options = filter_fn, filter_tree, argnums, has_aux
            return ambient.probe.gradient_filter(kind, inner, args, kwargs, *options)
        wrong = [n for n in numbers if not -len(args) <= n < len(args)]
        if not args:
            raise DifferentiationError(f"{name} differentiates its first argument, but got none.")
        if wrong:
            raise DifferentiationError(
                f"{name} differentiates argument {wrong[0]}, but it was called with "
                f"{len(args)} positional arguments."
            )
        chosen = [n % len(args) for n in numbers]
        targets: Any = args[chosen[0]] if single else tuple(args[n] for n in chosen)
        leaves, treedef = jax.tree.flatten(targets)
        if any(map(is_dead, leaves)):
            split(targets)
            raise dead_error(f"{name} was called with an array whose buffer")
        mask = [True] * len(leaves)
        if filter_tree is not None:
            mask = _broadcast(filter_tree, targets, name)
        if filter_fn is not None:
            mask = [m and bool(filter_fn(leaf)) for m, leaf in zip(mask, leaves, strict=True)]
        if not any(mask):
            raise DifferentiationError(
                f"{name} has nothing to differentiate: none of the {len(leaves)} leaves of its "
                f"argument {argnums} is selected."
            )

        def loss(given: list[Any]) -> Any:
            todo = iter(given)
            flat = [next(todo) if m else x for m, x in zip(mask, leaves, strict=True)]
            parts = jax.tree.unflatten(treedef, flat)
            full = list(args)
            for n, part in zip(chosen, (parts,) if single else parts, strict=True):
                full[n] = part
            full, named = _copies((full, kwargs))
            return _checked(name, inner(*full, **named), has_aux)

        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(
            [x for m, x in zip(mask, leaves, strict=True) if m]
        )
        todo = iter(grads)
        gradient = jax.tree.unflatten(treedef, [next(todo) if m else None for m in mask])
        return ((value, aux) if has_aux else value), gradient

    return value_and_gradient


def _copies(tree: Any) -> Any:
    """Copy the modules of a tree, so that writes stay inside. Sharing is kept."""
    flat, treedef = opened.flatten(tree)
    cells = clone([x for x in flat if is_identity(x)])
    todo = iter(cells)
    return jax.tree.unflatten(treedef, [next(todo) if is_identity(x) else x for x in flat])


def _checked(name: str, out: Any, has_aux: bool) -> tuple[Any, Any]:
    if has_aux and (not isinstance(out, tuple) or len(out) != 2):
        raise DifferentiationError(
            f"With has_aux=True, the function of {name} must return (scalar, aux), but it "
            f"returned {type(out).__name__}."
        )
    loss: Any = out[0] if has_aux else out
    aux = out[1] if has_aux else None
    shape = getattr(loss, "shape", None)
    if shape != ():
        what = repr(loss) if shape is None else f"an array of shape {shape}"
        raise DifferentiationError(
            f"The function of {name} must return a scalar, but it returned {what}."
        )
    return loss, aux


def _broadcast(prefix: Any, tree: Any, name: str) -> list[bool]:
    """A bool for each leaf, from a pytree prefix. A module may have a dict from filter to bool."""
    mask: list[bool] = []

    def put(spec: Any, x: Any) -> None:
        mask.extend(says(spec, leaf, name) for leaf in jax.tree.leaves(x))

    # A dict is a prefix as in JAX, except at a module, where its keys are filters.
    holds = opened.holds_identity(tree)
    try:
        parts = along(tree, prefix, name, "its argument") if holds else [(tree, prefix, "")]
        for x, spec, _ in parts:
            if is_identity(x) and isinstance(spec, dict):
                for said, leaf in _by_filter(spec, x, name):
                    put(said, leaf)
            else:
                jax.tree.map(put, spec, x)
    except ValueError as error:
        raise DifferentiationError(
            f"The filter_tree of {name} is not a prefix of the argument to differentiate: {error}"
        ) from None
    return mask


def _by_filter(rules: dict[Any, Any], module: Any, name: str) -> Iterator[tuple[Any, Any]]:
    call = open_call((module,), {}, any_leaf=True)
    specs = assign(
        call, (module,), {}, (rules,), name=name, keyword=True, ambient=lambda path, ref: True
    )
    return zip(chain(*specs.values[:2]), chain(*call.values[:2]), strict=True)
