"""Functions with custom derivative rules: `jax.custom_jvp` and `jax.custom_vjp`.

A rule covers the arguments of its function, and a parameter is not one of them. So the function
gets its parameters as arguments, and two rules. Derivatives with respect to its arguments follow
the user's rule. Derivatives with respect to its parameters are those of its body. Markers in a rule
see the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var, jaxpr_as_fun
from jax.extend.core import primitives as jex

from nnx.purify.errors import MarkerError
from nnx.purify.rewrite import Key, Program, Rewriter, is_marked, rewrite, rule

__all__: list[str] = []


@rule(jex.custom_jvp_call_p.name, jex.custom_vjp_call_p.name)
def _custom(r: Rewriter, eqn: JaxprEqn) -> JaxprEqn:
    """The call of a function with a rule, changed to take the function's parameters first."""
    closed: ClosedJaxpr = eqn.params["call_jaxpr"]
    program = r.inside(closed.jaxpr)
    r.inherit(program, calls=False, rules=True)
    (ins,) = r.inputs_for(program)
    if r.collect and program.sinks:
        # Intermediates leave in another way, which the rule does not cover.
        reported = r.inside(closed.jaxpr, collect=True)
        body, count = jaxpr_as_fun(reported.closed(closed.consts)), len(closed.jaxpr.outvars)
        outs = r.outputs_for(reported)
        r.eqns.append(_jitted(eqn, lambda *xs: body(*xs)[count:], [*ins, *eqn.invars], outs))
    make = _with_jvp if eqn.primitive is jex.custom_jvp_call_p else _with_vjp
    call = make(_Function(eqn, program, closed, r.prefix))
    return _jitted(eqn, call, [*ins, *eqn.invars], eqn.outvars)


def _jitted(eqn: JaxprEqn, f: Callable[..., Any], invars: Any, outvars: Any) -> JaxprEqn:
    types = [
        jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type) for v in invars
    ]
    (made,) = jax.make_jaxpr(jax.jit(f))(*types).eqns
    return made.replace(
        invars=list(invars), outvars=list(outvars), source_info=eqn.source_info, ctx=eqn.ctx
    )


class _Function:
    """A function with a rule: the original with markers, and the version that takes its parameters."""

    def __init__(self, eqn: JaxprEqn, program: Program, closed: ClosedJaxpr, prefix: str):
        invars: list[Any] = [Var(v.aval) for v in eqn.invars]
        outvars: list[Any] = [Var(v.aval) for v in eqn.outvars]
        alone = Jaxpr([], invars, outvars, [eqn.replace(invars=invars, outvars=outvars)])
        self.marked = jaxpr_as_fun(ClosedJaxpr(alone, ()))
        self.body = jaxpr_as_fun(program.closed(closed.consts))
        self.keys = list(program.sources)
        self.sizes = [len(site.spec.shapes) for site in program.sources.values()]
        self.count = sum(self.sizes)
        self.prefix = prefix
        self.name = eqn.params["call_jaxpr"].jaxpr.debug_info.func_src_info

    def with_values(self, f: Callable[..., Any], values: Sequence[Any]) -> Callable[..., Any]:
        """`f`, which may hold markers, called with these parameters."""

        def call(*args: Any) -> Any:
            closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
            leaves = jax.tree.leaves(args)
            if is_marked(closed.jaxpr):
                program = rewrite(closed.jaxpr, self.prefix, shared=True)
                left = iter(values)
                known = {k: [next(left) for _ in range(n)] for k, n in zip(self.keys, self.sizes)}
                self._check(program, known)
                leaves = [v for key in program.sources for v in known[key]] + leaves
                closed = program.closed(closed.consts)
            out = jaxpr_as_fun(closed)(*leaves)
            return jax.tree.unflatten(jax.tree.structure(shape), out)

        return call

    def _check(self, program: Program, known: dict[Key, Any]) -> None:
        for key in program.sources:
            if key not in known:
                raise MarkerError(
                    f"{key.call} is called in a derivative rule of {self.name}, but the function "
                    "itself does not have that parameter. Call the marker in the function too, or "
                    "take the value as an argument."
                )


def _with_jvp(f: _Function) -> Callable[..., Any]:
    @jax.custom_jvp
    def call(*flat: Any) -> list[Any]:
        return f.body(*flat)

    def rule(primals: Any, tangents: Any) -> Any:
        values, args = primals[: f.count], list(primals[f.count :])
        by_value, value_dots = _moving(f.body, list(primals), tangents, range(f.count))
        outs = dots = None
        if value_dots:
            outs, dots = jax.jvp(by_value, value_dots[0], value_dots[1])
        by_arg, arg_dots = _moving(f.marked, args, tangents[f.count :], range(len(args)))
        if arg_dots:
            push = f.with_values(lambda x, t: jax.jvp(by_arg, x, t), values)
            outs, user = push(*arg_dots)
            dots = user if dots is None else [_plus(a, b) for a, b in zip(user, dots, strict=True)]
        return outs, dots

    call.defjvp(rule, symbolic_zeros=True)
    return call


def _moving(f: Callable[..., Any], args: list[Any], tangents: Any, among: Any) -> Any:
    """`f` as a function of its arguments that have tangents, with these arguments and their tangents."""
    where = [i for i in among if not isinstance(tangents[i], SymbolicZero)]

    def of(*moved: Any) -> Any:
        full = list(args)
        for i, x in zip(where, moved, strict=True):
            full[i] = x
        return f(*full)

    return of, (tuple(args[i] for i in where), tuple(tangents[i] for i in where)) if where else None


def _plus(a: Any, b: Any) -> Any:
    return a if a.dtype == jax.dtypes.float0 else a + b


def _with_vjp(f: _Function) -> Callable[..., Any]:
    @jax.custom_vjp
    def call(*flat: Any) -> list[Any]:
        return f.body(*flat)

    def forward(*flat: Any) -> Any:
        full = [x.value for x in flat]
        values, args = full[: f.count], full[f.count :]
        # Keep the mask in the structure of a pytree, because residuals must be arrays.
        mask = [() if x.perturbed else None for x in flat]
        where = [i for i, m in enumerate(mask[f.count :]) if m is not None]

        def of(*moved: Any) -> Any:
            complete = list(args)
            for i, x in zip(where, moved, strict=True):
                complete[i] = x
            return f.marked(*complete)

        outs, pull = f.with_values(lambda *xs: jax.vjp(of, *xs), values)(*[args[i] for i in where])
        # Only the derivative by the parameters needs the arguments.
        return outs, (pull, values, args if () in mask[: f.count] else None, mask)

    def backward(residuals: Any, cotangents: Any) -> Any:
        pull, values, args, mask = residuals
        cotangents = list(map(_instantiated, cotangents))
        found: list[Any] = [None] * len(mask)
        at = [i for i, m in enumerate(mask) if m is not None]
        by_arg = f.with_values(lambda p, c: p(c), values)(pull, cotangents)
        for i, x in zip([i for i in at if i >= f.count], by_arg, strict=True):
            found[i] = x
        if args is not None:
            _, back = jax.vjp(lambda *v: f.body(*v, *args), *values)
            found[: f.count] = back(cotangents)
        return tuple(found)

    call.defvjp(forward, backward, symbolic_zeros=True)
    return call


def _instantiated(cotangent: Any) -> Any:
    if not isinstance(cotangent, SymbolicZero):
        return cotangent
    aval: Any = cotangent.aval
    # Use NumPy, because JAX arrays cannot have the dtype of an integer's cotangent (float0).
    return (np if aval.dtype == jax.dtypes.float0 else jnp).zeros(aval.shape, aval.dtype)
