"""Targets of differentiation: take the selected values out of an argument, and put them back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnx.transforms.call import Call, Place, Values
from nnx.transforms.layout import Layout
from refx import Filter, Partition, RefError, ShapeError, UnknownPathError, opened, to_predicate
from refx.node import is_identity
from refx.partition import Path, dotted, listed
from refx.selection import mistake
from refx.walk import leaves_by_path

__all__ = ["DifferentiationError"]


class DifferentiationError(RefError, TypeError):
    """A value cannot be differentiated, or there is nothing to differentiate."""


def locate(call: Call, args: tuple[Any, ...], number: int) -> Target:
    """Find the values of one positional argument among those of its call."""
    flat, treedef = opened.flatten(args[number])
    before = opened.leaves(args[:number])
    root = sum(map(is_identity, before))
    other = len(before) - root
    if not any(map(is_identity, flat)):
        return Target(number, treedef, [Place((), x, x, 2, other + i) for i, x in enumerate(flat)])
    roots = iter(call.places()[root:])
    refs: dict[int, Place] = {}
    arrays: dict[tuple[int, int], Place] = {}
    for path, x in leaves_by_path(args[number]):
        if not is_identity(x):
            arrays[2, other] = Place(path, x, x, 2, other)
            other += 1
            continue
        for place in next(roots):
            place = place._replace(path=(*path, *place.path))
            if place.kind == 0:
                refs.setdefault(place.number, place)
            else:
                arrays.setdefault((1, place.number), place)
    return Target(number, None, [*refs.values(), *arrays.values()])


class Target(NamedTuple):
    """The values of one argument that are differentiated.

    `treedef` is the structure of an argument without Refs. For an argument with Refs it is None, and
    the values are known by path.
    """

    number: int
    treedef: Any
    places: list[Place]

    def without_values(self) -> Target:
        """A copy to keep: it has the shapes of the values, but no arrays of the call."""
        shapes = jax.eval_shape(lambda: [p.value for p in self.places])
        pairs = zip(self.places, shapes, strict=True)
        return self._replace(places=[p._replace(cell=None, value=shape) for p, shape in pairs])

    def take(self, values: Values) -> Parts:
        """Take the differentiated values out of `values`."""
        return Parts([values[p.kind][p.number] for p in self.places])

    def put(self, parts: Parts, values: Values) -> None:
        """Replace the differentiated values in `values`."""
        for p, value in zip(self.places, parts.values, strict=True):
            values[p.kind][p.number] = value

    def named(self, parts: Parts) -> Any:
        """The form for the user: a Partition, or the argument's own structure."""
        if self.treedef is not None:
            return jax.tree.unflatten(self.treedef, parts.values)
        pairs = zip(self.places, parts.values, strict=True)
        return Partition((p.path, value) for p, value in pairs)

    def parts(self, name: str, given: Any) -> Parts:
        """The inverse of `named`, for a tangent. Missing paths are zero."""
        what = f"{name} got a tangent for argument {self.number}"
        if self.treedef is not None:
            leaves, treedef = jax.tree.flatten(given)
            if treedef != self.treedef:
                raise DifferentiationError(
                    f"{what} with the structure {treedef}, but the argument has "
                    f"{self.treedef}. Give a zero for each array that does not move."
                )
            values: dict[Path, Any] = {(str(i),): x for i, x in enumerate(leaves)}
            paths: list[Path] = list(values)
        else:
            values = {} if given is None else by_path(given, what, DifferentiationError)
            paths = [p.path for p in self.places]
        unknown = [path for path in values if path not in paths]
        if unknown:
            raise UnknownPathError(
                f"{what} at {listed(unknown)}, which is not differentiated: wrt selects "
                f"{listed(paths)}."
            )
        result = []
        for path, primal in zip(paths, [p.value for p in self.places], strict=True):
            zero = jax.tree.map(zero_tangent, primal)
            if path in values and shapes(values[path]) != shapes(zero):
                where = f" at {dotted(path)!r}" if self.treedef is None else ""
                raise ShapeError(
                    f"{what}{where} of {text(values[path])}, but the value is {text(primal)}, so the "
                    f"tangent must be {text(zero)}."
                )
            result.append(values.get(path, zero))
        return Parts(result)


def by_path(given: Any, what: str, error: type[RefError]) -> dict[Path, Any]:
    """Convert a user's mapping for an argument with Refs to a dict by path."""
    if not isinstance(given, Mapping):
        raise error(
            f"{what} that is a {type(given).__name__}, but the argument holds Refs. Give a "
            f"Partition of the Refs that wrt selects, such as model['params'], or a dict by path. "
            f"{{}} is zero."
        )
    return dict(Partition(given))


def shapes(value: Any) -> Any:
    """The structure, shapes and dtypes of a value, to compare."""
    leaves, treedef = jax.tree.flatten(value)
    return treedef, [(jnp.shape(x), _dtype(x)) for x in leaves]


def text(value: Any) -> str:
    """The shapes and dtypes of a value, for a message."""
    all_of = [
        f"{'float0' if _dtype(x) == jax.dtypes.float0 else _dtype(x)}"
        f"[{','.join(map(str, jnp.shape(x)))}]"
        for x in jax.tree.leaves(value)
    ]
    return ", ".join(all_of) or "nothing"


def _dtype(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)


def moves(x: Any) -> bool:
    """Whether an array can have nonzero tangents."""
    return jnp.issubdtype(_dtype(x), jnp.inexact)


def zero_tangent(x: Any) -> Any:
    """The zero tangent of an array."""
    return jnp.zeros_like(x) if moves(x) else np.zeros(jnp.shape(x), jax.dtypes.float0)


class Parts:
    """The differentiated values of one argument. A separate class tells them apart from other pytrees."""

    def __init__(self, values: list[Any]):
        self.values = values


jax.tree_util.register_pytree_node(
    Parts, lambda p: (p.values, None), lambda _, values: Parts(list(values))
)


def targets_of(
    name: str,
    args: tuple[Any, ...],
    numbers: Sequence[int],
    wrt: Filter,
    call: Call,
    *,
    allow_int: bool,
    all_args: bool = False,
) -> list[Target]:
    """Find the values to differentiate in each argument.

    With `all_args`, the user did not choose the arguments. Then an argument with Refs may have nothing
    to differentiate, if another one has something.
    """
    predicate = to_predicate(wrt)
    targets, empty, selected = [], [], False
    for number in numbers:
        if not isinstance(number, int):
            raise DifferentiationError(
                f"{name} was to differentiate argument {number!r}, but argnums has the positions of "
                f"arguments: argnums=0, or (0, 1)."
            )
        if not -len(args) <= number < len(args):
            raise DifferentiationError(
                f"{name} differentiates argument {number}, but it was called with "
                f"{len(args)} positional arguments."
            )
        target = locate(call, args, number % len(args))
        if target.treedef is None:
            chosen = [p for p in target.places if predicate(p.path, p.cell)]
            for p in chosen:
                _check_differentiable(name, p, call.layout, allow_int)
            if chosen:
                selected = True
            else:
                empty.append((number, target))
            target = target._replace(places=chosen)
        targets.append(target._replace(number=number))
    if empty and not (all_args and selected):
        number, whole = empty[0]
        there = {repr(p.cell.collection) for p in whole.places if p.kind == 0}
        text = (
            f"{name} with wrt={wrt!r} has nothing to differentiate in argument {number}: its "
            f"collections are {', '.join(sorted(there)) or 'none'}. {mistake(wrt, args[number]) or ''}"
        )
        if not there and any(p.kind == 1 for p in whole.places):
            text = (
                f"{text.rstrip()} Its arrays are plain attributes, which filters do not select and "
                f"training does not change. Declare them in the class: `w: jax.Array = nnx.param()`."
            )
        raise DifferentiationError(text.rstrip())
    _check_disjoint(name, numbers, targets)
    return targets


def _check_disjoint(name: str, numbers: Sequence[int], targets: list[Target]) -> None:
    owner: dict[tuple[int, int], int] = {}
    for number, target in zip(numbers, targets, strict=True):
        for p in target.places:
            first = owner.setdefault((p.kind, p.number), number)
            if first != number:
                raise DifferentiationError(
                    f"{name} cannot differentiate {dotted(p.path)!r} twice: arguments {first} and "
                    f"{number} share it. Pass both in one argument, as a tuple. Then the gradient of a "
                    f"shared Ref is the sum over its uses."
                )


def _check_differentiable(name: str, place: Place, layout: Layout, allow_int: bool) -> None:
    path = place.path
    label = layout.label_of(place.number if place.kind == 0 else -1 - place.number)
    if label is not None:
        found = label.example()
        raise DifferentiationError(
            f"{name} cannot differentiate {dotted(path)!r}: it holds a {type(found).__name__}, not an array: "
            f"{found!r:.60}. Choose a wrt that leaves it out, or give it an array first."
        )
    for leaf in jax.tree.leaves(place.value):
        dtype = getattr(leaf, "dtype", None) or jnp.result_type(leaf)
        if not (allow_int or jnp.issubdtype(dtype, jnp.inexact)):
            raise DifferentiationError(
                f"{name} cannot differentiate {dotted(path)!r}: its dtype is {dtype}, and only "
                f"floating-point values have gradients. Choose a wrt that leaves it out, such as "
                f"nnx.All(..., nnx.Not(...)), or put it into another collection."
            )
