"""The result of a body: new values, and the new structure if it has changed.

It is collected inside the trace and kept with the program. Outside, it is applied to the caller's
objects.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from typing import Any, NamedTuple

import jax

import refx.ref as ref_module
from nnx.transforms.body import Body
from nnx.transforms.call import Call, Values, arrays_of, unlabelled
from nnx.transforms.homes import kept
from nnx.transforms.layout import Layout
from nnx.transforms.untouched import reachable
from refx import Node, Ref, ValueTypeError, opened
from refx.access import is_input
from refx.build import build
from refx.dagdef import DagDef, Leaf, NodeDef, Tree, ref_numbers
from refx.frame import Frame, local
from refx.node import is_identity
from refx.partition import Path, dotted
from refx.walk import Walk, walk

__all__: list[str] = []


class StructureChange(NamedTuple):
    """The new structure after a call, if it did more than write values.

    `dagdef` is the structure of `(roots, output, dropped containers)`. For objects that the caller has
    already, `known` maps their numbers to those in the call's DagDef. `leaves` has, for each plain array,
    its number among the inputs, or None if the program returned it.
    """

    dagdef: DagDef
    known: dict[int, int]
    leaves: tuple[int | None, ...]
    # The caller's containers whose content has changed, by number in `dagdef`.
    rewritten: frozenset[int]
    # The numbers of the new Refs that the body itself placed on devices.
    placed: frozenset[int] = frozenset()

    def new(self) -> list[int]:
        """The numbers of the new Refs in `dagdef`, in order."""
        return [n for n in ref_numbers(self.dagdef) if n not in self.known]


class Spec(NamedTuple):
    """The result of a call without its values: the aux data of the output node."""

    written: tuple[int, ...]
    graph: StructureChange | None


class Packed:
    """The output of the pure function: a pytree whose aux data JAX keeps with the program.

    `out` is the user's output or, with a StructureChange, the values of new Refs and arrays.
    """

    __slots__ = ("out", "spec", "written")

    def __init__(self, spec: Spec, out: Any, written: Any):
        self.spec = spec
        self.out = out
        self.written = written

    def values(self) -> dict[int, Any]:
        """The written values, by the number of the Ref."""
        return dict(zip(self.spec.written, self.written, strict=True))

    def united(self, numbers: Iterable[int], before: Values) -> list[Any]:
        """The values of these Refs after the call, whether or not they were written."""
        written = self.values()
        return [written[i] if i in written else before.refs[i] for i in numbers]


class _Key:
    """A key for a part of the output. That of the user's output is empty, so JAX says `result[0]`."""

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


class NewValues(NamedTuple):
    """The new Refs and the new plain arrays of a StructureChange, with their paths in `(roots, output)`."""

    new: list[tuple[Path, Ref[Any]]]
    arrays: list[tuple[Path, Any]]


def pack(body: Body, out: Any, after: Walk | None) -> tuple[Packed, NewValues]:
    """Pack the result of a body. `after` is a walk of its roots, or None if they are unchanged."""
    frame, layout, objects, leaves = body.frame, body.layout, body.objects, body.leaves
    body.note_found()
    inner_refs, written = body.refs, body.written()
    for i in written:
        _check_value(frame, layout.dagdef.ref_paths[i], inner_refs[i]._value)
    stays = {i for i in written if inner_refs[i] in frame.placed}
    new_values = kept(layout, written, [inner_refs[i]._value for i in written], stays)
    same = after is None or (
        after.dagdef is layout.dagdef
        and all(map(is_, after.objects, objects))
        and all(map(is_, after.leaves, leaves))
    )
    holds = opened.holds_identity(out)
    if same and not holds:
        return Packed(Spec(written, None), out, new_values), NewValues([], [])
    alias = {id(o): i for o, i in zip(body.outer, objects, strict=True)}
    # If the call is made in another body, code may reach a Ref by its name further out.
    ours = set(map(id, objects))
    names = frame.stand_ins.values()
    alias.update((id(s.ref), s.inner) for s in names if id(s.inner) in ours)
    gone = () if after is None else _let_go(layout, after, objects)
    both = walk((body.roots, out, gone), alias, skip=2)
    strangers = [x for x in both.objects if is_identity(x) and x._frame is not frame]
    if strangers:
        roots_of = [x for x in strangers if isinstance(x, Node)] or strangers
        body.call.found += [(x, x) for x in roots_of]
        return Packed(Spec((), None), None, []), NewValues([], [])
    numbers = {id(x): i for i, x in enumerate(objects)}
    came = {id(x): i for i, x in enumerate(leaves)}
    known = {n: numbers[id(x)] for n, x in enumerate(both.objects) if id(x) in numbers}
    positions = tuple(came.get(id(x)) for x in both.leaves)
    rewritten = frozenset() if same else _rewritten(both.dagdef, layout.dagdef, known, positions)
    placed = frozenset(
        n for n, x in enumerate(both.objects) if type(x) is Ref and x in frame.placed
    )
    graph = StructureChange(both.dagdef, known, positions, rewritten, placed)
    # The canonical paths begin with "0" in a root, with "1" in the output, and with "2" in a container
    # that a root has dropped.
    paths = dict(zip(map(id, both.refs), both.dagdef.ref_paths, strict=True))
    new = [(paths[id(r)], r) for r in both.refs if id(r) not in numbers]
    arrays = [
        (path, x)
        for path, x in zip(both.dagdef.leaf_paths, both.leaves, strict=True)
        if id(x) not in came
    ]
    for path, x in [(path, r._value) for path, r in new] + arrays:
        _check_value(frame, path, x)
    values = [r._value for _, r in new], [x for _, x in arrays]
    return Packed(Spec(written, graph), values, new_values), NewValues(new, arrays)


def _check_value(frame: Frame, path: Path, value: Any) -> None:
    """Raise if a program cannot return a value that leaves a body."""
    wrong = next((x for x in jax.tree.leaves(value) if not is_input(x)), None)
    if wrong is not None:
        where = dotted(path[1:]) or "itself"
        raise ValueTypeError(
            f"{frame.name} leaves a {type(wrong).__name__} in the Ref or array {where!r}: {wrong!r:.60}. A "
            f"program returns only arrays and numbers. Set it outside of the transformation, or keep it in "
            f"an ordinary attribute."
        )


def _let_go(layout: Layout, after: Walk, objects: list[Any]) -> tuple[list[Any], ...]:
    """For each root, the containers that it held before and that no root holds now.

    The caller may hold them too, so changes inside them matter.
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
    """The objects that a body was given and whose content has changed, by their new numbers."""

    def then(child: Any) -> Any:
        """A child with the old numbers; None if it is new."""
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


def apply(call: Call, graph: StructureChange, new: list[Any], arrays: list[Any]) -> Any:
    objects = call.objects()
    existing = {n: objects[i] for n, i in graph.known.items()}
    given, came = iter(arrays), arrays_of(call.layout, call.values)
    leaves = [came[i] if i is not None else next(given) for i in graph.leaves]
    new = _born(graph, new)
    (_, out, _), built = build(
        graph.dagdef, new, leaves, existing=existing, rewritten=graph.rewritten
    )
    if local.frame is not None:
        local.frame.placed.update(built[n] for n in graph.placed)
    return out


def _born(graph: StructureChange, values: Iterable[Any]) -> list[Any]:
    """Pass the values of new Refs with metadata to `at_birth`, which may place them on devices.

    Values that the body itself placed stay where they are.
    """
    born = list(values)
    for i, n in enumerate(graph.new()):
        node = graph.dagdef.nodes[n]
        if node.metadata and ref_module.at_birth is not None and n not in graph.placed:
            facts = {name: fact.value for name, fact in node.metadata}
            born[i] = ref_module.at_birth(born[i], node.collection.value, facts)
    return born


def fresh_output(call: Call, packed: Packed, values: Values) -> Any:
    """The output with value semantics: modules that came in come out as copies with the new values.

    `values` are the values that came in, or `ShapeDtypeStruct`s for them.
    """
    graph = packed.spec.graph
    if graph is None:
        return packed.out
    values = unlabelled(call.layout, values)
    for i, value in zip(packed.spec.written, packed.written, strict=True):
        values.refs[i] = value
    numbers = ref_numbers(call.layout.dagdef)
    ref_at = {n: i for i, n in enumerate(numbers)}
    new, more = map(iter, packed.out)
    new = iter(_born(graph, new))
    refs = [
        values.refs[ref_at[graph.known[n]]] if n in graph.known else next(new)
        for n in ref_numbers(graph.dagdef)
    ]
    given = values.plain_arrays
    arrays = [given[i] if i is not None else next(more) for i in graph.leaves]
    return build(graph.dagdef, refs, arrays)[0][1]
