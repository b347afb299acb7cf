"""The arguments of a custom derivative rule: their structure, which a rule keeps without the values."""

from __future__ import annotations

import copy
import functools
from typing import Any

import jax
from jax.core import Tracer

from nnx.transforms.call import Call
from nnx.transforms.targets import Target, by_path, locate, moves
from refx import RefError, opened
from refx.partition import listed

__all__ = ["CustomRuleError"]


class CustomRuleError(RefError, TypeError):
    """A custom derivative rule is missing, or its result does not fit the function."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _constant(x: Any, name: str) -> Any:
    """Return `x`, but raise if it is differentiated."""
    return x


@functools.partial(_constant.defjvp, symbolic_zeros=True)
def _(name: str, primals: Any, tangents: Any) -> Any:
    if any(not isinstance(t, jax.custom_derivatives.SymbolicZero) for t in tangents):
        raise CustomRuleError(
            f"{name} was differentiated with respect to an argument in nondiff_argnums. Leave it out of "
            f"nondiff_argnums and give it a derivative in the rule, or pass "
            f"jax.lax.stop_gradient(argument)."
        )
    return primals[0], tangents[0]


class Fixed:
    """The arguments in `nondiff_argnums`. Their traced parts are separate inputs."""

    def __init__(self, args: list[Any], name: str):
        leaves, self._treedef = opened.flatten(args)
        self._where = [i for i, x in enumerate(leaves) if isinstance(x, Tracer)]
        # Passed to JAX but never stored in a rule: JAX keeps the rules longer than the tracers live.
        self.traced = [_constant(leaves[i], name) for i in self._where]
        for i in self._where:
            leaves[i] = None
        self._leaves = leaves

    def whole(self, traced: list[Any]) -> list[Any]:
        """The arguments, with `traced` in place of their traced parts."""
        leaves = list(self._leaves)
        for i, x in zip(self._where, traced, strict=True):
            leaves[i] = x
        return jax.tree.unflatten(self._treedef, leaves)

    def without_values(self) -> Fixed:
        """A copy that holds no tracers, so that JAX may keep it."""
        bare = copy.copy(self)
        bare.traced = []
        return bare


def forms_of(call: Call, args: tuple[Any, ...]) -> list[Target]:
    """Describe the arguments for a rule, without the values of the call."""
    return [locate(call, args, number).without_values() for number in range(len(args))]


def cotangents_of(form: Target, given: Any, what: str) -> list[Any]:
    """A cotangent or None for each value of an argument. `given` is a mapping by path, or a pytree."""
    if given is None:
        return [None] * len(form.places)
    if form.treedef is not None:
        leaves, treedef = jax.tree.flatten(given)
        if treedef != form.treedef:
            leaves, treedef = jax.tree.flatten(given, is_leaf=lambda x: x is None)
        if treedef != form.treedef:
            raise CustomRuleError(
                f"{what} with the structure {treedef}, but the argument has "
                f"{form.treedef}. Return None for an array whose cotangent is zero."
            )
        return leaves
    values = by_path(given, what, CustomRuleError)
    known = [place.path for place in form.places]
    unknown = [path for path in values if path not in set(known)]
    if unknown:
        raise CustomRuleError(
            f"{what} at {listed(unknown)}, but the argument has only {listed(known)}."
        )
    return [values.get(path) for path in known]


def moving(form: Target) -> Target:
    """Keep the places whose tangents may be nonzero. An argument without Refs keeps all of them."""
    if form.treedef is not None:
        return form
    places = [p for p in form.places if all(map(moves, jax.tree.leaves(p.value)))]
    return form._replace(places=places)


def closed_positions(call: Call) -> list[int]:
    """The positions of the Refs that do not belong to any argument."""
    given = {id(ref) for kept in call.snapshots[: len(call.layout.form.where)] for ref in kept.refs}
    alias = call.alias
    given |= {id(alias[i]) for i in given if i in alias}
    return [i for i, ref in enumerate(call.refs) if id(ref) not in given]
