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

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from nnx.scope import entered
from nnx.transforms.closure import Closure
from refx import Node, Ref
from refx.errors import StructureError
from refx.node import is_identity
from refx.partition import Path, dotted
from refx.snapshot import Snapshot, snapshot
from refx.structure import DagDef, RefDef, build, scan
from refx.trace import Frame, local, seen_from, writable

__all__: list[str] = []


class Lift(Exception):
    """Raised outside of every trace to start a call again with more roots."""


class Layout:
    """What a call looks like without its values: the static argument of the compiled function.

    Layouts are made once for each form and DagDef of a function and compared by identity.
    """

    __slots__ = (
        "closed",
        "compiled",
        "constants",
        "dagdef",
        "donated",
        "form",
        "has_scope",
        "shardings",
        "statics",
        "traced",
    )

    def __init__(
        self,
        dagdef: DagDef,
        form: Form,
        closed: int,
        constants: tuple[Any, ...],
        has_scope: bool,
        statics: Any,
    ):
        self.dagdef = dagdef
        self.form = form
        self.closed = closed
        # Array attributes of closed-over modules are read where they are, so they are constants.
        self.constants = constants
        self.has_scope = has_scope
        self.statics = statics
        # Whether a compiled function was traced for this layout, so that its closures are known.
        self.traced = False
        # What `nnx.jit` learned by that: its own program, and the Refs whose buffers it takes.
        self.compiled: Any = None
        self.donated: tuple[int, ...] = ()
        self.shardings: Any = None


class Plan(NamedTuple):
    """How the snapshots of several roots make up one list of Refs: by position, each Ref once."""

    layout: Layout
    refs: tuple[int, ...] | None
    leaves: tuple[int, ...] | None


class Call:
    """The caller's side of one call.

    `refs`, `values` and `leaves` are in the order of `layout.dagdef`; `others` are the arguments
    that hold no Refs. `roots` are the argument roots, the closed-over ones, and the scope, if any.
    `found` are pairs of a closed-over Ref that was met and the root to take for it.
    """

    __slots__ = (
        "at_once",
        "found",
        "layout",
        "leaves",
        "others",
        "refs",
        "roots",
        "snapshots",
        "values",
    )

    def __init__(
        self,
        layout: Layout,
        roots: list[Any],
        snapshots: list[Snapshot],
        refs: list[Ref[Any]],
        values: list[Any],
        leaves: list[Any],
        others: list[Any],
    ):
        self.layout = layout
        self.roots = roots
        self.snapshots = snapshots
        self.refs = refs
        self.values = values
        self.leaves = leaves
        self.others = others
        self.found: list[tuple[Any, Any]] = []
        # Whether every Ref may be written where the call was opened, with no need to ask each.
        self.at_once = False


def open_call(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    closure: Closure | Roots | None = None,
    plans: dict[Any, Plan] | None = None,
    statics: Any = None,
) -> Call:
    """Take the arguments of one call apart. `plans` is a function's cache of Plans."""
    form, roots, others = _take_roots(args, kwargs)
    scope = local.scope
    closed = closure.roots() if closure is not None else ()
    constants: tuple[Any, ...] = ()
    if closed or scope is not None:
        given = len(roots)
        roots = [*roots, *closed] if scope is None else [*roots, *closed, scope]
        constants = _constants([snapshot(root) for root in roots[given : given + len(closed)]])
    snapshots = [snapshot(root) for root in roots]
    # With one root, equal structure is enough; with more, which Refs they share matters too.
    shape = snapshots[0].dagdef if len(roots) == 1 else tuple([s.uid for s in snapshots])
    key = (form, shape, constants, scope is None, statics)
    plan = plans.get(key) if plans is not None else None
    if plan is None:
        layout = (form, len(closed), constants, scope is not None, statics)
        plan = _plan(layout, roots, snapshots, plans)
        if plans is not None:
            if len(plans) >= _MOST:
                plans.clear()
            plans[key] = plan
    at_once = all([s.writable() for s in snapshots])
    if len(roots) == 1:
        kept = snapshots[0]
        refs, leaves = kept.refs, kept.leaves()
        # What may be written here may be read here.
        values = [r._value for r in refs] if at_once else kept.values(roots[0])
    else:
        refs = _chosen([r for s in snapshots for r in s.refs], plan.refs)
        pairs = zip(snapshots, roots, strict=True)
        values = _chosen([v for s, root in pairs for v in s.values(root)], plan.refs)
        leaves = _chosen([x for s in snapshots for x in s.leaves()], plan.leaves)
    call = Call(plan.layout, roots, snapshots, refs, values, leaves, others)
    call.at_once = at_once
    if type(closure) is Roots:
        closure.call = call
    return call


class Form:
    """Where the roots are among the arguments: by number in the flattened arguments.

    Forms are interned, so that a key that holds one is hashed by its identity.
    """

    __slots__ = ("treedef", "where")

    def __init__(self, treedef: Any, where: tuple[int, ...]):
        self.treedef = treedef
        self.where = where


_forms: dict[tuple[Any, tuple[int, ...]], Form] = {}


# Filled only together with `_forms`, and emptied with it. The forms of calls whose arguments are
# so many roots and then single arrays or numbers.
_flat_forms: dict[tuple[type, ...], tuple[Form, int]] = {}
_SINGLE = frozenset({type(jnp.zeros(())), np.ndarray, bool, int, float, complex})


def _take_roots(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Form, list[Any], list[Any]]:
    types = tuple(map(type, args))
    known = _flat_forms.get(types) if not kwargs else None
    if known is not None:
        form, count = known
        return form, list(args[:count]), list(args[count:])
    flat, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_identity)
    where = tuple(i for i, x in enumerate(flat) if is_identity(x))
    rest = tuple(i for i, x in enumerate(flat) if not is_identity(x))
    if len(_forms) >= _MOST:
        _forms.clear()
        _flat_forms.clear()
    form = _forms.setdefault((treedef, where), Form(treedef, where))
    count = len(where)
    first, last = types[:count], types[count:]
    if not kwargs and all(issubclass(t, (Node, Ref)) for t in first) and _SINGLE.issuperset(last):
        _flat_forms[types] = form, count
    return form, [flat[i] for i in where], [flat[i] for i in rest]


# A bound for caches that ever new objects or types could fill; what is dropped is made again.
_MOST = 512


def _chosen(items: list[Any], positions: tuple[int, ...] | None) -> list[Any]:
    return items if positions is None else [items[i] for i in positions]


class _Same:
    """An array as part of a key: equal only to itself."""

    __slots__ = ("array",)

    def __init__(self, array: Any):
        # A tracer must not be kept, and is never the same in a later call.
        self.array = object() if isinstance(array, Tracer) else array

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.array is self.array

    def __hash__(self) -> int:
        return id(self.array)


def _constants(snapshots: list[Snapshot]) -> tuple[Any, ...]:
    return tuple(_Same(x) for s in snapshots for x in s.leaves())


def _plan(
    parts: tuple[Any, ...],
    roots: list[Any],
    snapshots: list[Snapshot],
    plans: dict[Any, Plan] | None,
) -> Plan:
    joint = scan(tuple(roots))
    refs = [id(r) for s in snapshots for r in s.refs]
    places = [place for s in snapshots for place in s.places()]
    joint_places = [
        (id(h), k) if h is not None else id(x)
        for x, (h, k) in zip(joint.leaves, joint.places, strict=True)
    ]
    layout = Layout(joint.dagdef, *parts)
    for known in plans.values() if plans is not None else ():
        if _same_layout(known.layout, layout):
            layout = known.layout
            break
    return Plan(
        layout,
        _positions(refs, [id(r) for r in joint.refs]),
        _positions(places, joint_places),
    )


def _same_layout(a: Layout, b: Layout) -> bool:
    names = ("dagdef", "form", "closed", "constants", "has_scope", "statics")
    return all(getattr(a, name) == getattr(b, name) for name in names)


def _positions(items: list[Any], chosen: list[Any]) -> tuple[int, ...] | None:
    if items == chosen:
        return None
    first: dict[Any, int] = {}
    for i, x in enumerate(items):
        first.setdefault(x, i)
    return tuple(first[x] for x in chosen)


class Graph(NamedTuple):
    """The structure that a call left behind, where it is more than new values.

    `dagdef` is that of `(roots, output)`. `known` maps its numbers to those of the call's DagDef
    for what the caller has already; `fresh` counts the Refs that are new; `leaves` says for each
    plain array whether it is the i-th that came in, or (None) one that was returned.
    """

    dagdef: DagDef
    known: dict[int, int]
    leaves: tuple[int | None, ...]
    # Whether the caller's containers have to be filled again.
    refill: bool


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


jax.tree_util.register_pytree_node(
    Packed,
    lambda p: ((p.out, p.written), p.spec),
    lambda spec, children: Packed(spec, *children),
)


class Outline(NamedTuple):
    """The new Refs and the new plain arrays of a Graph, with their paths in `(roots, output)`."""

    fresh: list[tuple[Path, Ref[Any]]]
    arrays: list[tuple[Path, Any]]


def run(
    fn: Callable[..., Any],
    name: str,
    call: Call,
    values: Any,
    leaves: Any,
    others: Any,
    *,
    layout: Layout | None = None,
    mode: str = "lift",
    split_out: Callable[[Any], tuple[Any, Any]] | None = None,
    finish: Callable[[Packed, Outline], Any] | None = None,
) -> Any:
    """Step 2 and 3: call `fn` on the roots built from `values`, and pack what it left behind.

    Args:
      fn: the user's function.
      name: the transformation and the function, for messages.
      call: the caller's side, for the closed-over Refs.
      values: a value for each Ref.
      leaves: a value for each plain array.
      others: the arguments that hold no Refs.
      layout: the static part of the call; that of `call` without it.
      mode: what reading a closed-over Ref means. `"lift"`: it must become a root. `"read"`: its
        value is taken as it is, since the trace is not kept, and only a written one becomes a
        root. `"constant"`: it may not be written.
      split_out: divides the output of `fn` in what is returned as it is and what is packed.
      finish: makes of the Packed what is to be returned, while the Refs still stand.

    Returns:
      A Packed, or what `finish` made of it; with `split_out` a pair of the first part and that.
    """
    layout = call.layout if layout is None else layout
    frame = Frame(name, lifts=mode == "lift", constants=mode == "constant")
    with frame:
        roots, objects = build(layout.dagdef, values, leaves)
        outer = scan(tuple(call.roots)).objects
        inner_refs = [x for x in objects if type(x) is Ref]
        before = [(r._value, jax.tree.leaves(r._value)) for r in inner_refs]
        _shadow(frame, layout, mode, outer, objects)
        frame.describe = _namer(layout.dagdef, outer, objects)
        try:
            args, kwargs = _arguments(layout, roots, others)
            scope = roots[-1] if layout.has_scope else None
            with entered(scope):
                out = fn(*args, **kwargs)
            first, out = split_out(out) if split_out is not None else (None, out)
            packed, outline = _pack(
                frame, layout, call, roots, objects, outer, before, leaves, out, mode
            )
            result = packed if finish is None else finish(packed, outline)
        except Exception:
            _note_found(frame, mode, call)
            raise
        finally:
            # What escaped must not keep a tracer alive, and says so when it is used.
            for ref in inner_refs:
                ref._value = None
            frame.close()
    return result if split_out is None else (first, result)


def _arguments(layout: Layout, roots: tuple[Any, ...], others: Any) -> Any:
    flat = list(others)
    for root, position in zip(roots, layout.form.where, strict=False):
        flat.insert(position, root)
    return jax.tree.unflatten(layout.form.treedef, flat)


def _shadow(frame: Frame, layout: Layout, mode: str, outer: list[Any], objects: list[Any]) -> None:
    # Whatever is a root is one cell, reached as an argument or by closure. A compiled program is
    # used again for other arguments, so there only what is closed over may be taken for a root.
    pairs = zip(outer, objects, strict=True)
    if mode == "lift":
        reach = reachable(
            layout.dagdef, range(len(layout.form.where), len(layout.form.where) + layout.closed)
        )
        pairs = ((o, i) for n, (o, i) in enumerate(zip(outer, objects, strict=True)) if n in reach)
    frame.shadow.update((o, i) for o, i in pairs if type(o) is Ref)


def reachable(dagdef: DagDef, roots: Iterable[int]) -> set[int]:
    todo = [dagdef.root.children[i] for i in roots]
    seen: set[int] = set()
    while todo:
        child = todo.pop()
        if type(child) is int:
            if child in seen:
                continue
            seen.add(child)
            child = dagdef.nodes[child]
        todo += getattr(child, "children", ())
    return seen


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
    for ref, owner in frame.found.items():
        if mode == "lift" or frame.shadow[ref]._value is not _outside(frame, ref):
            # A module that was made in the body may hold the Ref, but cannot be a root outside.
            call.found.append((ref, ref if owner is None or owner._frame is frame else owner))


def _outside(frame: Frame, ref: Ref[Any]) -> Any:
    return seen_from(frame.parent, ref)


def _pack(
    frame: Frame,
    layout: Layout,
    call: Call,
    roots: tuple[Any, ...],
    objects: list[Any],
    outer: list[Any],
    before: list[tuple[Any, list[Any]]],
    leaves: Any,
    out: Any,
    mode: str,
) -> tuple[Packed, Outline]:
    _note_found(frame, mode, call)
    inner_refs = [x for x in objects if type(x) is Ref]
    written = tuple(
        i
        for i, (ref, was) in enumerate(zip(inner_refs, before, strict=True))
        if _changed(ref, *was)
    )
    new_values = [inner_refs[i]._value for i in written]
    after = scan(roots)
    same = (
        after.dagdef is layout.dagdef
        and all(map(_is, after.objects, objects))
        and all(map(_is, after.leaves, leaves))
    )
    _check_closed_unchanged(call, layout, frame)
    holds = any(map(is_identity, jax.tree.leaves(out, is_leaf=is_identity)))
    if same and not holds:
        return Packed(Spec(written, None), out, new_values), Outline([], [])
    alias = {id(o): i for o, i in zip(outer, objects, strict=True)}
    both = scan((roots, out), alias)
    strangers = [x for x in both.objects if is_identity(x) and x._frame is not frame]
    if strangers:
        roots_of = [x for x in strangers if isinstance(x, Node)] or strangers
        call.found += [(x, x) for x in roots_of]
        return Packed(Spec((), None), None, []), Outline([], [])
    numbers = {id(x): i for i, x in enumerate(objects)}
    came = {id(x): i for i, x in enumerate(leaves)}
    graph = Graph(
        both.dagdef,
        {n: numbers[id(x)] for n, x in enumerate(both.objects) if id(x) in numbers},
        tuple(came.get(id(x)) for x in both.leaves),
        not same,
    )
    # The canonical paths begin with "0" for what hangs on a root and with "1" for the output.
    paths = dict(zip(map(id, both.refs), both.dagdef.ref_paths, strict=True))
    fresh = [(paths[id(r)], r) for r in both.refs if id(r) not in numbers]
    arrays = [
        (path, x)
        for path, x in zip(both.dagdef.leaf_paths, both.leaves, strict=True)
        if id(x) not in came
    ]
    values = [r._value for _, r in fresh], [x for _, x in arrays]
    return Packed(Spec(written, graph), values, new_values), Outline(fresh, arrays)


def _is(a: Any, b: Any) -> bool:
    return a is b


def _changed(ref: Ref[Any], value: Any, leaves: list[Any]) -> bool:
    if ref._value is not value:
        return True
    # A list or a dict in a Ref may have been changed in place.
    now = jax.tree.leaves(value)
    return len(now) != len(leaves) or not all(map(_is, now, leaves))


def _check_closed_unchanged(call: Call, layout: Layout, frame: Frame) -> None:
    start = len(layout.form.where)
    for root, kept in zip(
        call.roots[start : start + layout.closed],
        call.snapshots[start : start + layout.closed],
        strict=True,
    ):
        now = snapshot(root)
        if now.dagdef is not kept.dagdef or not all(map(_is, now.refs, kept.refs)):
            raise StructureError(
                f"The structure of a {type(root).__name__} that {frame.name} closes over was "
                f"changed inside it (something was added to a list or a dict of it, or removed). "
                f"That would happen once, while tracing. Pass the module as an argument; then "
                f"changes of its structure propagate."
            )


class Roots:
    """Closed-over roots for one call of a transformation that keeps nothing between calls."""

    def __init__(self) -> None:
        self._found: dict[int, Any] = {}
        self.call: Call | None = None

    def roots(self) -> tuple[Any, ...]:
        """The roots that were met so far."""
        return tuple(self._found.values())

    def grew(self) -> bool:
        """Take what the last call found; whether that was anything."""
        found = self.call.found if self.call is not None else []
        self._found.update((id(root), root) for _, root in found)
        return bool(found)


def until_lifted(attempt: Callable[[Roots], Any]) -> Any:
    """Call `attempt` with the roots that are known, again as long as it meets more of them."""
    roots = Roots()
    while True:
        try:
            return attempt(roots)
        except Exception:
            # An error may come of a root that was missing; if it does not, it comes again.
            if not roots.grew():
                raise


def check_lifted(call: Call) -> None:
    """Start the call again, if it met closed-over Refs that have to be roots."""
    if call.found:
        raise Lift


def close_call(call: Call, packed: Packed) -> Any:
    """Step 5: write the new values into the caller's Refs, and give the caller's output."""
    if call.found:
        raise Lift
    spec = packed.spec
    if spec.written:
        if call.at_once:
            # The old values are let go here, while the program that read them has hardly begun:
            # a few microseconds later it costs a third more.
            refs, call.values = call.refs, []
            for i, value in zip(spec.written, packed.written):
                refs[i]._value = value
        else:
            write_back([call.refs[i] for i in spec.written], packed.written)
    if spec.graph is None:
        return packed.out
    return _apply(call, spec.graph, *packed.out)


def write_back(refs: list[Ref[Any]], values: Iterable[Any]) -> None:
    """Write all values or, if one of the Refs may not be written here, none."""
    targets = [writable(ref) for ref in refs]
    for target, value in zip(targets, values, strict=True):
        target._value = value


def _apply(call: Call, graph: Graph, fresh: list[Any], arrays: list[Any]) -> Any:
    objects = scan(tuple(call.roots)).objects
    existing = {n: objects[i] for n, i in graph.known.items()}
    given = iter(arrays)
    leaves = [call.leaves[i] if i is not None else next(given) for i in graph.leaves]
    (_, out), _ = build(graph.dagdef, fresh, leaves, existing=existing, refill=graph.refill)
    return out


def fresh_output(call: Call, packed: Packed, values: list[Any], leaves: list[Any]) -> Any:
    """The output with value semantics: what came in comes out as a copy, with what was written.

    `values` and `leaves` are those that came in, or `ShapeDtypeStruct`s for them.
    """
    graph = packed.spec.graph
    if graph is None:
        return packed.out
    values = list(values)
    for i, value in zip(packed.spec.written, packed.written, strict=True):
        values[i] = value
    numbers = [n for n, node in enumerate(call.layout.dagdef.nodes) if type(node) is RefDef]
    ref_at = {n: i for i, n in enumerate(numbers)}
    new, more = map(iter, packed.out)
    refs = [
        values[ref_at[graph.known[n]]] if n in graph.known else next(new)
        for n, node in enumerate(graph.dagdef.nodes)
        if type(node) is RefDef
    ]
    arrays = [leaves[i] if i is not None else next(more) for i in graph.leaves]
    return build(graph.dagdef, refs, arrays)[0][1]
