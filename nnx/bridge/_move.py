"""Move values into a model by path: check everything first, then write everything."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

import refx
from nnx.layers._unrolled import Spot, Unrolled, named, part_of, stacked, take
from nnx.serialize.fitting import LoadReport
from refx import Partition, Ref, RefError, UnknownPathError
from refx.dag import find_ref
from refx.partition import Path, as_path, dotted

__all__ = ["BridgeError"]


class BridgeError(RefError, ValueError):
    """Weights of another library do not fit a model. Nothing was changed.

    The message lists everything that is missing, unexpected, or of another shape.
    """


class Mover:
    """Collects values for the Refs of a model, together with every problem found."""

    def __init__(self, ours: Any, source: str):
        self.ours = ours
        self.source = source
        self.cells = refx.refs(ours)
        self.unrolled = Unrolled(ours)
        self.values: dict[Path, Any] = {}
        # The source of each value, including those that do not fit, by the number of a Stack's
        # layer.
        self._from: dict[Path, dict[tuple[int, ...], str]] = {}
        self._layers: dict[Path, dict[tuple[int, ...], Any]] = {}
        self._levels: dict[Path, tuple[int, ...]] = {}
        self.unexpected: dict[str, str] = {}
        self.skipped: list[str] = []
        self._wrong: list[str] = []
        self._mismatched: dict[Path, tuple[str, str]] = {}

    def find(self, path: Any) -> Path | None:
        """The canonical path of the Ref at a path, or None. Any path of a shared Ref will do."""
        try:
            return find_ref(self.ours, path, self.cells)[0]
        except UnknownPathError:
            return None

    def spots(self, path: Any) -> list[Spot]:
        """The places of a value. A list and a Stack can stand for each other. Empty if the path is
        unknown.
        """
        found = self.find(path)
        if found is not None:
            return [Spot(self.cells[found], found)]
        spots = self.unrolled.spots(dotted(path).split("."))
        return spots if all(isinstance(spot.at, Ref) for spot in spots) else []

    def read(self, path: Any) -> Any:
        """Our value at a path, in the form of the path: one layer, or all layers stacked.

        Raises:
          KeyError: there is no value.
        """
        spots = self.spots(path)
        if not spots:
            raise KeyError(path)
        values = {}
        for spot in spots:
            value = self.cells[self._canonical(spot)].value
            values[tuple(i for i, _ in spot.part)] = (
                take(value, spot.indices) if spot.indices else value
            )
        return stacked(values, tuple(n for _, n in spots[0].part)) if spots[0].part else values[()]

    def used(self, path: Any) -> list[tuple[Path, tuple[int, ...]]]:
        """The Refs that a path means, each with the numbers of the layers in it."""
        return [(self._canonical(spot), spot.indices) for spot in self.spots(path)]

    def unused(self, collections: Iterable[Any], used: set[Any]) -> list[str]:
        """The names of our values that were not used. The argument `used` collects the results of
        `used()`.
        """
        wanted, names = set(collections), []
        for path, cell in self.cells.items():
            own = [(at, index) for at, index in used if at == path]
            if cell.collection not in wanted or (path, ()) in own:
                continue
            if not own:
                names.append(dotted(path))
                continue
            lead = np.shape(cell.value)[: len(own[0][1])]
            if len(own) < math.prod(lead):
                names.append(f"a part of {dotted(path)}")
        return names

    def _canonical(self, spot: Spot) -> Path:
        found = self.find(spot.path)
        assert found is not None
        return found

    def put(self, path: Any, value: Any, name: str) -> None:
        """Record a value for a path. A list's path may mean a Stack, and the other way round."""
        spots = self.spots(path)
        if not spots:
            same = dotted(path) == name
            self.unexpected[name] = "" if same else f"as {dotted(path)!r}"
        for spot in spots:
            try:
                part = part_of(value, spot) if spot.part else value
            except ValueError as error:
                self.refuse(spot.path, value, name, f"has shape {np.shape(value)}: {error}")
                return
            self.put_at(spot, part, name)

    def put_at(self, spot: Spot, value: Any, name: str) -> None:
        """Record a value for a place."""
        found = self.find(spot.path)
        if found is None:
            same = dotted(spot.name) == name
            self.unexpected[name] = "" if same else f"as {dotted(spot.name)!r}"
            return
        index, at = spot.indices, spot.name if spot.indices else found
        first = self._from.setdefault(found, {}).setdefault(index, name)
        old = self.cells[found].value
        shape = np.shape(old)[len(index) :]
        if isinstance(value, jax.ShapeDtypeStruct):
            text = f"{dotted(at)} gets a shape without values from {name}"
            self.refuse(at, value, name, text, whole=True)
            return
        if np.shape(value) != shape:
            text = f"{dotted(at)} has shape {shape}, but {name} gives {np.shape(value)}"
            self.refuse(at, value, name, text, whole=True)
            return
        like = jax.ShapeDtypeStruct(shape, dtype_of(old)) if index else old
        cast = convert(value, like, place=not index)
        if cast is None:
            text = (
                f"{dotted(at)} has dtype {dtype_of(old)}, but {name} has {np.asarray(value).dtype}"
            )
            self.refuse(at, value, name, text, whole=True)
            return
        there = self._layers.setdefault(found, {}) if index else self.values
        key: Any = index if index else found
        if key in there and not np.array_equal(np.asarray(there[key]), np.asarray(cast)):
            text = f"{dotted(at)} is one shared value, but {first} and {name} differ"
            self.refuse(at, value, name, text, whole=True)
        there[key] = cast
        self._levels[found] = spot.levels

    def refuse(self, path: Any, value: Any, name: str, why: str, *, whole: bool = False) -> None:
        """Record that a value does not fit."""
        self._wrong.append(why if whole else f"{dotted(path)}: {name} {why}")
        path = as_path(path)
        self._mismatched[path] = (text_of(value) if value is not None else why, self._text(path))

    def _text(self, path: Path) -> str:
        try:
            return text_of(self.read(path))
        except KeyError:
            return "a part"

    def finish(
        self, required: Iterable[Any] = (), *, strict: bool = True, hint: str = ""
    ) -> LoadReport:
        """Write everything, or raise an error that lists every problem.

        Args:
          required: the collections in which every Ref must have received a value.
          strict: whether values that do not fit, are missing or are unexpected are an error.
          hint: text for the end of the message.
        """
        wanted = set(required)
        missing: list[Path] = []
        for path, cell in self.cells.items():
            if path in self._layers and path not in self.values:
                missing += self._join(path)
            elif cell.collection in wanted and not (path in self._from or path in self._mismatched):
                missing.append(path)
        unexpected = [f"{name} ({why})" if why else name for name, why in self.unexpected.items()]
        sections = [
            ("has another shape or dtype", self._wrong),
            (f"is missing in {self.source}", [dotted(path) for path in missing]),
            (f"is unexpected in {self.source}", unexpected),
        ]
        if strict and any(items for _, items in sections):
            raise BridgeError(message(type(self.ours).__name__, sections) + hint)
        fits = {path: x for path, x in self.values.items() if path not in self._mismatched}
        refx.update(self.ours, Partition(fits))
        return LoadReport(
            tuple(fits),
            tuple(missing),
            tuple((name,) for name in self.unexpected),
            self._mismatched,
            tuple((name,) for name in self.skipped),
        )

    def _join(self, path: Path) -> list[Path]:
        """Stack the values of a Stack's layers. Return the paths of those that are missing."""
        layers, old = self._layers[path], self.cells[path].value
        lead = np.shape(old)[: len(self._levels[path])]
        lacking = [index for index in np.ndindex(*lead) if index not in layers]
        names = [named(path, self._levels[path], index) for index in lacking]
        refused = [name for name in names if name in self._mismatched]
        if not lacking or not isinstance(old, jax.ShapeDtypeStruct):
            layers |= {index: old[index] for index in lacking}
            self.values[path] = convert(stacked(layers, lead), old)
        return [name for name in names if name not in refused]


def message(model: str, sections: list[tuple[str, list[str]]]) -> str:
    """The text of a BridgeError."""
    lines = [
        f"  {what}:\n" + "\n".join(f"    {item}" for item in items)
        for what, items in sections
        if items
    ]
    return f"The weights do not fit the {model}, and nothing was changed.\n" + "\n".join(lines)


def convert(value: Any, like: Any, *, place: bool = True) -> Any:
    """`value` in the dtype and on the devices of `like`, or None if the kind of number differs.

    Args:
      value: an array.
      like: the value to be replaced. It may be a `jax.ShapeDtypeStruct`, from `nnx.eval_shape`.
      place: whether to put the value on devices. If not, a NumPy array stays a NumPy array.
    """
    target = dtype_of(like)
    given = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    same = given == target or any(
        jnp.issubdtype(given, kind) and jnp.issubdtype(target, kind)
        for kind in (jnp.floating, jnp.integer, jnp.complexfloating)
    )
    if not same:
        return None
    committed = isinstance(like, jax.Array) and not isinstance(like, Tracer) and like.committed
    sharding = like.sharding if committed or isinstance(like, jax.ShapeDtypeStruct) else None
    if isinstance(value, jax.Array):
        array = jnp.array(value, dtype=target, copy=True)
        return array if sharding is None or not place else jax.device_put(array, sharding)
    array = np.array(value, dtype=target, copy=True)
    if not place:
        return array
    # From the host, each device gets only its own part, and none gets the whole.
    return jnp.asarray(array) if sharding is None else jax.device_put(array, sharding)


def dtype_of(x: Any) -> Any:
    """The dtype of an array, a number, or a ShapeDtypeStruct."""
    return x.dtype if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x).dtype


def text_of(x: Any) -> str:
    """The dtype and the shape of a value."""
    dtype = x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
    return f"{dtype}[{','.join(map(str, np.shape(x)))}]"


def nested(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """Turn a flat mapping by path into nested dicts."""
    result: dict[str, Any] = {}
    for path, value in flat.items():
        at = result
        for name in path[:-1]:
            at = at.setdefault(name, {})
        at[path[-1]] = value
    return result
