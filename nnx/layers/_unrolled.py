"""Follows paths into a model, where a list of layers and a `Stack` are two forms of one thing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import refx
from nnx.layers.containers import Sequential, Stack
from refx import Node
from refx.node import attributes
from refx.partition import Path

__all__: list[str] = []


class Spot(NamedTuple):
    """A place in a model; inside a Stack, also which part of its arrays."""

    at: Any
    """The object there; inside a Stack, a single layer with shapes as values."""
    path: Path
    """Its path, in our names."""
    levels: tuple[int, ...] = ()
    """For each Stack on the way, the position of its `layers` in the path."""
    indices: tuple[int, ...] = ()
    """For each Stack on the way, the number of the layer: an index of a leading axis of its Refs."""
    part: tuple[tuple[int, int], ...] = ()
    """The number of the layer and the count of layers, for each number that the path leaves out. The
    value has a leading axis for each."""

    @property
    def name(self) -> Path:
        """The path in the form for lists: with the number of a layer instead of `layers`."""
        return named(self.path, self.levels, self.indices)


def named(path: Path, levels: Sequence[int], index: Sequence[int]) -> Path:
    """A path into a Stack with the numbers of its layers: `layers.3.kernel` for `layers.kernel`."""
    parts = list(path)
    for level, number in zip(levels, index, strict=True):
        parts[level] = str(number)
    return tuple(parts)


class _Layers(NamedTuple):
    """The value of `layers` in a Stack; also a list, when the path was made for a Stack."""

    of: Any


Rename = Callable[[Any, str], str]


class Unrolled:
    """Finds places in a model by path, in either form: `blocks.3.kernel`, `blocks.layers.kernel`."""

    def __init__(self, tree: Any):
        self._tree = tree
        self._templates: dict[int, Any] = {}

    def spots(self, path: Sequence[str], rename: Rename = lambda at, name: name) -> list[Spot]:
        """The places that a path means; a single one that holds `NOTHING` if there are none.

        Args:
          path: the names.
          rename: returns our name for a name in the path, given the object that has it.
        """
        spots = [Spot(self._tree, ())]
        for i, name in enumerate(path):
            spots = [found for spot in spots for found in self._step(spot, name, rename)]
            for spot in spots:
                if spot.at is NOTHING:
                    return [spot._replace(path=(*spot.path, *path[i + 1 :]))]
        return spots

    def expanded(self, spot: Spot) -> list[Spot]:
        """A place for each layer of a list or Stack; for anything else, the place itself."""
        at = spot.at.of if isinstance(spot.at, _Layers) else spot.at
        if isinstance(at, Stack):
            inside = spot if isinstance(spot.at, _Layers) else self._into(spot)
            items = [self._layer(inside, i) for i in range(at.length)]
        elif isinstance(at, Sequential | list | tuple):
            layers = at.layers if isinstance(at, Sequential) else at
            path = (*spot.path, "layers") if isinstance(at, Sequential) else spot.path
            items = [spot._replace(at=x, path=(*path, str(i))) for i, x in enumerate(layers)]
        else:
            return [spot]
        n = len(items)
        return [x._replace(part=(*spot.part, (i, n))) for i, x in enumerate(items)]

    def _step(self, spot: Spot, name: str, rename: Rename) -> list[Spot]:
        at = spot.at
        whole = isinstance(at, _Layers)
        at = at.of if whole else at
        if isinstance(at, Stack):
            if name == "layers" and not whole:
                return [self._into(spot)]
            if name.isdecimal():
                number = _position(name, at.length)
                inside = spot if whole else self._into(spot)
                return [_nowhere(spot, name) if number is None else self._layer(inside, number)]
            if not whole and name in attributes(at):
                return [_nowhere(spot, name)]
            return self._in_each(spot, name, rename)
        if isinstance(at, Sequential) and name not in attributes(at):
            at, whole = at.layers, True
            spot = spot._replace(at=_Layers(at), path=(*spot.path, "layers"))
        if isinstance(at, list | tuple):
            if name.isdecimal() or name in getattr(at, "_fields", ()):
                number = _position(name, len(at))
                found = getattr(at, name, NOTHING) if number is None else at[number]
                return [spot._replace(at=found, path=(*spot.path, name))]
            if name == "layers" and not whole:
                return [spot._replace(at=_Layers(at))]
            return self._in_each(spot, name, rename)
        name = rename(at, name)
        if isinstance(at, Node):
            found = attributes(at).get(name, NOTHING)
        elif isinstance(at, Mapping):
            found = {str(key): value for key, value in at.items()}.get(name, NOTHING)
        else:
            found = NOTHING
        if isinstance(at, Sequential) and name == "layers":
            found = _Layers(found)
        return [spot._replace(at=found, path=(*spot.path, name))]

    def _in_each(self, spot: Spot, name: str, rename: Rename) -> list[Spot]:
        items = self.expanded(spot)
        if not items or not all(isinstance(item.at, Node | list | tuple | dict) for item in items):
            return [_nowhere(spot, name)]
        return [found for item in items for found in self._step(item, name, rename)]

    def _into(self, spot: Spot) -> Spot:
        levels = (*spot.levels, len(spot.path))
        return spot._replace(at=_Layers(spot.at), path=(*spot.path, "layers"), levels=levels)

    def _layer(self, spot: Spot, number: int) -> Spot:
        return spot._replace(at=self._template(spot.at.of), indices=(*spot.indices, number))

    def _template(self, stack: Stack) -> Any:
        if id(stack) not in self._templates:
            dagdef, values = refx.split(stack.layers)
            shapes = jax.tree.map(_inner, values)
            # Keep the Stack too, so that no other object gets its id.
            self._templates[id(stack)] = (refx.merge(dagdef, shapes), stack)
        return self._templates[id(stack)][0]


NOTHING: Any = object()
"""Stands for the object at a path that the model does not have."""


def _position(name: str, length: int) -> int | None:
    # A file may have a number of any length.
    number = int(name) if name.isascii() and name.isdecimal() and len(name) < 10 else -1
    return number if 0 <= number < length and str(number) == name else None


def _nowhere(spot: Spot, name: str) -> Spot:
    return spot._replace(at=NOTHING, path=(*spot.path, name))


def _inner(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(x)[1:], jax.dtypes.result_type(x))


def part_of(value: Any, spot: Spot) -> Any:
    """The part of a value that goes to a place.

    Raises:
      ValueError: the value has no leading axis of that size.
    """
    for number, count in spot.part:
        for x in jax.tree.leaves(value):
            if np.shape(x)[:1] != (count,):
                raise ValueError(f"the first axis is not one of {count} layers")
        value = jax.tree.map(lambda x: take(x, number), value)  # noqa: B023 — used at once
    return value


def take(x: Any, index: Any) -> Any:
    """`x[index]`, also for a shape that stands for an array."""
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x[index]
    count = len(index) if isinstance(index, tuple) else 1
    return jax.ShapeDtypeStruct(x.shape[count:], x.dtype)


def stacked(pieces: Mapping[tuple[int, ...], Any], lead: tuple[int, ...]) -> Any:
    """The values of layers, by number, as one value with leading axes."""

    def stack(*values: Any) -> Any:
        numpy = not any(isinstance(x, jax.Array) for x in values)
        joined = np.stack(values) if numpy else jnp.stack(values)
        return joined.reshape(lead + joined.shape[1:])

    return jax.tree.map(stack, *[pieces[index] for index in np.ndindex(*lead)])
