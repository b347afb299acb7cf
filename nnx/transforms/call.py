"""The caller's side of a call: take its arguments, closures and scope apart into flat lists.

Every call of a compiled function does this, so it must be quick. We remember the structure of each root
(`refx.snapshot`), and how to combine the structures of several roots (`Plan`).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

import jax
import numpy as np

from nnx._ambient import ambient
from nnx.scope import COMPILED
from nnx.transforms.arguments import take_roots
from nnx.transforms.closure import Closure
from nnx.transforms.layout import INPUT, Label, Layout, Plan, Plans, Signature, constants_of
from refx import Ref
from refx.access import is_input
from refx.buffers import CONCRETE
from refx.build import objects_of
from refx.dagdef import alone_in_tuple, numbers_in
from refx.frame import StandIn, local
from refx.node import is_array
from refx.partition import Path
from refx.snapshot import Snapshot, snapshot
from refx.trace import LABEL, trace_ref
from refx.walk import walk

__all__: list[str] = []


class Values(NamedTuple):
    """One item for each input of a call, such as its value, its axis or its position.

    There are three kinds of inputs: Refs and plain arrays of modules, both in the order of the DagDef,
    and arguments without Refs. Most transformations pass a `Values` to JAX and get one back.
    """

    refs: list[Any]
    plain_arrays: list[Any]
    arguments: list[Any]

    def copied(self) -> Values:
        """A copy with its own lists."""
        return Values(*map(list, self))

    def chosen(self, at: Values) -> Values:
        """The items at these positions."""
        return Values(*[[x[i] for i in numbers] for x, numbers in zip(self, at, strict=True)])

    def put(self, at: Values, new: Values) -> None:
        """Replace the items at these positions."""
        for x, numbers, items in zip(self, at, new, strict=True):
            for i, item in zip(numbers, items, strict=True):
                x[i] = item


class Place(NamedTuple):
    """A value of a call with its path in a root. `cell` is the Ref, or the array itself.

    `kind` is the number of its list in `Values`, and `number` its position there.
    """

    path: Path
    cell: Any
    value: Any
    kind: int
    number: int


class Call:
    """The caller's side of one call.

    `refs` and `values` are in the order of `layout.dagdef`. `roots` are the roots in the arguments, the
    closed-over ones, and the scope, if any. `found` has a `(ref, root)` pair for each closed-over Ref
    that the body read; `root` is the object that becomes an input.
    """

    __slots__ = (
        "__weakref__",
        "at_once",
        "entry",
        "filtered",
        "found",
        "layout",
        "loose",
        "refs",
        "repeats",
        "roots",
        "snapshots",
        "stand_ins",
        "values",
    )

    def __init__(
        self,
        layout: Layout,
        roots: list[Any],
        snapshots: list[Snapshot],
        refs: list[Ref[Any]],
        values: Values,
    ):
        self.layout = layout
        self.roots = roots
        self.snapshots = snapshots
        self.refs = refs
        self.values = values
        # The numbers of the Refs whose values do not have a chosen place; see `homes`.
        self.loose: tuple[int, ...] = ()
        self.found: list[tuple[Any, Any]] = []
        # Whether every Ref may be written where the call was opened, so no Ref needs its own check.
        self.at_once = False
        # The surrounding body's stand-ins for Refs from further out, if they matter: code may reach a
        # root by either name, and JAX may run derivative rules after that body has ended.
        self.stand_ins: dict[Ref[Any], StandIn] | None = None
        # The trace that made the call, for transformations whose body reads closed-over Refs directly.
        self.entry: Any = None
        # The static part and the inputs of a filtered program.
        self.filtered: Any = None
        # How often the body runs: the steps of a loop, the lanes of a batch.
        self.repeats = 1

    @property
    def alias(self) -> dict[int, Any]:
        """The stand-ins in the surrounding body, by the ids of the outer Refs."""
        return {id(ref): s.inner for ref, s in (self.stand_ins or {}).items()}

    def objects(self) -> list[Any]:
        """The caller's objects, by number in the DagDef."""
        if not self.stand_ins:
            found = objects_of(self.layout.dagdef, tuple(self.roots))
            if found is not None:
                return found
        return walk(tuple(self.roots), self.alias, skip=1).objects

    def places(self) -> list[list[Place]]:
        """For each root, the places of its Refs and then of its plain arrays."""
        dagdef, values = self.layout.dagdef, self.values
        found = []
        every = numbers_in(dagdef, [s.dagdef for s in self.snapshots])
        for own, (refs, arrays) in zip(self.snapshots, every, strict=True):
            numbers = [*((0, i) for i in refs), *((1, i) for i in arrays)]
            cells = zip(own.dagdef.paths, (*own.refs, *own.leaves()), numbers, strict=True)
            found.append([Place(path, x, values[k][i], k, i) for path, x, (k, i) in cells])
        return found

    def without_values(self) -> Call:
        """The same call for a body that JAX may keep, which must not keep the call's tracers alive."""
        bare = Call(self.layout, self.roots, self.snapshots, self.refs, Values([], [], []))
        bare.found = self.found
        bare.entry = self.entry
        bare.repeats = self.repeats
        bare.stand_ins = self.stand_ins
        return bare


def open_call(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    closure: Closure | Roots | None = None,
    plans: Plans | None = None,
    statics: Any = None,
    *,
    any_leaf: bool = False,
    abstract: bool | None = None,
) -> Call:
    """Take the arguments of one call apart.

    Args:
      args, kwargs: the arguments.
      closure: finds the roots that the function closes over.
      plans: the function's cache of Plans.
      statics: the static arguments.
      any_leaf: whether to accept arguments that JAX does not take.
      abstract: whether nothing is computed, so a ShapeDtypeStruct stands for an array. If False, it is
        a constant. If None, we assume that a call that was traced before has none.
    """
    form, roots, others = take_roots(args, kwargs, any_leaf)
    scope = ambient.scope
    if ambient.asked is not None:
        ambient.asked.add(COMPILED)
    closed = closure.roots() if closure is not None else ()
    constants: tuple[Any, ...] = ()
    if closed or scope is not None:
        given = len(roots)
        roots = [*roots, *closed] if scope is None else [*roots, *closed, scope]
        assert closure is not None or not closed
        known = [closure.snapshot(root) for root in closed] if closure is not None else []
        snapshots = [snapshot(root) for root in roots[:given]] + known
        if scope is not None:
            snapshots.append(snapshot(scope))
        constants = constants_of(known)
    else:
        snapshots = list(map(snapshot, roots))
    single = len(roots) == 1
    # With one root, equal structure is enough; with more, which Refs they share matters too.
    shape = snapshots[0].dagdef if single else tuple([s.uid for s in snapshots])
    frame = local.frame
    alias: dict[int, Any] | None = None
    stand_ins: dict[Ref[Any], StandIn] | None = {} if type(closure) is Roots else None
    if frame is not None and frame.stand_ins:
        foreign = any([s.frame is not frame for s in snapshots])
        if foreign or stand_ins is not None:
            # Copy these before the values are read, since that adds more stand-ins.
            stand_ins = dict(frame.stand_ins)
        if foreign:
            # A closed-over Ref and its stand-in in the body around this call are one cell.
            alias = {id(ref): s.inner for ref, s in frame.stand_ins.items()}
            shape = (shape, frame.uid, len(alias))
    rules = ambient.rules
    key = (form, shape, constants, scope is None, statics, rules)
    plan = plans.by_call.get(key) if plans is not None else None
    if plan is None:
        parts = form, len(closed), constants, scope is not None, statics, rules
        plan = _plan(parts, roots, snapshots, plans, alias)
        if plans is not None:
            plans.keep(key, plan, again=not single)
    if single and alias is None:
        (snap,) = snapshots
        refs, leaves, has_labels = snap.refs, snap.leaves(), snap.has_labels
        at_once = snap.writable()
        # Refs that may be written here may be read here.
        values = [r._value for r in refs] if at_once else snap.values(roots[0])
    else:
        at_once = all([s.writable() for s in snapshots])
        has_labels = any([s.has_labels for s in snapshots])
        refs = _chosen([r for s in snapshots for r in s.refs], plan.refs)
        if alias is not None:
            refs = [alias.get(id(r), r) for r in refs]
        pairs = zip(snapshots, roots, strict=True)
        values = _chosen([v for s, root in pairs for v in s.values(root)], plan.refs)
        leaves = _chosen([x for s in snapshots for x in s.leaves()], plan.leaves)
    layout = plan.layout
    if (
        has_labels
        or not (layout.traced and abstract is None)
        or (leaves and not _ARRAYS.issuperset(map(type, leaves)))
    ):
        layout, values, leaves = _labelled(layout, plans, refs, values, leaves, bool(abstract))
    call = Call(layout, roots, snapshots, refs, Values(values, leaves, others))
    call.at_once = at_once
    call.stand_ins = stand_ins
    if type(closure) is Roots:
        closure.call = call
        call.entry = trace_ref()
    return call


_ARRAYS = CONCRETE | {np.ndarray}


def _labelled(
    layout: Layout,
    plans: Plans | None,
    refs: list[Ref[Any]],
    values: list[Any],
    leaves: list[Any],
    abstract: bool,
) -> tuple[Layout, list[Any], list[Any]]:
    """Take out values that are not arrays: masks, axes, shapes and shardings are constants."""
    found: list[tuple[int, Label]] = []
    new, arrays = list(values), list(leaves)
    for i, (ref, x) in enumerate(zip(refs, values, strict=True)):
        if ref._trace is LABEL or not isinstance(x, jax.Array):
            _take_out(x, i, i, new, found, abstract, ref._trace is LABEL)
    for i, x in enumerate(leaves):
        if not isinstance(x, jax.Array):
            _take_out(x, i, -1 - i, arrays, found, abstract, not is_array(x))
    if not found:
        return layout, values, leaves
    return _layout(layout.signature._replace(labels=tuple(found)), plans), new, arrays


def _take_out(
    value: Any,
    i: int,
    number: int,
    values: list[Any],
    found: list[Any],
    abstract: bool,
    every: bool,
) -> None:
    """Replace constants in the i-th value by None: with `every` all leaves, else those JAX does not take."""

    def is_constant(x: Any) -> bool:
        if isinstance(x, jax.ShapeDtypeStruct):
            return not abstract
        return every or not is_input(x)

    flat, treedef = jax.tree.flatten(value)
    constant = list(map(is_constant, flat))
    if any(constant):
        kept = [x if c else INPUT for x, c in zip(flat, constant, strict=True)]
        found.append((number, Label(jax.tree.unflatten(treedef, kept))))
        inputs = [None if c else x for x, c in zip(flat, constant, strict=True)]
        values[i] = None if all(constant) else jax.tree.unflatten(treedef, inputs)


def unlabelled(layout: Layout, values: Values) -> Values:
    """The values with the constants of the program put back."""
    values = values.copied()._replace(plain_arrays=arrays_of(layout, values))
    for i, label in layout.labels:
        if i >= 0:
            values.refs[i] = label.put_back(values.refs[i])
    return values


def arrays_of(layout: Layout, values: Values) -> list[Any]:
    """The plain arrays of some values, with the constants of the program put back."""
    arrays = list(values.plain_arrays)
    for i, label in layout.labels:
        if i < 0:
            arrays[-1 - i] = label.put_back(arrays[-1 - i])
    return arrays


def _chosen(items: list[Any], positions: tuple[int, ...] | None) -> list[Any]:
    return items if positions is None else [items[i] for i in positions]


def _plan(
    parts: tuple[Any, ...],
    roots: list[Any],
    snapshots: list[Snapshot],
    plans: Plans | None,
    alias: dict[int, Any] | None,
) -> Plan:
    apart = None
    if len(roots) == 1 and alias is None:
        dagdef = alone_in_tuple(snapshots[0].dagdef)
        return Plan(_layout(Signature(dagdef, *parts), plans), None, None)
    if len(roots) > 1 and plans is not None and alias is None and _share_nothing(snapshots):
        # Then their own structures determine the joint structure, whichever objects they are.
        apart = (*parts, tuple([s.dagdef for s in snapshots]))
        known = plans.by_call.get(apart)
        if known is not None:
            return known
    joint = walk(tuple(roots), alias, skip=1)
    dagdef = joint.dagdef
    numbers = numbers_in(dagdef, [s.dagdef for s in snapshots])
    refs, leaves = _first([n for n, _ in numbers]), _first([n for _, n in numbers])
    plan = Plan(_layout(Signature(dagdef, *parts), plans), refs, leaves)
    if plans is not None and apart is not None:
        plans.keep(apart, plan)
    return plan


def _layout(signature: Signature, plans: Plans | None) -> Layout:
    return Layout(signature) if plans is None else plans.layout(signature)


def _share_nothing(snapshots: list[Snapshot]) -> bool:
    """Whether no two roots share a Ref, a module, a list or a dict."""
    seen: set[int] = set()
    # Take the largest last, because `isdisjoint` goes through the smaller of two sets.
    parts = sorted([s.identities for s in snapshots], key=len)
    for i, part in enumerate(parts):
        if not seen.isdisjoint(part):
            return False
        if i < len(parts) - 1:
            seen |= part
    return True


def _first(parts: Iterable[list[int]]) -> tuple[int, ...] | None:
    """The first position of each number in the joined parts; None if no number appears twice."""
    numbers = [*chain.from_iterable(parts)]
    first = {n: len(numbers) - 1 - i for i, n in enumerate(reversed(numbers))}
    return None if len(first) == len(numbers) else tuple(first[n] for n in range(len(first)))


class Roots:
    """Closed-over roots for one call of a transformation that keeps nothing between calls."""

    def __init__(self) -> None:
        self._found: dict[int, Any] = {}
        self.call: Call | None = None

    def roots(self) -> tuple[Any, ...]:
        """The roots that were found so far."""
        return tuple(self._found.values())

    def snapshot(self, root: Any) -> Snapshot:
        """The snapshot of one of the roots."""
        return snapshot(root)

    def grew(self) -> bool:
        """Add the roots that the last call found. Returns whether there were any new ones."""
        found = self.call.found if self.call is not None else []
        new = {id(root): root for _, root in found if id(root) not in self._found}
        self._found.update(new)
        return bool(new)
