"""What is differentiated: the values that a filter selects of one argument, taken out and put back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnx.transforms.call import Call
from refx import Filter, Partition, RefError, ShapeError, UnknownPathError
from refx.node import is_identity
from refx.partition import dotted, listed
from refx.snapshot import snapshot

__all__ = ["DifferentiationError"]


class DifferentiationError(RefError, TypeError):
    """What was to be differentiated is nothing that can be, or there is nothing of it."""


class Target:
    """What is differentiated of one argument: the places of it in the flat lists of the call.

    `refs`, `leaves` and `others` are pairs of a name and a position in the list of that name.
    """

    def __init__(self, restore: Callable[[dict[Any, Any]], Any], *, plain: bool = False):
        self.refs: list[tuple[Any, int]] = []
        self.leaves: list[tuple[Any, int]] = []
        self.others: list[tuple[Any, int]] = []
        # Whether the argument holds no Refs.
        self.plain = plain
        # Turns values by name into what the user gets for the argument.
        self.restore = restore

    def _places(self) -> tuple[list[tuple[Any, int]], ...]:
        return self.refs, self.leaves, self.others

    def take(self, *lists: list[Any]) -> Parts:
        """The values of the argument that are differentiated."""
        return Parts([x[i] for at, x in zip(self._places(), lists, strict=True) for _, i in at])

    def put(self, parts: Parts, *lists: list[Any]) -> None:
        """Put other values in their place."""
        todo = iter(parts.values)
        for at, x in zip(self._places(), lists, strict=True):
            for _, i in at:
                x[i] = next(todo)

    def named(self, parts: Parts) -> Any:
        """What the user gets: a Partition, or the argument's own structure."""
        names = [name for at in self._places() for name, _ in at]
        return self.restore(dict(zip(names, parts.values, strict=True)))

    def parts(self, name: str, given: Any, like: Parts) -> Parts:
        """The inverse of `named`, for a tangent: what is missing is zero."""
        if self.plain:
            return Parts(jax.tree.leaves(given))
        names = [n for at in self._places() for n, _ in at]
        values = dict(Partition(given or {}))
        for path in values:
            if path not in names:
                raise UnknownPathError(
                    f"{name} got a tangent for {dotted(path)!r}, which is not differentiated; "
                    f"wrt selects {listed(names)}."
                )
        result = []
        for path, primal in zip(names, like.values, strict=True):
            if path in values and _shapes(values[path]) != _shapes(primal):
                raise ShapeError(
                    f"{name} got a tangent of shape {_shapes(values[path])} for {dotted(path)!r}, "
                    f"whose shape is {_shapes(primal)}."
                )
            result.append(values.get(path, jax.tree.map(jnp.zeros_like, primal)))
        return Parts(result)


def _shapes(value: Any) -> Any:
    shapes = [(jnp.shape(x), str(jnp.result_type(x))) for x in jax.tree.leaves(value)]
    return shapes[0] if len(shapes) == 1 else shapes


class Parts:
    """The differentiated values of one argument: a pytree of its own, so that it can be told apart."""

    def __init__(self, values: list[Any]):
        self.values = values


jax.tree_util.register_pytree_node(
    Parts, lambda p: (p.values, None), lambda _, values: Parts(list(values))
)


def target(
    name: str,
    args: tuple[Any, ...],
    number: int,
    wrt: Filter,
    predicate: Callable[[Any, Any], bool],
    call: Call,
    allow_int: bool,
) -> Target:
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
        found = Target(lambda d: jax.tree.unflatten(treedef, list(d.values())), plain=True)
        found.others = [(i, start + i) for i in range(len(flat))]
        return found
    found = Target(lambda by_path: Partition(by_path))
    kept = snapshot(args[number])
    positions = {id(ref): i for i, ref in enumerate(call.refs)}
    alias = call.alias or {}
    for path, ref, value in zip(kept.dagdef.ref_paths, kept.refs, kept.values(), strict=True):
        if predicate(path, ref):
            _check_differentiable(name, path, value, allow_int)
            found.refs.append((path, positions[id(alias.get(id(ref), ref))]))
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
            (found.others if at[0] else found.leaves).append((path, at[1]))
    if not (found.refs or found.leaves or found.others):
        there = sorted({repr(ref.collection) for ref in kept.refs})
        raise DifferentiationError(
            f"{name} with wrt={wrt!r} has nothing to differentiate in argument {number}: its "
            f"collections are {', '.join(there) or 'none'}."
        )
    return found


def check_disjoint(name: str, numbers: Sequence[int], targets: list[Target]) -> None:
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
