"""Branches: `nnx.cond` and `nnx.switch`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, TypeVarTuple

import jax
import jax.numpy as jnp

from nnx._ambient import ambient
from nnx.sharding.putting import spec_in_type
from nnx.transforms.boundary import abstractly, check_lifted, close_call, run, until_lifted
from nnx.transforms.call import Call, Roots, Values, open_call
from nnx.transforms.callables import function_name
from nnx.transforms.eager import compiled_once
from nnx.transforms.naming import named
from nnx.transforms.result import NewValues, Packed, Spec
from nnx.transforms.streams import counts
from refx import RefError
from refx.text import array_text

__all__ = ["BranchError", "cond", "switch"]


class BranchError(RefError, TypeError):
    """The branches leave different structures, shapes or dtypes behind."""


Ts = TypeVarTuple("Ts")
R = TypeVar("R")


def cond(
    pred: Any, true_fun: Callable[[*Ts], R], false_fun: Callable[[*Ts], R], *operands: *Ts
) -> R:
    """Apply `true_fun` to the operands if the scalar `pred` is true, else `false_fun`.

    The branches may read and write Refs in the operands and Refs that they close over. A Ref that only
    one branch writes keeps its value in the other.

    Raises:
      BranchError: the branches return different structures, give a Ref different shapes or dtypes,
        or change the structure of a module differently. The message names the Ref.

    >>> import jax.numpy as jnp, nnx
    >>> n = nnx.Ref(jnp.array(0), "counters")
    >>> def count(x):
    ...     n.value += 1
    ...     return x
    >>> float(nnx.cond(True, count, lambda x: -x, jnp.array(2.0))), int(n.value)
    (2.0, 1)
    """
    if ambient.probe is not None:
        call = lambda fns, *given: cond(pred, *fns, *given)  # noqa: E731
        return ambient.probe.switch(call, (true_fun, false_fun), operands)
    name = f"nnx.cond({function_name(true_fun)}, {function_name(false_fun)})"

    def impl(branches: Any, args: Any) -> Any:
        pred, *operands = args
        choose = lambda fns, *args: jax.lax.cond(pred, *fns, *args)  # noqa: E731
        return _branch(name, branches, tuple(operands), choose)

    plain = lambda: (true_fun if pred else false_fun)(*operands)  # noqa: E731
    return compiled_once(impl, name, (true_fun, false_fun), (pred, *operands), None, plain)


def switch(index: Any, branches: Sequence[Callable[[*Ts], R]], *operands: *Ts) -> R:
    """Apply `branches[index]` to the operands. `index` is clamped, as in `jax.lax.switch`.

    Everything else is as for `nnx.cond`.

    >>> import jax.numpy as jnp, nnx
    >>> n = nnx.Ref(jnp.array(0), "counters")
    >>> def add(k):
    ...     def branch():
    ...         n.value += k
    ...     return branch
    >>> nnx.switch(2, [add(1), add(10), add(100)])
    >>> int(n.value)
    100
    """
    if ambient.probe is not None:
        call = lambda fns, *given: switch(index, fns, *given)  # noqa: E731
        return ambient.probe.switch(call, tuple(branches), operands)
    name = f"nnx.switch({', '.join(map(function_name, branches))})"

    def impl(branches: Any, args: Any) -> Any:
        index, *operands = args
        choose = lambda fns, *args: jax.lax.switch(index, fns, *args)  # noqa: E731
        return _branch(name, branches, tuple(operands), choose)

    plain = lambda: branches[min(max(int(index), 0), len(branches) - 1)](*operands)  # noqa: E731
    return compiled_once(impl, name, tuple(branches), (index, *operands), None, plain)


def _branch(
    name: str,
    branches: tuple[Callable[..., Any], ...],
    operands: tuple[Any, ...],
    choose: Callable[..., Any],
) -> Any:
    def attempt(roots: Roots) -> Any:
        call = open_call(operands, {}, roots)

        def body(fn: Callable[..., Any], **options: Any) -> Callable[..., Packed]:
            return lambda values: run(
                fn, name, call, values, mode="read", runs_once=False, **options
            )

        # An abstract evaluation tells which Refs each branch writes. All branches must return every
        # Ref that any of them writes.
        found, drawn = zip(*[_learn(body, fn, call) for fn in branches], strict=True)
        check_lifted(call)
        union = tuple(sorted({i for packed in found for i in packed.spec.written}))
        _check(name, call, branches, list(found), union)
        # Later draws must not depend on which branch ran. So each stream advances by the most keys that
        # any branch draws, where the number is known in advance.
        moved = {
            i: call.values.refs[i] + max(d.get(i, 0) for d in drawn)
            for i in union
            if all(i in d or i not in p.spec.written for d, p in zip(drawn, found, strict=True))
        }
        returned = [i for i in union if i not in moved]

        def flat(fn: Callable[..., Any]) -> Callable[..., Any]:
            def branch(values: Values) -> Any:
                packed = body(fn)(values)
                return packed.out, packed.united(returned, values)

            return named(branch, fn, call)

        out, written = choose([flat(fn) for fn in branches], call.values)
        after = {**moved, **dict(zip(returned, written, strict=True))}
        packed = Packed(Spec(union, found[0].spec.graph), out, [after[i] for i in union])
        return close_call(call, packed)

    return until_lifted(attempt)


def _learn(
    body: Callable[..., Callable[..., Packed]], fn: Callable[..., Any], call: Call
) -> tuple[Packed, dict[int, int]]:
    """Evaluate a branch abstractly, and count the keys it draws from each stream, where it can be known."""
    streams = counts(call.layout.dagdef)
    drawn: dict[int, int] = {}

    def note(packed: Packed, outline: NewValues) -> Packed:
        for i, value in zip(packed.spec.written, packed.written, strict=True):
            if i in streams and type(value) is int:
                drawn[i] = value
        return packed

    def counted(values: Values) -> Packed:
        # A count that starts as a Python int stays one unless compiled code advances it.
        refs = [0 if i in streams else x for i, x in enumerate(values.refs)]
        return body(fn, finish=note)(values._replace(refs=refs))

    packed = abstractly(named(counted, fn, call), call.values)
    return packed, drawn


def _check(
    name: str,
    call: Call,
    branches: tuple[Callable[..., Any], ...],
    found: list[Packed],
    union: tuple[int, ...],
) -> None:
    first, label = found[0], function_name(branches[0])
    shapes = [p.values() for p in found]
    before = jax.eval_shape(lambda: call.values.refs)
    for packed, fn, written in zip(found[1:], branches[1:], shapes[1:], strict=True):
        if packed.spec.graph != first.spec.graph:
            raise BranchError(
                f"The branches of {name} leave different structures behind: {label} and "
                f"{function_name(fn)} change modules differently, or return different new ones. Make the "
                f"same change in both, or make it before the branch."
            )
        if jax.tree.structure(packed.out) != jax.tree.structure(first.out):
            raise BranchError(
                f"The branches of {name} return different structures: {label} returns "
                f"{jax.tree.structure(first.out)}, {function_name(fn)} returns "
                f"{jax.tree.structure(packed.out)}."
            )
        _check_same(name, "The output", label, first.out, function_name(fn), packed.out)
        for i in union:
            what = call.layout.name_of(i)
            mine, yours = shapes[0].get(i, before[i]), written.get(i, before[i])
            _check_same(name, what, label, mine, function_name(fn), yours)


def _check_same(name: str, what: str, a_label: str, a: Any, b_label: str, b: Any) -> None:
    if jax.tree.structure(a) != jax.tree.structure(b):
        raise BranchError(
            f"{what} of {name} has the structure {jax.tree.structure(a)} after {a_label} and "
            f"{jax.tree.structure(b)} after {b_label}. Both branches must leave the same."
        )
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        weak = getattr(x, "weak_type", False) or getattr(y, "weak_type", False)
        if x.shape != y.shape or (x.dtype != y.dtype and not weak):
            raise BranchError(
                f"{what} of {name} is {_text(x)} after {a_label} and {_text(y)} after {b_label}. "
                f"Both branches must leave the same shape and dtype; cast or reshape in one."
            )
        if (spec := spec_in_type(x)) != spec_in_type(y):
            raise BranchError(
                f"{what} of {name} is {jax.typeof(x)} after {a_label} and {jax.typeof(y)} after "
                f"{b_label}. Both branches must leave it sharded along the same Explicit axes: use "
                f"jax.sharding.reshard(x, {spec}) in one."
            )


def _text(x: Any) -> str:
    return array_text(x, jnp.dtype(x.dtype))
