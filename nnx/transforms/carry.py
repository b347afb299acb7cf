"""One call of a loop: find out which values are carried, sliced or constant."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx.sharding.putting import spec_in_type
from nnx.transforms.added_axis import of_slices
from nnx.transforms.axes import Specs
from nnx.transforms.boundary import abstractly, check_lifted, run, until_lifted
from nnx.transforms.call import Call, Roots, Values
from nnx.transforms.layout import Label
from nnx.transforms.naming import inputs_of, named
from nnx.transforms.result import Packed, Spec
from refx import RefError, StructureError, clone, merge, opened, split
from refx.access import is_input, is_label, write
from refx.frame import local
from refx.node import is_identity
from refx.partition import Path, dotted
from refx.snapshot import Snapshot
from refx.trace import LABEL
from refx.walk import walk

__all__ = ["CARRY", "CarryError"]


class CarryError(RefError, TypeError):
    """The carry of a loop changes its structure, shape or dtype, or mixes up its modules."""


class _Carry:
    def __repr__(self) -> str:
        return "nnx.CARRY"


CARRY: Any = _Carry()
"""In `nnx.scan(..., axes={filter: nnx.CARRY})`: carry these Refs from step to step, instead of slicing."""


class Renewed(Exception):
    """Raised outside of every trace. The body returns new modules at these places of the carry."""

    def __init__(self, at: frozenset[int]):
        self.at = at


class Loop:
    """One call of a loop.

    A module in the carry is kept or renewed. A kept module is the same object in every step: the body
    returns the module that came in, and its writes go to the caller's module. A renewed module is a new
    object in every step, as in a functional update: the caller's module does not change, and the loop
    starts with a clone. It depends on what the body returns at that place. So we first take a step
    abstractly. If a module is renewed, the loop starts again with clones.

    Invariants: a value is carried if a step assigns it, even if it assigns the same value, because two
    Refs with equal initial values may differ later. Values that no step assigns are constants. No module
    is both kept and renewed, or kept at two places.
    """

    def __init__(
        self,
        name: str,
        fn: Callable[..., Any],
        call: Call,
        specs: Specs,
        init: Any,
        *,
        position: int = 0,
        steps: int | None = None,
        renewed: frozenset[int] = frozenset(),
    ):
        """`position` is that of the carry among the arguments of `fn`. `steps` is None if unknown."""
        self.call = call
        self._name = name
        self._fn = fn
        self._init = init
        self._position = position
        self._steps = steps
        self._renewed = renewed
        self._is_carried = [s is CARRY for s in specs.values.refs]
        self._sliced = Values(*[_where(s is not CARRY for s in at) for at in specs.values])
        # What is carried: the Refs that a step writes, arrays of renewed modules, and other values.
        self._carried = Values([], [], _where(s is CARRY for s in specs.values.arguments))
        self._spec = Spec((), None)
        self._seen: frozenset[int] | None = None
        axes = [None if s is CARRY else s for s in specs.values.refs]
        self._slice_layout = of_slices(name, call, axes)
        if renewed:
            self._carried.plain_arrays.extend(self._arrays_of(renewed))

    def _arrays_of(self, renewed: frozenset[int]) -> list[int]:
        """The numbers of the plain arrays of the renewed modules, in the order of their structure."""
        parts = opened.leaves(self._init)
        modules = [i for i, x in enumerate(parts) if is_identity(x)]
        # The first roots of the call are the modules of the carry.
        roots = [root for i, root in zip(modules, self.call.places()) if i in renewed]
        found = dict.fromkeys([p.number for root in roots for p in root if p.kind == 1])
        return [i for i in found if self.call.layout.label_of(-1 - i) is None]

    def sliced(self) -> Values:
        """The sliced values, whole."""
        return self.call.values.chosen(self._sliced)

    def first(self) -> Values:
        """The carry for the first step."""
        return self.call.values.chosen(self._carried)

    def labels(self, call: Call) -> tuple[Any, ...]:
        """The inputs of one step, from which they get their names; see `naming`."""
        inputs = inputs_of(call)
        return inputs.chosen(self._carried), inputs.chosen(self._sliced)

    def carry_labels(self, call: Call) -> tuple[Any, ...]:
        """The same for a step that has only the carry."""
        return self.labels(call)[:1]

    def index_labels(self, call: Call) -> tuple[Any, ...]:
        """The same for a step that has an index and the carry."""
        carry, sliced = self.labels(call)
        return sliced.arguments[0], carry

    def abstract_step(self, sliced: Values) -> None:
        """Take one step abstractly, to learn which Refs it writes."""

        def pure(carry: Values, sliced: Values) -> Any:
            return self.step(carry, sliced)

        pure = named(pure, self._fn, self.call, self.labels)
        self._learn(*abstractly(pure, self.first(), sliced))

    def place(self, carry: Values, sliced: Values) -> Values:
        """All values of the call for one step."""
        values = self.call.values.copied()
        values.put(self._sliced, sliced)
        values.put(self._carried, carry)
        return values

    def step(self, carry: Values, sliced: Values) -> tuple[Values, Packed]:
        """Run the body once. Returns the next carry, and the packed result of the body."""
        (others, arrays), packed = run(
            self._body,
            self._name,
            self.call,
            self.place(carry, sliced),
            layout=self._slice_layout,
            mode="read",
            assigned=True,
            watch=self._fn,
            runs_once=False,
            split_out=lambda out: out,
        )
        written = packed.values()
        return Values([written[i] for i in self._carried.refs], arrays, others), packed

    def _body(self, *args: Any) -> tuple[Any, Any]:
        carry = args[self._position]
        came = {id(x) for x in walk(args).objects}
        out = self._fn(*args)
        if not isinstance(out, tuple) or len(out) != 2:
            raise CarryError(
                f"The body of {self._name} must return (carry, y), but it returned "
                f"{type(out).__name__}."
            )
        return self._match(carry, out[0], came), out[1]

    def _match(self, carry: Any, new: Any, came: set[int]) -> tuple[list[Any], list[Any]]:
        """Compare the next carry with the last, and return its values and the arrays of renewed modules."""
        olds, old_def = opened.flatten(carry)
        news, new_def = opened.flatten(new)
        if old_def != new_def:
            raise CarryError(
                f"The carry of {self._name} changes its structure: it comes in as {old_def} and "
                f"is returned as {new_def}. Return a carry of the first structure."
            )
        arrays: list[Any] = []
        renewed: list[int] = []
        for i, (old, x) in enumerate(zip(olds, news, strict=True)):
            if is_identity(old) != is_identity(x):
                raise CarryError(
                    f"The carry of {self._name} changes from {type(old).__name__} to "
                    f"{type(x).__name__}. Return the module that came in, or one like it."
                )
            if not is_identity(old):
                arrays.append(x)
            elif x is not old:
                self._check_new(x, came)
                renewed.append(i)
        # If the loop has no steps, nothing is renewed.
        now = frozenset(renewed) if self._steps != 0 else self._renewed
        first = self._seen is None
        if now != self._renewed and not (first and not self._renewed):
            raise CarryError(self._mixed("returned by one step and renewed by another"))
        self._seen = now
        if now != self._renewed:
            # The loop starts again, so nothing from this step is kept.
            self._check_unassigned(olds, now)
            return arrays, []
        return arrays, self._move([olds[i] for i in sorted(now)], [news[i] for i in sorted(now)])

    def _check_new(self, x: Any, came: set[int]) -> None:
        frame = local.frame
        objects = walk(x).objects
        if id(x) in came or x._frame is not frame:
            raise CarryError(
                f"The body of {self._name} returns a {type(x).__name__} at a place of the carry where "
                f"another one came in. The place of each module would depend on the number of steps. "
                f"Exchange the values instead, or return an nnx.clone of it at every such place."
            )
        if any(id(o) in came or (is_identity(o) and o._frame is not frame) for o in objects):
            raise CarryError(self._mixed(f"in a new {type(x).__name__}"))

    def _check_unassigned(self, olds: list[Any], renewed: frozenset[int]) -> None:
        frame = local.frame
        assert frame is not None
        for i in renewed:
            if any(ref in frame.assigned for ref in walk(olds[i]).refs):
                raise CarryError(self._mixed("written in the step that returns a new one"))

    def _mixed(self, how: str) -> str:
        return (
            f"A module in the carry of {self._name} is both kept and renewed: the one that came in is "
            f"{how}. In Python, the first step would change the caller's module, and the others would "
            f"not. Either write and return the module that came in, or only return an nnx.clone."
        )

    def _move(self, olds: list[Any], news: list[Any]) -> list[Any]:
        """Write the values of the returned modules into the Refs that came in. Returns their arrays."""
        if not olds:
            return []
        self._check_unassigned(olds, frozenset(range(len(olds))))
        before, after = Snapshot(tuple(olds)), Snapshot(tuple(news))
        if before.dagdef is not after.dagdef:
            raise CarryError(
                f"The carry of {self._name} holds a {type(olds[0]).__name__}, but the body returned one "
                f"with another structure or other settings: {after.dagdef!r} for {before.dagdef!r}. "
                f"Return one of the same structure."
            )
        arrays: list[Any] = []
        for ref, value in zip(before.refs, after.values(), strict=True):
            if ref._trace is LABEL or is_label(value):
                self._check_constant(ref._value, value)
            else:
                write(ref, value)
        for old, x in zip(before.leaves(), after.leaves(), strict=True):
            if _is_carried(old):
                arrays.append(x)
            else:
                self._check_constant(old, x)
        return arrays

    def _check_constant(self, old: Any, new: Any) -> None:
        if Label(old) != Label(new):
            raise CarryError(
                f"A module in the carry of {self._name} holds {old!r:.60}, which is not an array, but the "
                f"body returned one with {new!r:.60} in its place. The steps of a compiled loop cannot "
                f"have different constants: carry a number instead."
            )

    def _learn(self, carry: Values, packed: Packed) -> None:
        """Learn from one abstract step which Refs are written, and check that they may be carried."""
        check_lifted(self.call)
        if self._seen is not None and self._seen != self._renewed:
            raise Renewed(self._seen)
        self._spec = packed.spec
        graph = packed.spec.graph
        if graph is not None and graph.rewritten:
            raise StructureError(
                f"The body of {self._name} changes the structure of a module from outside (an "
                f"attribute, a list or a Ref was added, removed or replaced), but the steps of a "
                f"compiled loop cannot have different structures. Make the change before the loop."
            )
        written = packed.values()
        refs = [i for i in packed.spec.written if self._is_carried[i]]
        self._carried.refs.extend(refs)
        after = carry._replace(refs=[written[i] for i in refs])
        flat = opened.flatten_with_path(self._init)[0]
        paths = [jax.tree_util.keystr(path) for path, x in flat if not is_identity(x)]
        arrays = self.call.layout.dagdef.leaf_paths
        names = Values(
            [self.call.layout.name_of(i) for i in refs],
            [f"The array {dotted(arrays[i][1:])!r}" for i in self._carried.plain_arrays],
            [f"The carry{path}" for path in paths],
        )
        for what, old, new in zip(*map(chain.from_iterable, (names, self.first(), after))):
            self._check(what, old, new)

    def _check(self, what: str, old: Any, new: Any) -> None:
        before, after = jax.eval_shape(lambda: (old, new)) if _concrete(new) else (old, new)
        olds, old_def = jax.tree.flatten(before)
        news, new_def = jax.tree.flatten(after)
        if old_def != new_def:
            raise CarryError(
                f"{what} of {self._name} changes its structure from {old_def} to {new_def}. "
                f"A carried value must keep it."
            )
        for a, b in zip(olds, news, strict=True):
            a, b = _shaped(a), _shaped(b)
            if a.shape != b.shape or (a.dtype != b.dtype and not _becomes(a, b.dtype)):
                raise CarryError(
                    f"{what} of {self._name} changes from {_text(a)} to {_text(b)} in one step. A "
                    f"carried value must keep its shape and dtype. Cast or reshape the new value in the "
                    f"body, or the first value."
                )
            if (spec := spec_in_type(a)) != spec_in_type(b):
                raise CarryError(
                    f"{what} of {self._name} changes from {jax.typeof(a)} to {jax.typeof(b)} in one "
                    f"step. A carried value must stay sharded along the same Explicit axes: call the "
                    f"last layer with out_sharding={spec}, or use jax.sharding.reshard(x, {spec}) on "
                    f"the new value in the body, or on the first value."
                )

    def sliced_of(self, packed: Packed) -> list[Any]:
        """The values that a step wrote to sliced Refs."""
        return [value for i, value in packed.values().items() if not self._is_carried[i]]

    def packed(self, out: Any, carry: Values, sliced: list[Any]) -> Packed:
        """The packed result of all steps together."""
        todo, slices = iter(carry.refs), iter(sliced)
        written = [next(todo if self._is_carried[i] else slices) for i in self._spec.written]
        return Packed(self._spec, out, written)

    def last(self, carry: Values) -> Any:
        """The last carry. A kept module is the caller's own."""
        flat, treedef = opened.flatten(self._init)
        todo = iter(carry.arguments)
        flat = [x if is_identity(x) else next(todo) for x in flat]
        if self._carried.plain_arrays:
            at = sorted(self._renewed)
            dagdef, values = split(tuple(flat[i] for i in at))
            paths = [path for path in dagdef.leaf_paths if _is_carried(values[path])]
            new: dict[Path, Any] = {**values, **dict(zip(paths, carry.plain_arrays, strict=True))}
            for i, module in zip(at, merge(dagdef, new), strict=True):
                flat[i] = module
        return jax.tree.unflatten(treedef, flat)


def _is_carried(x: Any) -> bool:
    """Whether a plain array of a renewed module is carried, and not a constant."""
    return isinstance(x, jax.Array | np.ndarray) and is_input(x)


def run_loop(init: Any, attempt: Callable[[Roots, Any, frozenset[int]], Any]) -> Any:
    """Call `attempt(roots, init, renewed)`, with clones of the modules that the body renews."""
    renewed: frozenset[int] = frozenset()

    def with_clones(roots: Roots) -> Any:
        nonlocal init, renewed
        try:
            return attempt(roots, init, renewed)
        except Renewed as found:
            renewed = found.at
        at = sorted(renewed)
        flat, treedef = opened.flatten(init)
        for i, module in zip(at, clone(tuple(flat[i] for i in at)), strict=True):
            flat[i] = module
        init = jax.tree.unflatten(treedef, flat)
        return attempt(roots, init, renewed)

    return until_lifted(with_clones)


def _where(chosen: Iterable[bool]) -> list[int]:
    return [i for i, is_chosen in enumerate(chosen) if is_chosen]


def _concrete(x: Any) -> bool:
    return not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(x))


def _becomes(a: Any, dtype: Any) -> bool:
    """Whether JAX converts a first value, such as the Python number 0, to this dtype."""
    number = {"i": 0, "f": 0.0, "c": 0j}.get(a.dtype.kind, a.dtype)
    return getattr(a, "weak_type", False) and jnp.result_type(number, dtype) == dtype


def _shaped(x: Any) -> Any:
    return x if hasattr(x, "dtype") else jax.eval_shape(lambda: jnp.asarray(x))


def _text(x: Any) -> str:
    return f"{x.dtype}[{','.join(str(n) for n in x.shape)}]"
