"""`jax.export` of an `nnx.jit` function: a program that takes the user's arguments."""

from __future__ import annotations

from itertools import chain
from typing import Any

import jax

from nnx._ambient import ambient
from nnx.transforms.arguments import take_roots
from nnx.transforms.boundary import run
from nnx.transforms.call import Call, Values
from nnx.transforms.naming import program_name
from nnx.transforms.result import Spec, fresh_output
from refx import ReadOnlyError
from refx.partition import listed
from refx.snapshot import Snapshot, snapshot

__all__: list[str] = []


def exportable(fn: Any, name: str, call: Call, bound: int, args: Any, kwargs: Any) -> Any:
    """Trace a function of modules as a function of pytrees, whose only output is its return value.

    Args:
      fn: the user's function.
      name: its name in messages.
      call: a call with these arguments, in which everything that it closes over is known.
      bound: how many of the first roots belong to the function. They are constants of the program,
        like everything that it closes over.
      args: the arguments, without the static ones.
      kwargs: the keyword arguments.
    """
    given = list(chain.from_iterable(call.places()[bound : len(call.layout.form.where)]))
    refs, arrays = [_first([p.number for p in given if p.kind == kind]) for kind in (0, 1)]

    def exported(*args: Any, **kwargs: Any) -> Any:
        _, roots, arguments = take_roots(args, kwargs, any_leaf=False)
        found: list[Snapshot] = [snapshot(root) for root in roots]
        values = Values(
            _placed(call.values.refs, refs, [x for s in found for x in s.values()]),
            _placed(call.values.plain_arrays, arrays, [x for s in found for x in s.leaves()]),
            arguments,
        )
        outer, ambient.call = ambient.call, call
        try:
            packed = run(fn, name, call, values)
        finally:
            ambient.call = outer
        return fresh_output(call, packed, values)

    exported.__name__ = exported.__qualname__ = program_name(fn)
    return jax.jit(exported).trace(*args, **kwargs)


def _first(numbers: list[int]) -> dict[int, int]:
    """For each number, the position of its first occurrence."""
    return {n: i for i, n in reversed(list(enumerate(numbers)))}


def _placed(constants: list[Any], positions: dict[int, int], given: list[Any]) -> list[Any]:
    return [given[positions[i]] if i in positions else x for i, x in enumerate(constants)]


def check_pure(name: str, call: Call, spec: Spec) -> None:
    """Raise if a function writes Refs or changes a module, which an exported program cannot do."""
    changed = spec.graph is not None and bool(spec.graph.rewritten)
    if not spec.written and not changed:
        return
    check_draws_nothing(name, call, spec)
    paths = [call.layout.dagdef.ref_paths[i] for i in spec.written]
    what = f"writes {listed([path[1:] for path in paths])}" if paths else "changes a module"
    raise ReadOnlyError(
        f"{name} {what}, but an exported program has no Refs: it only returns the output of the function. "
        f"Pass the state in and out: pure, state = nnx.functional(fn, model), and then "
        f"jax.export.export(jax.jit(pure))(state, ...). Or call model.eval() first."
    )


def check_draws_nothing(name: str, call: Call, spec: Spec) -> None:
    """Raise if a function draws keys from the scope around it."""
    paths = [call.layout.dagdef.ref_paths[i] for i in spec.written]
    scope = str(len(call.roots) - 1) if call.layout.has_scope else None
    if any(path[0] == scope for path in paths):
        raise ReadOnlyError(
            f"{name} draws keys from the scope around it, but an exported program cannot advance that: it "
            f"would draw the same keys in each call. Pass a key as an argument, and use it in the "
            f"function: `with nnx.scope(key):`, or model.apply(rngs=key)(x)."
        )
