"""The boundary: turn a function over mutable Refs into a pure function for JAX, and back.

A call of any stateful transformation takes the same five steps.

1. `open_call` finds the caller's roots (the modules and Refs in the arguments and in the closure, and
   the ambient scope) and takes them apart into one DagDef and flat lists of values.
2. JAX calls `run` with traced values. It rebuilds the roots from fresh Refs in a new `Frame`, and
   calls the user's function.
3. `pack` packs the result: the output, and the values of the Refs that the function wrote. If the
   structure of the roots changed, or the output holds Refs, it adds a `StructureChange`.
4. JAX returns concrete values (or tracers of the enclosing transformation).
5. `close_call` writes them into the caller's Refs. Before this step, the caller's objects are untouched.

If the function read a closed-over Ref that is not a root yet, step 3 notes it in `Call.found`. Then
nothing is written, and the call starts again with that Ref as one more root. This is the one extra
trace that a closure may cost. (Raising an exception through JAX would be sooner, but JAX keeps
everything that an aborted trace closed over alive for ever.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax

from nnx._layer_names import RootNames
from nnx.scope import entered
from nnx.transforms.body import Body
from nnx.transforms.call import Call, Roots, Values, unlabelled
from nnx.transforms.donation import explain_deleted
from nnx.transforms.layout import Layout
from nnx.transforms.result import NewValues, Packed, apply, pack
from nnx.transforms.tracebacks import shortened
from nnx.transforms.untouched import Untouched, check_arguments, check_found, reachable
from refx import Node, Ref, RefError
from refx.access import check_structure, label, put, writable
from refx.build import build
from refx.dagdef import DagDef
from refx.frame import Frame, Original, StandIn, copy_containers, local
from refx.partition import dotted
from refx.walk import walk

__all__: list[str] = []


class Lift(Exception):
    """Raised outside of every trace to start a call again with more roots."""


def run(
    fn: Callable[..., Any],
    name: str,
    call: Call,
    values: Values,
    *,
    layout: Layout | None = None,
    mode: str = "lift",
    assigned: bool = False,
    watch: Callable[..., Any] | None = None,
    runs_once: bool = True,
    split_out: Callable[[Any], tuple[Any, Any]] | None = None,
    finish: Callable[[Packed, NewValues], Any] | None = None,
) -> Any:
    """Steps 2 and 3: call `fn` on the roots built from `values`, and pack the result.

    Args:
      fn: the user's function.
      name: the transformation and the function, for messages.
      call: the caller's side, for the closed-over Refs.
      values: the values of the call, from JAX.
      layout: the static part of the call. The default is that of `call`.
      mode: the rule for reading a closed-over Ref. `"lift"`: it must become a root. `"read"`: the body
        reads its value directly, because the trace is not kept; it becomes a root only if it is
        written. `"constant"`: it must not be written.
      assigned: whether a Ref counts as written even if it was assigned the value that it had.
      watch: the user's function, if `fn` is a wrapper of ours.
      runs_once: whether the body runs exactly once for each call.
      split_out: divides the output of `fn` into a part to return as it is and a part to pack.
      finish: converts the Packed while the Refs of the body still exist.

    Returns:
      A Packed, or the result of `finish`. With `split_out`, a pair of the first part and that.
    """
    layout = call.layout if layout is None else layout
    frame = Frame(
        name,
        lifts=mode == "lift",
        constants=mode == "constant",
        entry=None if mode == "lift" else call.entry,
        repeats=call.repeats,
    )
    with frame:
        if layout.labels:
            values = unlabelled(layout, values)
        refs = map(copy_containers, values.refs)
        roots, objects = build(layout.dagdef, refs, values.plain_arrays)
        label_stand_ins(layout, objects)
        outer = call.objects()
        before = [Original(x._value) for x in objects if type(x) is Ref]
        body = Body(
            frame, call, layout, roots, objects, outer, values.plain_arrays, before, mode, assigned
        )
        closed = Untouched(fn if watch is None else watch, body, runs_once=runs_once)
        _shadow(body)
        frame.describe = _namer(layout.dagdef, outer, objects)
        frame.roots = RootNames(roots, call.roots)
        try:
            args, kwargs = _arguments(layout, roots, values.arguments)
            scope = roots[-1] if layout.has_scope else None
            with entered(scope):
                out = fn(*args, **kwargs)
            check_arguments(frame, (args, kwargs), roots[: len(layout.form.where)])
            check_found(frame)
            closed.check()
            first, out = split_out(out) if split_out is not None else (None, out)
            after = None if closed.stands() else walk(roots, skip=1)
            packed, outline = pack(body, out, after)
            if call.found:
                # The body runs again and repeats its changes to the caller's containers.
                closed.restore()
            result = packed if finish is None else finish(packed, outline)
        except Exception as error:
            twice = closed.changed_by_two_names()
            closed.restore()
            body.note_found()
            if twice is None or isinstance(error, RefError):
                raise
            # The likely cause: the body changed a module under one name, and read it under the other.
            raise twice from error
        finally:
            # A Ref that escaped must not keep a tracer alive. Using it raises an error.
            for ref in body.refs:
                ref._value = None
            frame.close()
    return result if split_out is None else (first, result)


def label_stand_ins(layout: Layout, objects: list[Any]) -> None:
    """Turn stand-ins of labels into labels, because plain jax programs in the body may read them."""
    if layout.labels:
        label(x for x in objects if type(x) is Ref)


def _arguments(layout: Layout, roots: tuple[Any, ...], others: Any) -> Any:
    flat = list(others)
    for root, position in zip(roots, layout.form.where, strict=False):
        flat.insert(position, root)
    return jax.tree.unflatten(layout.form.treedef, flat)


def _shadow(body: Body) -> None:
    frame, call, layout = body.frame, body.call, body.layout
    # A Ref of a root is one cell, whether it is reached as an argument or by closure. But a compiled
    # program is reused for other arguments, so there this holds only for closed-over roots.
    pairs = list(zip(body.outer, body.objects, strict=True))
    if body.mode == "lift":
        given = len(layout.form.where)
        reach = reachable(layout.dagdef, range(given, given + layout.closed))
        pairs = [pair for n, pair in enumerate(pairs) if n in reach]
    stand_ins = frame.stand_ins
    stand_ins.update((o, StandIn(o, i)) for o, i in pairs if type(o) is Ref)
    # In the body around this one, a Ref may have a stand-in. Code here may reach it by either name. JAX
    # may run derivative rules after that body has ended, so the call may have kept the stand-ins.
    around = call.stand_ins
    if around is None:
        around = frame.parent.stand_ins if frame.parent is not None else {}
    for ref, known in around.items():
        if known.inner in stand_ins:
            stand_ins[ref] = stand_ins[known.inner]._replace(ref=ref)


def _namer(dagdef: DagDef, outer: list[Any], objects: list[Any]) -> Callable[[Any], str | None]:
    def name(ref: Any) -> str | None:
        refs = [i for i, x in enumerate(objects) if type(x) is Ref]
        for i, path in zip(refs, dagdef.ref_paths, strict=True):
            if objects[i] is ref or outer[i] is ref:
                return repr(dotted(path[1:])) if len(path) > 1 else "that was passed by itself"
        return None

    return name


def until_lifted(attempt: Callable[[Roots], Any]) -> Any:
    """Call `attempt` with the known roots, and repeat while it finds more of them."""
    roots = Roots()
    while True:
        try:
            return attempt(roots)
        except Exception as error:
            # A missing root may have caused the error. If not, the next attempt raises it again.
            if not roots.grew():
                if roots.call is not None:
                    explain_deleted(error, "An nnx transformation", roots.call)
                raise shortened(error)  # noqa: B904 — it is the same one


def to_its_end(transform: Callable[[Callable[..., Any]], Any], fn: Callable[..., Any]) -> Any:
    """Call `transform(fn)`, but raise an error of `fn` only after `transform` has finished.

    If an exception ends a trace, JAX keeps its constants and tracers alive for ever. So we let the trace
    finish without an output, and discard its result.
    """
    raised: list[Exception] = []

    @functools.wraps(fn)
    def pure(*args: Any) -> Any:
        try:
            return fn(*args)
        except Exception as error:
            raised.append(error)
            return None

    out = transform(pure)
    if raised:
        raise raised.pop()
    return out


def abstractly(fn: Callable[..., Any], *args: Any) -> Any:
    """Evaluate `fn` with `jax.eval_shape`."""
    return to_its_end(lambda pure: jax.eval_shape(pure, *args), fn)


def check_lifted(call: Call) -> None:
    """Start the call again if it met closed-over Refs that must become roots."""
    if call.found:
        raise Lift


def close_call(call: Call, packed: Packed) -> Any:
    """Step 5: write the new values into the caller's Refs, and return the output."""
    if call.found:
        raise Lift
    spec = packed.spec
    if spec.graph is not None and spec.graph.rewritten:
        objects = call.objects()
        for n in spec.graph.rewritten:
            number = spec.graph.known[n]
            holders = [objects[number]]
            if not isinstance(holders[0], Node):
                # A list or a dict may change if the modules that hold it may.
                every = enumerate(call.roots)
                holders = [x for i, x in every if number in reachable(call.layout.dagdef, [i])]
            for holder in holders:
                if isinstance(holder, Node):
                    check_structure(holder, "The structure")
    if spec.written:
        if call.at_once:
            # Release the old values now, when the program that reads them has hardly begun. A few
            # microseconds later, this costs a third more.
            refs = call.refs
            call.values.refs.clear()
            for i, value in zip(spec.written, packed.written):
                refs[i]._value = value
            if local.frame is not None:
                local.frame.assigned.update([refs[i] for i in spec.written])
        else:
            write_back([call.refs[i] for i in spec.written], packed.written)
    if spec.graph is None:
        return packed.out
    return apply(call, spec.graph, *packed.out)


def write_back(
    refs: list[Ref[Any]], values: Iterable[Any], names: Iterable[str | None] | None = None
) -> None:
    """Write all values, or none if one of the Refs must not be written here."""
    names = [None] * len(refs) if names is None else names
    targets = [writable(ref, name) for ref, name in zip(refs, names, strict=True)]
    for target, value in zip(targets, values, strict=True):
        put(target, value)
