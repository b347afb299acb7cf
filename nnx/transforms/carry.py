"""One call of a loop: which values are carried, which are sliced, and which are constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nnx.transforms.axes import Specs
from nnx.transforms.boundary import Packed, Spec, check_lifted, run
from nnx.transforms.call import Call
from refx import Ref, RefError, StructureError
from refx.node import is_identity
from refx.partition import dotted
from refx.snapshot import snapshot
from refx.trace import write

__all__ = ["CARRY", "CarryError"]


class CarryError(RefError, TypeError):
    """A loop whose carry changes its structure, its shape or its dtype."""


class _Carry:
    def __repr__(self) -> str:
        return "nnx.CARRY"


CARRY: Any = _Carry()
"""In `nnx.scan(..., axes={filter: nnx.CARRY})`: carried from step to step and not sliced."""


class Loop:
    """One call of a loop: which values are carried, which are sliced, and which are constants.

    `step` runs the body on a carry `(others, carried)` and a slice `(refs, leaves, others)`.
    Before `learn`, nothing is known to be written and every Ref has its first value.
    """

    def __init__(self, name: str, fn: Callable[..., Any], call: Call, specs: Specs, init: Any):
        self.call = call
        self._name = name
        self._fn = fn
        self._init = init
        self._slices = [[i for i, s in enumerate(at) if s is not CARRY] for at in specs[:3]]
        self._kept = [i for i, s in enumerate(specs.others) if s is CARRY]
        self._is_carried = [s is CARRY for s in specs.refs]
        self._carried: list[int] = []
        self._spec = Spec((), None)

    def sliced(self) -> tuple[list[Any], ...]:
        lists = (self.call.values, self.call.leaves, self.call.others)
        return tuple([x[i] for i in at] for x, at in zip(lists, self._slices, strict=True))

    def first(self) -> tuple[list[Any], list[Any]]:
        others = [self.call.others[i] for i in self._kept]
        return others, [self.call.values[i] for i in self._carried]

    def place(self, others: Any, carried: Any, sliced: Any) -> tuple[list[Any], list[Any]]:
        """The full lists of Ref values and of other values for one step; leaves are in `_leaves`."""
        values, rest = list(self.call.values), list(self.call.others)
        self._leaves = list(self.call.leaves)
        if carried is not None:
            for i, x in zip(self._kept, others, strict=True):
                rest[i] = x
            for i, x in zip(self._carried, carried, strict=True):
                values[i] = x
        for x, at, new in zip((values, self._leaves, rest), self._slices, sliced, strict=True):
            for i, value in zip(at, new, strict=True):
                x[i] = value
        return values, rest

    def step(self, others: Any, carried: Any, sliced: Any) -> tuple[list[Any], Packed]:
        values, rest = self.place(others, carried, sliced)
        return run(
            self._body,
            self._name,
            self.call,
            values,
            self._leaves,
            rest,
            mode="read",
            split_out=lambda out: out,
        )

    def _body(self, *args: Any) -> tuple[list[Any], Any]:
        carry = args[0] if len(args) == 1 or self._name.startswith("nnx.scan") else args[1]
        out = self._fn(*args)
        if not isinstance(out, tuple) or len(out) != 2:
            raise CarryError(
                f"The body of {self._name} must return (carry, y), but it returned "
                f"{type(out).__name__}."
            )
        return self._match(carry, out[0]), out[1]

    def _match(self, carry: Any, new: Any) -> list[Any]:
        """The arrays of the new carry; modules in it must be those of the old one, or like them."""
        olds, old_def = jax.tree.flatten(carry, is_leaf=is_identity)
        news, new_def = jax.tree.flatten(new, is_leaf=is_identity)
        if old_def != new_def:
            raise CarryError(
                f"The carry of {self._name} changes its structure: it comes in as {old_def} and "
                f"is returned as {new_def}. Return what has the structure of the first carry."
            )
        arrays: list[Any] = []
        moved: dict[Ref[Any], Any] = {}
        for old, x in zip(olds, news, strict=True):
            if is_identity(old) != is_identity(x):
                raise CarryError(
                    f"The carry of {self._name} changes from {type(old).__name__} to "
                    f"{type(x).__name__}. Return the module that came in, or one like it."
                )
            if is_identity(old):
                self._move(old, x, moved)
            else:
                arrays.append(x)
        # Only now, since a Ref may be the source of one value and the target of another.
        for ref, value in moved.items():
            if ref.value is not value:
                write(ref, value)
        return arrays

    def _move(self, old: Any, new: Any, moved: dict[Ref[Any], Any]) -> None:
        """Note the values of `new`, which was returned in the place of `old`, for the Refs of it."""
        before, after = snapshot(old), snapshot(new)
        if before.dagdef is not after.dagdef:
            raise CarryError(
                f"The carry of {self._name} holds a {type(old).__name__}, and the body returned "
                f"one of another structure in its place: {after.dagdef!r} for {before.dagdef!r}."
            )
        for path, a, b in zip(
            after.dagdef.leaf_paths, before.leaves(), after.leaves(), strict=True
        ):
            if a is not b:
                raise CarryError(
                    f"The array {dotted(path)!r} of a {type(old).__name__} in the carry of "
                    f"{self._name} is no Ref, and the body returned another one in its place, "
                    f"which the loop would lose. Make it a Ref (a field, or nnx.Ref), or carry it "
                    f"beside the module."
                )
        paths = after.dagdef.ref_paths
        for path, ref, value in zip(paths, before.refs, after.values(new), strict=True):
            if moved.setdefault(ref, value) is not value:
                what = f"Ref {dotted(path)!r}" if path else "A Ref"
                raise CarryError(
                    f"{what} is at two places of the carry of {self._name}, and the body returned "
                    f"a different value at each. Return the same at both, or begin with two Refs."
                )

    def learn(self, found: tuple[list[Any], Packed]) -> None:
        """Take from one abstract step which Refs are written, and check that they may be carried."""
        check_lifted(self.call)
        others, packed = found
        self._spec = packed.spec
        graph = packed.spec.graph
        if graph is not None and graph.refill:
            raise StructureError(
                f"The body of {self._name} changes the structure of a module that comes from "
                f"outside (an attribute, a list or a Ref was added, removed or replaced), and the "
                f"steps of a compiled loop cannot have different structures. Make the change "
                f"before the loop."
            )
        self._carried = [i for i in packed.spec.written if self._is_carried[i]]
        written = dict(zip(packed.spec.written, packed.written, strict=True))
        for i in self._carried:
            self._check(self.call.layout.name_of(i), self.call.values[i], written[i])
        flat = jax.tree_util.tree_flatten_with_path(self._init, is_leaf=is_identity)[0]
        names = [jax.tree_util.keystr(path) for path, x in flat if not is_identity(x)]
        for where, i, new in zip(names, self._kept, others, strict=True):
            self._check(f"The carry{where}", self.call.others[i], new)

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
            if a.shape != b.shape or (a.dtype != b.dtype and not getattr(a, "weak_type", False)):
                raise CarryError(
                    f"{what} of {self._name} changes from {_text(a)} to {_text(b)} in one step. A "
                    f"carried value must keep its shape and dtype; cast or reshape what the body "
                    f"gives it, or its first value."
                )

    def carried_of(self, packed: Packed) -> list[Any]:
        written = dict(zip(packed.spec.written, packed.written, strict=True))
        return [written[i] for i in self._carried]

    def sliced_of(self, packed: Packed) -> list[Any]:
        pairs = zip(packed.spec.written, packed.written, strict=True)
        return [value for i, value in pairs if not self._is_carried[i]]

    def packed(self, out: Any, carried: list[Any], sliced: list[Any]) -> Packed:
        todo, slices = iter(carried), iter(sliced)
        written = [next(todo if self._is_carried[i] else slices) for i in self._spec.written]
        return Packed(self._spec, out, written)

    def carry(self, others: list[Any]) -> Any:
        """The last carry, with the caller's own modules."""
        flat, treedef = jax.tree.flatten(self._init, is_leaf=is_identity)
        todo = iter(others)
        return jax.tree.unflatten(treedef, [x if is_identity(x) else next(todo) for x in flat])


def _concrete(x: Any) -> bool:
    return not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(x))


def _shaped(x: Any) -> Any:
    return x if hasattr(x, "dtype") else jax.eval_shape(lambda: jnp.asarray(x))


def _text(x: Any) -> str:
    return f"{x.dtype}[{','.join(str(n) for n in x.shape)}]"
