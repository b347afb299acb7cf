"""What a custom derivative rule needs to know of the arguments of a call, and keeps without their values."""

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
    """A custom derivative rule that is missing, or that returns what does not fit its function."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _constant(x: Any, name: str) -> Any:
    """`x`, which may not be differentiated."""
    return x


@functools.partial(_constant.defjvp, symbolic_zeros=True)
def _(name: str, primals: Any, tangents: Any) -> Any:
    if any(not isinstance(t, jax.custom_derivatives.SymbolicZero) for t in tangents):
        raise CustomRuleError(
            f"{name} is differentiated with respect to one of its nondiff_argnums. Leave the argument "
            f"out of nondiff_argnums and give it a derivative in the rule, or pass "
            f"jax.lax.stop_gradient of it."
        )
    return primals[0], tangents[0]


class Fixed:
    """The arguments that are not differentiated. Their traced parts are separate inputs."""

    def __init__(self, args: list[Any], name: str):
        leaves, self._treedef = opened.flatten(args)
        self._where = [i for i, x in enumerate(leaves) if isinstance(x, Tracer)]
        # Given to JAX and not kept: JAX keeps the rules after the tracers have ended.
        self.traced = [_constant(leaves[i], name) for i in self._where]
        for i in self._where:
            leaves[i] = None
        self._leaves = leaves

    def whole(self, traced: list[Any]) -> list[Any]:
        """The arguments, with these for what is traced."""
        leaves = list(self._leaves)
        for i, x in zip(self._where, traced, strict=True):
            leaves[i] = x
        return jax.tree.unflatten(self._treedef, leaves)

    def without_values(self) -> Fixed:
        """The same, to be kept."""
        bare = copy.copy(self)
        bare.traced = []
        return bare


def forms_of(call: Call, args: tuple[Any, ...]) -> list[Target]:
    """What a rule needs to know of the arguments; it must not hold values of the call."""
    return [locate(call, args, number).without_values() for number in range(len(args))]


def cotangents_of(form: Target, given: Any, what: str) -> list[Any]:
    """A cotangent for each value of an argument, or None: given by path, or as the argument's pytree."""
    if given is None:
        return [None] * len(form.places)
    if form.treedef is not None:
        leaves, treedef = jax.tree.flatten(given)
        if treedef != form.treedef:
            leaves, treedef = jax.tree.flatten(given, is_leaf=lambda x: x is None)
        if treedef != form.treedef:
            raise CustomRuleError(
                f"{what} that has the structure {treedef}, but the argument has "
                f"{form.treedef}. Return None for an array without one."
            )
        return leaves
    values = by_path(given, what, CustomRuleError)
    known = [place.path for place in form.places]
    unknown = [path for path in values if path not in set(known)]
    if unknown:
        raise CustomRuleError(
            f"{what} at {listed(unknown)}, which it does not have; it has {listed(known)}."
        )
    return [values.get(path) for path in known]


def moving(form: Target) -> Target:
    """What of an argument has tangents other than zero; of one without Refs, everything."""
    if form.treedef is not None:
        return form
    places = [p for p in form.places if all(map(moves, jax.tree.leaves(p.value)))]
    return form._replace(places=places)


def closed_positions(call: Call) -> list[int]:
    """The positions of the values that hang on no argument."""
    given = {id(ref) for kept in call.snapshots[: len(call.layout.form.where)] for ref in kept.refs}
    alias = call.alias
    given |= {id(alias[i]) for i in given if i in alias}
    return [i for i, ref in enumerate(call.refs) if id(ref) not in given]
