"""The boundary: how a function over mutable Refs becomes a pure function for JAX, and back.

One call of any stateful transformation is the same five steps.

1. `open_call` finds the caller's roots (modules and Refs in the arguments, those that the function
   closes over, the ambient scope) and takes them apart into one DagDef and flat lists of values.
2. JAX calls `run` with traced values. It builds the roots again from fresh Refs in a new `Frame`,
   and calls the user's function.
3. What the function left behind is packed: its output, the values of the Refs that it wrote, and,
   only where the structure of the roots changed or the output holds Refs, a `Graph` of both.
4. JAX returns concrete values (or tracers of the enclosing transformation).
5. `close_call` writes them into the caller's Refs. Nothing of the caller's was touched before.

If the function met a Ref by closure that was not a root yet, step 3 notes it in `Call.found`; then
nothing is written, and the call starts again with that Ref as one more root. That is the one extra
trace that a closure may cost. (An exception through JAX would do it sooner, but JAX keeps what an
aborted trace closed over alive for ever.)
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
    """Step 2 and 3: call `fn` on the roots built from `values`, and pack what it left behind.

    Args:
      fn: the user's function.
      name: the transformation and the function, for messages.
      call: the caller's side, for the closed-over Refs.
      values: what JAX gives for the values of the call.
      layout: the static part of the call; that of `call` without it.
      mode: what reading a closed-over Ref means. `"lift"`: it must become a root. `"read"`: its
        value is taken as it is, since the trace is not kept, and only a written one becomes a
        root. `"constant"`: it may not be written.
      watch: the user's function, where `fn` is one of ours around it.
      runs_once: whether the body runs once for each call, and neither more often nor never.
      split_out: divides the output of `fn` in what is returned as it is and what is packed.
      finish: makes of the Packed what is to be returned, while the Refs still stand.

    Returns:
      A Packed, or what `finish` made of it; with `split_out` a pair of the first part and that.
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
                # The body runs again, and does then what it has done to the caller's containers.
                closed.restore()
            result = packed if finish is None else finish(packed, outline)
        except Exception as error:
            twice = closed.changed_by_two_names()
            closed.restore()
            body.note_found()
            if twice is None or isinstance(error, RefError):
                raise
            # What the body read by the other name was not there, or was what it had been.
            raise twice from error
        finally:
            # What escaped must not keep a tracer alive, and says so when it is used.
            for ref in body.refs:
                ref._value = None
            frame.close()
    return result if split_out is None else (first, result)


def label_stand_ins(layout: Layout, objects: list[Any]) -> None:
    """Make the stand-in of a label a label: plain jax programs in the body may read it."""
    if layout.labels:
        label(x for x in objects if type(x) is Ref)


def _arguments(layout: Layout, roots: tuple[Any, ...], others: Any) -> Any:
    flat = list(others)
    for root, position in zip(roots, layout.form.where, strict=False):
        flat.insert(position, root)
    return jax.tree.unflatten(layout.form.treedef, flat)


def _shadow(body: Body) -> None:
    frame, call, layout = body.frame, body.call, body.layout
    # Whatever is a root is one cell, reached as an argument or by closure. A compiled program is
    # used again for other arguments, so there only what is closed over may be taken for a root.
    pairs = list(zip(body.outer, body.objects, strict=True))
    if body.mode == "lift":
        given = len(layout.form.where)
        reach = reachable(layout.dagdef, range(given, given + layout.closed))
        pairs = [pair for n, pair in enumerate(pairs) if n in reach]
    stand_ins = frame.stand_ins
    stand_ins.update((o, StandIn(o, i)) for o, i in pairs if type(o) is Ref)
    # What stands for a Ref in the body around this one may be reached by that Ref's name. JAX runs
    # derivative rules late, when that body has ended, so a call may have kept the names.
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
    """Call `attempt` with the roots that are known, again as long as it meets more of them."""
    roots = Roots()
    while True:
        try:
            return attempt(roots)
        except Exception as error:
            # An error may come of a root that was missing; if it does not, it comes again.
            if not roots.grew():
                if roots.call is not None:
                    explain_deleted(error, "An nnx transformation", roots.call)
                raise shortened(error)  # noqa: B904 — it is the same one


def to_its_end(transform: Callable[[Callable[..., Any]], Any], fn: Callable[..., Any]) -> Any:
    """`transform(fn)`, where what `fn` raises is raised when `transform` has come to its end.

    JAX keeps the constants and the tracers of a trace that an exception ends, for ever. So the
    trace goes on, without an output, and nobody uses what comes of it.
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
    """What `fn` returns, as `jax.eval_shape` gives it."""
    return to_its_end(lambda pure: jax.eval_shape(pure, *args), fn)


def check_lifted(call: Call) -> None:
    """Start the call again, if it met closed-over Refs that have to be roots."""
    if call.found:
        raise Lift


def close_call(call: Call, packed: Packed) -> Any:
    """Step 5: write the new values into the caller's Refs, and give the caller's output."""
    if call.found:
        raise Lift
    spec = packed.spec
    if spec.graph is not None and spec.graph.rewritten:
        objects = call.objects()
        for n in spec.graph.rewritten:
            number = spec.graph.known[n]
            holders = [objects[number]]
            if not isinstance(holders[0], Node):
                # A list or a dict may change where the modules that it is a part of may.
                every = enumerate(call.roots)
                holders = [x for i, x in every if number in reachable(call.layout.dagdef, [i])]
            for holder in holders:
                if isinstance(holder, Node):
                    check_structure(holder, "The structure")
    if spec.written:
        if call.at_once:
            # The old values are let go here, while the program that read them has hardly begun:
            # a few microseconds later it costs a third more.
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
    """Write all values or, if one of the Refs may not be written here, none."""
    names = [None] * len(refs) if names is None else names
    targets = [writable(ref, name) for ref, name in zip(refs, names, strict=True)]
    for target, value in zip(targets, values, strict=True):
        put(target, value)
