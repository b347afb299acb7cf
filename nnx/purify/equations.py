"""How each kind of equation that holds programs passes parameters in and intermediates out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var
from jax.extend.core import primitives as jex

from nnx.purify.markers import prefix_of
from nnx.purify.rewrite import Call, Program, Rewriter, renewed, rule

__all__: list[str] = []


@functools.cache
def _blank() -> dict[str, Any]:
    """How jit describes an input or output that has no special settings."""
    return jax.make_jaxpr(jax.jit(lambda x: x))(0.0).eqns[0].params


@rule(jex.jit_p.name)
def _jit(r: Rewriter, eqn: JaxprEqn) -> JaxprEqn:
    closed, name = eqn.params["jaxpr"], eqn.params["name"]
    program = r.inside(closed.jaxpr, prefix_of(name), collect=r.collect)
    r.inherit(program)
    declared = [
        key for d in (program.sources, program.sinks) for key, site in d.items() if site.tokens
    ]
    if declared:
        r.count({Call(id(closed.jaxpr), r.prefix, name, declared[0].call): 1})
    (ins,) = r.inputs_for(program)
    outs = r.outputs_for(program)
    params = dict(eqn.params, jaxpr=program.closed(closed.consts))
    for key in ("in_shardings", "in_layouts", "donated_invars"):
        params[key] = _blank()[key] * len(ins) + tuple(params[key])
    for key in ("out_shardings", "out_layouts"):
        params[key] = tuple(params[key]) + _blank()[key] * len(outs)
    return _extended(eqn, ins, outs, params)


@rule(jex.scan_p.name)
def _scan(r: Rewriter, eqn: JaxprEqn) -> JaxprEqn:
    closed = eqn.params["jaxpr"]
    body = closed.jaxpr
    # An input with one more axis than in the body is sliced; an output is stacked.
    divided = _deeper(eqn.invars, body.invars)
    carried = len(eqn.outvars) - _deeper(eqn.outvars, body.outvars)
    program = r.inside(body, collect=r.collect)
    r.inherit(program)
    (ins,) = r.inputs_for(program)
    outs = r.outputs_for(program, eqn.params["length"])
    constant = len(ins) + len(eqn.invars) - divided - carried
    stacked = len(eqn.outvars) + len(outs) - carried
    params = dict(
        eqn.params,
        **_scan_numbers(constant, carried, divided, stacked),
        jaxpr=program.closed(closed.consts),
    )
    return _extended(eqn, ins, outs, params)


def _deeper(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    pairs = zip(outer, inner, strict=True)
    return sum(len(a.aval.shape) > len(b.aval.shape) for a, b in pairs)


@functools.cache
def _scan_numbers(constant: int, carried: int, divided: int, stacked: int) -> dict[str, Any]:
    """The parameters of a scan that count its inputs and outputs, under this JAX version's names."""

    def scan(consts: list[Any], init: list[Any], xs: list[Any]) -> Any:
        def body(carry: Any, x: Any) -> Any:
            total = sum(consts, 0.0)
            return [c + total for c in carry], [jnp.zeros(()) for _ in range(stacked)]

        return jax.lax.scan(body, init, xs, length=1)

    given = [0.0] * constant, [0.0] * carried, [jnp.zeros(1)] * divided
    (eqn,) = (e for e in jax.make_jaxpr(scan)(*given).eqns if e.primitive is jex.scan_p)
    return {name: eqn.params[name] for name in _NUMBERS if name in eqn.params}


# JAX before 0.12, and from 0.12 on.
_NUMBERS = ("num_consts", "num_carry", "ft_in", "ft_out")


@rule(jex.while_p.name)
def _while(r: Rewriter, eqn: JaxprEqn) -> JaxprEqn:
    p = eqn.params
    test, body = (r.inside(p[k].jaxpr) for k in ("cond_jaxpr", "body_jaxpr"))
    # jax.linearize splits a loop into two copies.
    r.inherit(test, body, calls=False, where="while_loop")
    for_test, for_body = r.inputs_for(test, body)
    n, m = p["cond_nconsts"], p["body_nconsts"]
    invars = [
        *(*for_test, *eqn.invars[:n]),
        *(*for_body, *eqn.invars[n : n + m]),
        *eqn.invars[n + m :],
    ]
    params = dict(
        p,
        cond_jaxpr=test.closed(p["cond_jaxpr"].consts),
        body_jaxpr=body.closed(p["body_jaxpr"].consts),
        cond_nconsts=n + len(for_test),
        body_nconsts=m + len(for_body),
    )
    return eqn.replace(invars=invars, params=params)


@rule(jex.cond_p.name)
def _cond(r: Rewriter, eqn: JaxprEqn) -> JaxprEqn:
    branches = eqn.params["branches"]
    programs = [r.inside(b.jaxpr) for b in branches]
    # `lax.cond` keeps its functions in reverse order: the one for False comes first.
    order = programs[::-1] if len(programs) == 2 else programs
    r.inherit(*order, where="cond")
    shared = Program(programs[0].jaxpr, {k: s for p in order for k, s in p.sources.items()})
    (ins,) = r.inputs_for(shared)
    params = dict(
        eqn.params,
        branches=tuple(
            ClosedJaxpr(_widened(p, shared), b.consts)
            for p, b in zip(programs, branches, strict=True)
        ),
    )
    return eqn.replace(invars=[eqn.invars[0], *ins, *eqn.invars[1:]], params=params)


def _widened(program: Program, shared: Program) -> Any:
    """The program with inputs for all sources of `shared`, in that order."""
    own = iter(program.jaxpr.invars)
    of_key = {key: [next(own) for _ in site.spec.shapes] for key, site in program.sources.items()}
    front = []
    for key, site in shared.sources.items():
        front += of_key.get(key) or [Var(a) for a in site.spec.avals()]
    return renewed(program.jaxpr, [*front, *own])


@rule(jex.remat_p.name)
def _remat(r: Rewriter, eqn: JaxprEqn) -> JaxprEqn:
    program = r.inside(eqn.params["jaxpr"], collect=r.collect)
    # The backward pass holds a copy of the forward pass.
    r.inherit(program, calls=not eqn.params["differentiated"])
    (ins,) = r.inputs_for(program)
    outs = r.outputs_for(program)
    return _extended(eqn, ins, outs, dict(eqn.params, jaxpr=program.jaxpr))


@rule(jex.closed_call_p.name)
def _call(r: Rewriter, eqn: JaxprEqn) -> JaxprEqn:
    closed = eqn.params["call_jaxpr"]
    program = r.inside(closed.jaxpr, collect=r.collect)
    r.inherit(program)
    (ins,) = r.inputs_for(program)
    outs = r.outputs_for(program)
    return _extended(eqn, ins, outs, dict(eqn.params, call_jaxpr=program.closed(closed.consts)))


@rule(jex.linear_solve_p.name)
def _linear_solve(r: Rewriter, eqn: JaxprEqn) -> JaxprEqn:
    lengths, jaxprs = eqn.params["const_lengths"], eqn.params["jaxprs"]
    rest = list(eqn.invars)
    invars, new_lengths, new_jaxprs = [], [], []
    for length, closed in zip(lengths, jaxprs, strict=True):
        ins: list[Any] = []
        if closed is not None:
            # The solver applies the matrix any number of times, and its transpose does so, too.
            program = r.inside(closed.jaxpr, shared=True)
            r.inherit(program, calls=False, rules=True, where="custom_linear_solve")
            (ins,) = r.inputs_for(program)
            closed = program.closed(closed.consts)
        invars += [*ins, *rest[:length]]
        del rest[:length]
        new_lengths.append(length + len(ins))
        new_jaxprs.append(closed)
    params = dict(
        eqn.params, const_lengths=type(lengths)(*new_lengths), jaxprs=type(jaxprs)(*new_jaxprs)
    )
    return eqn.replace(invars=[*invars, *rest], params=params)


# JAX has no public name for this primitive.
@rule("shard_map")
def _shard_map(r: Rewriter, eqn: JaxprEqn) -> JaxprEqn:
    program = r.inside(eqn.params["jaxpr"])
    r.inherit(program, where="shard_map")
    (ins,) = r.inputs_for(program)
    # Every device has the whole of a parameter.
    specs = (jax.sharding.PartitionSpec(),) * len(ins) + tuple(eqn.params["in_specs"])
    return _extended(eqn, ins, [], dict(eqn.params, jaxpr=program.jaxpr, in_specs=specs))


def _extended(eqn: JaxprEqn, ins: list[Any], outs: list[Any], params: dict[str, Any]) -> JaxprEqn:
    return eqn.replace(invars=[*ins, *eqn.invars], outvars=[*eqn.outvars, *outs], params=params)
