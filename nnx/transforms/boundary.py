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

If the function met a Ref by closure that was no root yet, step 3 notes it in `Call.found`; then
nothing is written, and the call starts again with that Ref as one more root. That is the one extra
trace that a closure may cost. (An exception through JAX would do it sooner, but JAX keeps what an
aborted trace closed over alive for ever.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from operator import is_
from typing import Any, NamedTuple

import jax

import refx.ref as ref_module
from nnx._layer_names import RootNames
from nnx.scope import entered
from nnx.transforms.call import Call, Roots, Values, unlabelled
from nnx.transforms.donation import explain_deleted
from nnx.transforms.homes import kept
from nnx.transforms.layout import Layout
from nnx.transforms.tracebacks import shortened
from nnx.transforms.untouched import Untouched, check_arguments, check_found, reachable
from refx import Node, Ref, RefError, opened
from refx.access import check_structure, label, put, writable
from refx.build import build
from refx.dagdef import DagDef, Leaf, NodeDef, RefDef, Tree
from refx.frame import Frame, Original, StandIn, copy_containers, local
from refx.node import is_identity
from refx.partition import Path, dotted
from refx.walk import Walk, walk

__all__: list[str] = []


class Lift(Exception):
    """Raised outside of every trace to start a call again with more roots."""


class Graph(NamedTuple):
    """The structure that a call left behind, where it is more than new values.

    `dagdef` is that of `(roots, output, let go)`. `known` maps its numbers to those of the call's DagDef
    for what the caller has already; `new` counts the Refs that are new; `leaves` says for each
    plain array whether it is the i-th that came in, or (None) one that was returned.
    """

    dagdef: DagDef
    known: dict[int, int]
    leaves: tuple[int | None, ...]
    # The caller's containers that hold something else now, by their numbers in `dagdef`.
    rewritten: frozenset[int]
    # The numbers of the new Refs that the body put on devices itself.
    placed: frozenset[int] = frozenset()

    def new(self) -> list[int]:
        """The numbers of the new Refs in `dagdef`, in order."""
        nodes = enumerate(self.dagdef.nodes)
        return [n for n, node in nodes if type(node) is RefDef and n not in self.known]


class Spec(NamedTuple):
    """What a call left behind, without the values: the aux data of the output node."""

    written: tuple[int, ...]
    graph: Graph | None


class Packed:
    """The output of the pure function: a pytree whose aux data JAX keeps with the program.

    `out` is the user's output, or, with a graph, the values of new Refs and arrays.
    """

    __slots__ = ("out", "spec", "written")

    def __init__(self, spec: Spec, out: Any, written: Any):
        self.spec = spec
        self.out = out
        self.written = written

    def values(self) -> dict[int, Any]:
        """What was written, by the number of the Ref."""
        return dict(zip(self.spec.written, self.written, strict=True))

    def united(self, numbers: Iterable[int], before: Values) -> list[Any]:
        """The values of these Refs afterwards, whether or not they were written."""
        written = self.values()
        return [written[i] if i in written else before.refs[i] for i in numbers]


class _Key:
    """A part of the output in JAX's names: `result[0]` is that of the user's output."""

    def __init__(self, name: str):
        self.name = name

    def __str__(self) -> str:
        return self.name


_KEYS = _Key(""), _Key(".written")

jax.tree_util.register_pytree_with_keys(
    Packed,
    lambda p: (tuple(zip(_KEYS, (p.out, p.written), strict=True)), p.spec),
    lambda spec, children: Packed(spec, *children),
    lambda p: ((p.out, p.written), p.spec),
)


class Outline(NamedTuple):
    """The new Refs and the new plain arrays of a Graph, with their paths in `(roots, output)`."""

    new: list[tuple[Path, Ref[Any]]]
    arrays: list[tuple[Path, Any]]


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
    finish: Callable[[Packed, Outline], Any] | None = None,
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
        leaves = values.plain_arrays
        roots, objects = build(layout.dagdef, map(copy_containers, values.refs), leaves)
        label_stand_ins(layout, objects)
        outer = call.objects()
        inner_refs = [x for x in objects if type(x) is Ref]
        before = [Original(r._value) for r in inner_refs]
        closed = Untouched(
            fn if watch is None else watch, call, layout, objects, outer, runs_once=runs_once
        )
        _shadow(frame, call, layout, mode, outer, objects)
        frame.describe = _namer(layout.dagdef, outer, objects)
        frame.roots = RootNames(roots, call.roots)
        try:
            args, kwargs = _arguments(layout, roots, values.arguments)
            scope = roots[-1] if layout.has_scope else None
            with entered(scope):
                out = fn(*args, **kwargs)
            check_arguments(frame, (args, kwargs), roots[: len(layout.form.where)])
            check_found(frame)
            closed.check(frame)
            first, out = split_out(out) if split_out is not None else (None, out)
            packed, outline = _pack(
                frame, layout, call, roots, objects, outer, before, leaves, out, mode, assigned
            )
            if call.found:
                # The body runs again, and does then what it has done to the caller's containers.
                closed.restore()
            result = packed if finish is None else finish(packed, outline)
        except Exception as error:
            twice = closed.changed_by_two_names(frame)
            closed.restore()
            _note_found(frame, mode, call)
            if twice is None or isinstance(error, RefError):
                raise
            # What the body read by the other name was not there, or was what it had been.
            raise twice from error
        finally:
            # What escaped must not keep a tracer alive, and says so when it is used.
            for ref in inner_refs:
                ref._value = None
            frame.close()
    return result if split_out is None else (first, result)


def label_stand_ins(layout: Layout, objects: list[Any]) -> None:
    """Let what stands for a label be one: plain jax programs in the body may read it, too."""
    if layout.labels:
        label(x for x in objects if type(x) is Ref)


def _arguments(layout: Layout, roots: tuple[Any, ...], others: Any) -> Any:
    flat = list(others)
    for root, position in zip(roots, layout.form.where, strict=False):
        flat.insert(position, root)
    return jax.tree.unflatten(layout.form.treedef, flat)


def _shadow(
    frame: Frame, call: Call, layout: Layout, mode: str, outer: list[Any], objects: list[Any]
) -> None:
    # Whatever is a root is one cell, reached as an argument or by closure. A compiled program is
    # used again for other arguments, so there only what is closed over may be taken for a root.
    pairs = zip(outer, objects, strict=True)
    if mode == "lift":
        reach = reachable(
            layout.dagdef, range(len(layout.form.where), len(layout.form.where) + layout.closed)
        )
        pairs = ((o, i) for n, (o, i) in enumerate(zip(outer, objects, strict=True)) if n in reach)
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


def _note_found(frame: Frame, mode: str, call: Call) -> None:
    """Note the closed-over Refs that the body met and that have to be roots."""
    if mode == "constant":
        return
    for met in frame.met():
        if mode == "lift" or met.was_written(frame):
            # A module that was made in the body may hold the Ref, but cannot be a root outside.
            inside = met.owner is None or met.owner._frame is frame
            call.found.append((met.ref, met.ref if inside else met.owner))


def _pack(
    frame: Frame,
    layout: Layout,
    call: Call,
    roots: tuple[Any, ...],
    objects: list[Any],
    outer: list[Any],
    before: list[Original],
    leaves: Any,
    out: Any,
    mode: str,
    assigned: bool,
) -> tuple[Packed, Outline]:
    _note_found(frame, mode, call)
    inner_refs = [x for x in objects if type(x) is Ref]
    written = tuple(
        i
        for i, (ref, was) in enumerate(zip(inner_refs, before, strict=True))
        if was.changed(ref._value) or (assigned and ref in frame.assigned)
    )
    stays = {i for i in written if inner_refs[i] in frame.placed}
    new_values = kept(layout, written, [inner_refs[i]._value for i in written], stays)
    after = walk(roots, skip=1)
    same = (
        after.dagdef is layout.dagdef
        and all(map(is_, after.objects, objects))
        and all(map(is_, after.leaves, leaves))
    )
    holds = opened.holds_identity(out)
    if same and not holds:
        return Packed(Spec(written, None), out, new_values), Outline([], [])
    alias = {id(o): i for o, i in zip(outer, objects, strict=True)}
    # A Ref may go by the name that it has further out, where the call is made in another body.
    ours = set(map(id, objects))
    names = frame.stand_ins.values()
    alias.update((id(s.ref), s.inner) for s in names if id(s.inner) in ours)
    both = walk((roots, out, _let_go(layout, after, objects)), alias, skip=2)
    strangers = [x for x in both.objects if is_identity(x) and x._frame is not frame]
    if strangers:
        roots_of = [x for x in strangers if isinstance(x, Node)] or strangers
        call.found += [(x, x) for x in roots_of]
        return Packed(Spec((), None), None, []), Outline([], [])
    numbers = {id(x): i for i, x in enumerate(objects)}
    came = {id(x): i for i, x in enumerate(leaves)}
    known = {n: numbers[id(x)] for n, x in enumerate(both.objects) if id(x) in numbers}
    positions = tuple(came.get(id(x)) for x in both.leaves)
    rewritten = frozenset() if same else _rewritten(both.dagdef, layout.dagdef, known, positions)
    placed = frozenset(
        n for n, x in enumerate(both.objects) if type(x) is Ref and x in frame.placed
    )
    graph = Graph(both.dagdef, known, positions, rewritten, placed)
    # The canonical paths begin with "0" for what hangs on a root, with "1" for the output, and with
    # "2" for what a root has let go.
    paths = dict(zip(map(id, both.refs), both.dagdef.ref_paths, strict=True))
    new = [(paths[id(r)], r) for r in both.refs if id(r) not in numbers]
    arrays = [
        (path, x)
        for path, x in zip(both.dagdef.leaf_paths, both.leaves, strict=True)
        if id(x) not in came
    ]
    values = [r._value for _, r in new], [x for _, x in arrays]
    return Packed(Spec(written, graph), values, new_values), Outline(new, arrays)


def _let_go(layout: Layout, after: Walk, objects: list[Any]) -> tuple[list[Any], ...]:
    """For each root, the containers that it held and that no root holds now.

    The caller may hold them, too, so what the body changed in them counts.
    """
    still = set(map(id, after.objects))
    gone = {n for n, x in enumerate(objects) if type(x) is not Ref and id(x) not in still}
    lost: list[list[Any]] = []
    for root in range(len(layout.dagdef.root.children)):
        mine = gone and gone & reachable(layout.dagdef, [root])
        lost.append([objects[n] for n in sorted(mine)])
        gone = gone - mine
    return tuple(lost)


def _rewritten(
    after: DagDef, before: DagDef, known: dict[int, int], leaves: tuple[int | None, ...]
) -> frozenset[int]:
    """The objects that a body was given and that hold something else now, by their numbers after."""

    def then(child: Any) -> Any:
        """A child in the numbers before; None where it is new."""
        if type(child) is int:
            return known.get(child)
        if type(child) is Leaf:
            number = leaves[child.number]
            return None if number is None else Leaf(number)
        if type(child) is Tree:
            return child._replace(children=tuple(map(then, child.children)))
        return child

    found = []
    for n, i in known.items():
        node = after.nodes[n]
        if type(node) is NodeDef:
            node = node._replace(children=tuple(map(then, node.children)))
        if node != before.nodes[i]:
            found.append(n)
    return frozenset(found)


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
    return _apply(call, spec.graph, *packed.out)


def write_back(
    refs: list[Ref[Any]], values: Iterable[Any], names: Iterable[str | None] | None = None
) -> None:
    """Write all values or, if one of the Refs may not be written here, none."""
    names = [None] * len(refs) if names is None else names
    targets = [writable(ref, name) for ref, name in zip(refs, names, strict=True)]
    for target, value in zip(targets, values, strict=True):
        put(target, value)


def _apply(call: Call, graph: Graph, new: list[Any], arrays: list[Any]) -> Any:
    objects = call.objects()
    existing = {n: objects[i] for n, i in graph.known.items()}
    given = iter(arrays)
    leaves = [call.values.plain_arrays[i] if i is not None else next(given) for i in graph.leaves]
    new = _born(graph, new)
    (_, out, _), built = build(
        graph.dagdef, new, leaves, existing=existing, rewritten=graph.rewritten
    )
    if local.frame is not None:
        local.frame.placed.update(built[n] for n in graph.placed)
    return out


def _born(graph: Graph, values: Iterable[Any]) -> list[Any]:
    """The values of new Refs, where a library wants them, as their metadata may say.

    What the body put somewhere itself stays there.
    """
    born = list(values)
    for i, n in enumerate(graph.new()):
        node = graph.dagdef.nodes[n]
        if node.metadata and ref_module.at_birth is not None and n not in graph.placed:
            facts = {name: fact.value for name, fact in node.metadata}
            born[i] = ref_module.at_birth(born[i], node.collection.value, facts)
    return born


def fresh_output(call: Call, packed: Packed, values: Values) -> Any:
    """The output with value semantics: what came in comes out as a copy, with what was written.

    `values` are those that came in, or `ShapeDtypeStruct`s for them.
    """
    graph = packed.spec.graph
    if graph is None:
        return packed.out
    values = unlabelled(call.layout, values)
    for i, value in zip(packed.spec.written, packed.written, strict=True):
        values.refs[i] = value
    numbers = [n for n, node in enumerate(call.layout.dagdef.nodes) if type(node) is RefDef]
    ref_at = {n: i for i, n in enumerate(numbers)}
    new, more = map(iter, packed.out)
    new = iter(_born(graph, new))
    refs = [
        values.refs[ref_at[graph.known[n]]] if n in graph.known else next(new)
        for n, node in enumerate(graph.dagdef.nodes)
        if type(node) is RefDef
    ]
    given = values.plain_arrays
    arrays = [given[i] if i is not None else next(more) for i in graph.leaves]
    return build(graph.dagdef, refs, arrays)[0][1]
