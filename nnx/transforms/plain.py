"""Loops that run step by step in Python, for debugging a body under `jax.disable_jit()`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nnx.sharding.structure import stacked, without_axes
from refx import Partition, Ref, get_partition, merge, opened, split, to_predicate, update
from refx.dag import refs
from refx.node import is_identity

__all__: list[str] = []


def while_loop(cond_fun: Callable[[Any], Any], body_fun: Callable[[Any], Any], val: Any) -> Any:
    """`nnx.while_loop` without a compiled program."""
    while cond_fun(val):
        val = body_fun(val)
    return val


def fori_loop(lower: Any, upper: Any, body_fun: Callable[[Any, Any], Any], val: Any) -> Any:
    """`nnx.fori_loop` without a compiled program."""
    kind = jnp.asarray(lower).dtype
    for i in range(int(lower), int(upper)):
        val = body_fun(jnp.asarray(i, kind), val)
    return val


def scan(
    f: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any,
    size: int,
    reverse: bool,
    carried: Callable[[Any, Ref[Any]], bool],
) -> tuple[Any, Any]:
    """`nnx.scan` without a compiled program. `carried` says which Refs of `xs` are not sliced."""
    flat, treedef = opened.flatten(xs)
    modules = tuple([x for x in flat if is_identity(x)])
    dagdef, values = split(modules)
    cells = refs(modules)
    whole = {path for path, ref in cells.items() if carried(path[1:], ref)}
    now = dict(values)
    axes = [None if path in whole else 0 for path in cells]
    slice_def = without_axes("nnx.scan", dagdef, [values[path] for path in cells], axes, skip=1)
    after: dict[Any, list[Any]] = {path: [] for path in cells if path not in whole}
    written = set()
    ys: list[Any] = []
    for i in reversed(range(size)) if reverse else range(size):
        sliced = {
            path: value if path in whole else jax.tree.map(lambda x, i=i: x[i], value)
            for path, value in now.items()
        }
        parts = merge(slice_def, Partition(sliced))
        todo = iter(parts)
        arrays = (next(todo) if is_identity(x) else x[i] for x in flat)
        carry, y = f(carry, jax.tree.unflatten(treedef, arrays))
        ys.append(y)
        for path, ref in refs(parts).items():
            if ref.value is not sliced[path]:
                written.add(path)
            if path in whole:
                now[path] = ref.value
            else:
                after[path].append(ref.value)
    if reverse:
        ys.reverse()
        after = {path: steps[::-1] for path, steps in after.items()}
    stack = lambda *steps: jnp.stack(steps)  # noqa: E731
    update(
        modules,
        {p: now[p] if p in whole else jax.tree.map(stack, *after[p]) for p in written},
        strict=False,
    )
    return carry, _stacked(ys, stack)


def _stacked(ys: list[Any], stack: Callable[..., Any]) -> Any:
    together = jax.tree.map(stack, *ys)
    if not any(map(is_identity, jax.tree.leaves(ys[0], is_leaf=is_identity))):
        return together
    dagdef, one = split(ys[0])
    values = get_partition(together)
    return merge(stacked("nnx.scan", dagdef, list(one.values())[: len(dagdef.ref_paths)]), values)


def carried_by(axes: dict[Any, Any], carry: Any) -> Callable[[Any, Ref[Any]], bool]:
    """A predicate: whether the first filter in `axes` that selects a Ref says to carry it."""
    rules = [(to_predicate(filter), axis is carry) for filter, axis in axes.items()]

    def carried(path: Any, ref: Ref[Any]) -> bool:
        return next((is_carried for selects, is_carried in rules if selects(path, ref)), False)

    return carried
