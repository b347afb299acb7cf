"""Floating point operations of a module call, from XLA's cost analysis of the lowered program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

import refx
from nnx._ambient import ambient
from nnx.rng import RngStream
from nnx.scope import Scope, entered
from nnx.show._calls import Call
from refx import Node, Partition, Ref, get_partition
from refx.text import is_arraylike

__all__ = ["Costs"]


class Costs:
    """The costs of module calls. Calls of equal modules with equal shapes are lowered once.

    Nothing is compiled. XLA counts the body of a loop once, so the other steps of loops of a known
    length (`scan`, `fori_loop`) are added here; a `while_loop` counts as one step.
    """

    def __init__(self) -> None:
        self._known: dict[Any, tuple[float, float] | None] = {}
        scope: Scope | None = ambient.scope
        self._flags = dict(scope.flags) if scope is not None else {}
        # Programs by the identity of their jaxpr, which is kept so that the id stays its own.
        self._bodies: dict[int, tuple[Any, float]] = {}

    def of(
        self, module: Node, call: Call, function: Callable[..., Any] | None, inputs: bool
    ) -> tuple[float, float] | None:
        """Operations forward, and forward and backward; None where there is no telling.

        Args:
          module: the module as it is in the model.
          call: a call of it.
          function: the method that was called, or None for `__call__`.
          inputs: whether the backward pass goes on to what is before the module.
        """
        if not all(map(is_arraylike, call.args.arrays)):
            # Called with modules of the model around it, it is no program by itself.
            return None
        dagdef, _ = refx.split(module)
        values = tuple(jax.tree.leaves(call.values))
        shapes = tuple((x.shape, str(x.dtype)) if is_arraylike(x) else x for x in values)
        key = (dagdef, shapes, call.args.key, function, inputs)
        if key not in self._known:
            try:
                self._known[key] = self._count(module, dagdef, call, function, inputs)
            except Exception:
                # A table without one figure is better than none: a module that was changed in the
                # call, say, cannot be called alone.
                self._known[key] = None
        return self._known[key]

    def _count(
        self, module: Node, dagdef: Any, call: Call, function: Any, inputs: bool
    ) -> tuple[float, float]:
        cells = refx.refs(module)
        # The plain arrays of the module, which are no Refs, and the Refs as the call had them.
        every = {**get_partition(module), **call.values}
        params = {p: v for p, v in every.items() if p in cells and _is_trained(cells[p], v)}
        rest = Partition({p: v for p, v in every.items() if p not in params})
        arrays = list(call.args.arrays)
        moving = [inputs and jnp.issubdtype(x.dtype, jnp.inexact) for x in arrays]
        fixed = [None if m else x for x, m in zip(arrays, moving, strict=True)]

        def forward(diff: Any, rest: Any, fixed: Any) -> Any:
            params, moved = diff
            stream = {"default": RngStream(jax.random.key(0))}
            with entered(Scope(stream, self._flags)):
                inner = refx.merge(dagdef, params, rest)
                given = [m if f is None else f for f, m in zip(fixed, moved, strict=True)]
                args, kwargs = call.args.restore(given)
                out = (
                    inner(*args, **kwargs) if function is None else function(inner, *args, **kwargs)
                )
            leaves = [x for x in jax.tree.leaves(out) if is_arraylike(x)]
            written = jax.tree.leaves(dict(get_partition(inner, refx.Not("params"))))
            inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]
            main = [x for x, i in zip(leaves, inexact, strict=True) if i]
            return main, [x for x, i in zip(leaves, inexact, strict=True) if not i] + written

        diff = (Partition(params), [x if m else None for x, m in zip(arrays, moving, strict=True)])
        closed, out = jax.make_jaxpr(forward, return_shape=True)(diff, rest, fixed)
        ahead = self._total(closed)
        if not jax.tree.leaves(diff) or not out[0]:
            return ahead, ahead

        again, count = jex_core.jaxpr_as_fun(closed), len(out[0])

        def both(diff: Any, rest: Any, fixed: Any, ct: Any) -> Any:
            # The program that there is already, which needs no Python of the modules.
            def flat(diff: Any) -> Any:
                outs = again(*jax.tree.leaves((diff, rest, fixed)))
                return outs[:count], outs[count:]

            main, pull, others = jax.vjp(flat, diff, has_aux=True)
            return main, others, pull(ct)

        return ahead, self._total(jax.make_jaxpr(both)(diff, rest, fixed, out[0]))

    def _total(self, closed: Any) -> float:
        known = self._bodies.get(id(closed))
        if known is None:
            fn = jex_core.jaxpr_as_fun(closed)
            shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars]
            analysis: Any = jax.jit(fn).lower(*shapes).cost_analysis()
            if isinstance(analysis, list | tuple):
                analysis = analysis[0]
            flops = float(analysis.get("flops", 0.0)) + self._loops(closed.jaxpr)
            known = self._bodies[id(closed)] = (closed, flops)
        return known[1]

    def _loops(self, jaxpr: Any) -> float:
        """What the steps of loops have to do that XLA did not count."""
        extra = 0.0
        for eqn in jaxpr.eqns:
            for inner in _inner(eqn.params):
                extra += self._loops(getattr(inner, "jaxpr", inner))
            if eqn.primitive.name == "scan":
                length, unroll = eqn.params["length"], max(int(eqn.params["unroll"]), 1)
                counted = length if unroll >= length else unroll + length % unroll
                if length > counted:
                    extra += (length - counted) * self._total(eqn.params["jaxpr"])
        return extra


def _is_trained(cell: Ref[Any], value: Any) -> bool:
    return cell.collection == "params" and all(
        is_arraylike(x) and jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(value)
    )


def _inner(params: Any) -> list[Any]:
    """The programs inside of an equation, whatever they are called."""
    found = []
    for value in params.values():
        for x in value if isinstance(value, tuple | list) else (value,):
            if hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns"):
                found.append(x)
    return found
