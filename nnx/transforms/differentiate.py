"""The engine of all derivatives: make a function of modules a function of the values to differentiate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from nnx._ambient import ambient
from nnx.transforms.boundary import close_call, run, until_lifted
from nnx.transforms.call import Roots, open_call
from nnx.transforms.callables import function_name, unbound
from nnx.transforms.naming import named
from nnx.transforms.targets import DifferentiationError, Parts, moves, targets_of
from refx import Filter, Ref, get_partition, opened
from refx.node import is_identity

__all__: list[str] = []


def differentiate(
    kind: str,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    numbers: Sequence[int] | None,
    wrt: Filter,
    has_aux: bool,
    allow_int: bool,
    transform: Callable[..., tuple[Any, Any]],
    check: Callable[[str, Any], None] | None = None,
) -> tuple[Any, Any, Any]:
    """Open the boundary and let `transform` differentiate a function of Parts.

    Args:
      numbers: the arguments to differentiate, or None for all.
      transform: `transform(pure, parts, targets, name)` gets a pure function from the
        differentiated values to `(out, packed)`, and returns a result and `packed`.
      check: raises if the output cannot be differentiated. By default, any output can.

    Returns:
      The result; a function that maps the output that JAX saw to the caller's own; and the aux.
    """
    inner, bound = unbound(fn)
    name = f"{kind}({function_name(fn)})"
    args = bound + args
    if ambient.probe is not None:
        options = numbers, wrt, has_aux, allow_int, transform
        return ambient.probe.differentiate(kind, inner, args, kwargs, *options)

    def attempt(roots: Roots) -> Any:
        call = open_call(args, kwargs, roots)
        chosen = range(len(args)) if numbers is None else numbers
        targets = targets_of(
            name, args, chosen, wrt, call, allow_int=allow_int, all_args=numbers is None
        )
        holds: list[bool] = []

        def split_out(out: Any) -> tuple[Any, Any]:
            what = "out" if check is None else "scalar"
            out, aux = split_aux(name, out, what) if has_aux else (out, None)
            if check is not None:
                check(name, out)
            holds.append(opened.holds_identity(out))
            return (pure_of(out), (out, aux)) if holds[-1] else (out, aux)

        def pure(parts: list[Parts]) -> Any:
            values = call.values.copied()
            for t, part in zip(targets, parts, strict=True):
                t.put(part, values)
            return run(inner, name, call, values, mode="constant", split_out=split_out)

        parts = [t.take(call.values) for t in targets]
        result, packed = transform(named(pure, inner, call), parts, targets, name)
        closed = close_call(call, packed)
        if holds[-1]:
            return result, lambda _: closed[0], closed[1]
        return result, lambda out: out, closed

    return until_lifted(attempt)


def split_aux(name: str, out: Any, what: str) -> tuple[Any, Any]:
    """Split the output of a function with `has_aux` into the output and the aux."""
    if not isinstance(out, tuple) or len(out) != 2:
        raise DifferentiationError(
            f"With has_aux=True, the function of {name} must return ({what}, aux), but it "
            f"returned {type(out).__name__}."
        )
    return out


def pure_of(tree: Any) -> Any:
    """Replace each module or Ref in a tree by a Partition of its differentiable values."""

    def selects(path: Any, cell: Any) -> bool:
        return all(map(moves, jax.tree.leaves(cell.value if isinstance(cell, Ref) else cell)))

    return opened.map(lambda x: get_partition(x, selects) if is_identity(x) else x, tree)
