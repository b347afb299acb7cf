"""Write values by path into an existing tree: find what fits, then write everything or nothing."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from nnx.layers._unrolled import NOTHING, Spot, Unrolled, named, part_of, stacked, take
from nnx.serialize.errors import LoadError
from nnx.sharding.putting import place_of, put_like
from refx import EndedTraceError, Ref
from refx.access import peek
from refx.dag import dtype_of, update
from refx.dagdef import Leaf, NodeDef, RefDef, Tree
from refx.filters import Filter, to_predicate
from refx.node import Node, attributes
from refx.partition import Path, dotted, listed
from refx.selection import check_selection
from refx.trace import EVAL, current_trace
from refx.walk import walk

__all__ = ["LoadReport"]


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """The result of `load_state`, or of a function of `nnx.bridge` with `strict=False`.

    Attributes:
      loaded: the paths that were read; for a shared Ref, its canonical path.
      missing: paths of the model that the file does not have.
      unexpected: paths of the file that the model does not have.
      mismatched: paths whose shape or dtype differs, with the shape and dtype in the file and in the model.
      skipped: names in the file that the caller's name map drops.
    """

    loaded: tuple[Path, ...]
    missing: tuple[Path, ...]
    unexpected: tuple[Path, ...]
    mismatched: dict[Path, tuple[str, str]]
    skipped: tuple[Path, ...] = ()

    def __repr__(self) -> str:
        lines = [f"{len(self.loaded)} loaded"]
        if self.missing:
            lines.append(f"missing in the file: {_named(self.missing)}")
        if self.unexpected:
            lines.append(f"unexpected in the file: {_named(self.unexpected)}")
        lines += [
            f"{_short(dotted(path))!r} is {_short(there, 150)} in the file and {_short(here, 150)} in "
            f"the model"
            for path, (there, here) in itertools.islice(self.mismatched.items(), 8)
        ]
        if len(self.mismatched) > 8:
            lines.append(f"and {len(self.mismatched) - 8} more that differ")
        if self.skipped:
            lines.append(f"skipped: {_named(self.skipped)}")
        return f"LoadReport({'; '.join(lines)})"


def _named(paths: tuple[Path, ...]) -> str:
    # A file may hold any number of names, of any length.
    return listed([_short(dotted(path)) for path in paths[:8]] + list(paths[8:]))


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


class Fitting:
    """Finds which values of a file fit into a tree.

    Args:
      tree: the tree.
      only: a filter that selects what to read into the tree; all other values are ignored.

    Raises:
      LoadError: the tree holds tracers.
    """

    def __init__(self, tree: Any, only: Filter = ...):
        self._tree = tree
        found = walk(tree)
        self._dagdef = found.dagdef
        self._refs: list[Ref[Any]] = found.refs
        self._ref_paths = found.dagdef.ref_paths
        self._old: dict[Path, Any] = {
            path: _outside(path, ref) for path, ref in zip(self._ref_paths, found.refs, strict=True)
        }
        self._arrays = dict(zip(found.dagdef.leaf_paths, found.leaves, strict=True))
        self._places = dict(zip(found.dagdef.leaf_paths, found.places, strict=True))
        for path, x in self._arrays.items():
            _check_outside(path, x)
        self._chosen = self._choose(only, found.refs)
        # Set a Node's attributes through the Node, not in its dict.
        self._nodes = {id(attributes(x)): x for x in found.containers if isinstance(x, Node)}
        self._by_dots: dict[str, Path] = {}
        for path in (*self._old, *self._arrays):
            self._by_dots.setdefault(dotted(path), path)
        self._ref_numbers = {
            n: i
            for i, n in enumerate(i for i, d in enumerate(self._dagdef.nodes) if type(d) is RefDef)
        }
        self._children: dict[int, dict[str, Any]] = {}
        # For each value, including those that do not fit: its source and the value.
        self._given: dict[Path, tuple[Path, Any]] = {}
        self._new: dict[Path, Any] = {}
        # The layers of a Stack that the file stores one by one, by path and number; and their
        # levels.
        self._layers: dict[Path, dict[tuple[int, ...], Any]] = {}
        self._levels: dict[Path, tuple[int, ...]] = {}
        self._missing: list[Path] = []
        self._unexpected: list[Path] = []
        self._mismatched: dict[Path, tuple[str, str]] = {}
        self._unrolled = Unrolled(tree)

    def add_all(self, values: dict[Path, Any]) -> None:
        """Take the values of a file: canonical paths first, then other paths to the same Refs."""
        for given in sorted(values, key=lambda path: path not in self._old):
            self._add(given, values[given])
        for path in self._layers:
            self._join(path)

    def _add(self, given: Path, value: Any) -> None:
        path = self._find(given)
        if path is None:
            self._add_layers(given, value)
        elif self._is_chosen(path):
            self._add_to(path, given, value)

    def _choose(self, only: Filter, refs: list[Ref[Any]]) -> frozenset[Path] | None:
        """The paths to read, or None for all."""
        if only is ...:
            return None
        predicate = to_predicate(only)
        items = (*zip(self._ref_paths, refs, strict=True), *self._arrays.items())
        chosen = frozenset(path for path, x in items if predicate(path, x))
        if not chosen:
            check_selection(only, self._tree)
        return chosen

    def _is_chosen(self, path: Path) -> bool:
        return self._chosen is None or path in self._chosen

    def places_of(self, given: Path, value: Any) -> Iterable[tuple[Any, Any]]:
        """For each array in the file's values: the array and its future sharding.

        Here an array may be a `ShapeDtypeStruct`. An array that is not used as it is has no sharding.
        """
        path = self._find(given)
        if path is None or not self._is_chosen(path):
            return
        leaves, olds = jax.tree.leaves(value), jax.tree.leaves(self._current(path))
        if _text(leaves) != _text(olds) or len(leaves) != len(olds):
            return
        for new, old in zip(leaves, olds, strict=True):
            yield new, place_of(old)

    def wants(self, given: Path) -> bool:
        """Whether the value at this path of the file may go into the tree."""
        path = self._find(given)
        if path is None:
            spots = self._unrolled.spots(dotted(given).split("."))
            paths = [self._find(spot.path) for spot in spots]
            return self._chosen is None or any(p is not None and p in self._chosen for p in paths)
        return self._is_chosen(path)

    def _add_layers(self, given: Path, value: Any) -> None:
        """Take a list's value for a Stack, or a Stack's value for a list."""
        spots = self._unrolled.spots(dotted(given).split("."))
        paths = [self._find(spot.path) for spot in spots]
        if any(spot.at is NOTHING for spot in spots) or None in paths or not spots:
            if self._chosen is None:
                self._unexpected.append(given)
            return
        for spot, path in zip(spots, paths, strict=True):
            assert path is not None
            if not self._is_chosen(path):
                continue
            try:
                part = part_of(value, spot)
            except ValueError:
                there, here = _text(jax.tree.leaves(value)), f"{spot.part[0][1]} layers"
                self._mismatched[given] = (there, here)
                return
            if spot.indices:
                self._add_layer(spot, path, given, part)
            else:
                self._add_to(path, given, part)

    def _add_layer(self, spot: Spot, path: Path, given: Path, value: Any) -> None:
        old = self._current(path)
        if any(np.ndim(x) < len(spot.indices) for x in jax.tree.leaves(old)):
            self._unexpected.append(given)
            return
        like = jax.tree.map(lambda x: take(_shape(x), spot.indices), old)
        there, here = _text(jax.tree.leaves(value)), _text(jax.tree.leaves(like))
        layers = self._layers.setdefault(path, {})
        self._levels[path] = spot.levels
        before = layers.get(spot.indices)
        if path in self._given and path not in self._mismatched:
            before = jax.tree.map(lambda x: take(x, spot.indices), self._given[path][1])
        if there != here or jax.tree.structure(value) != jax.tree.structure(like):
            self._mismatched[spot.name] = (there, here)
        elif before is not None and not _equal(before, value):
            self._mismatched[spot.name] = (f"{there} twice, with different values", here)
        layers[spot.indices] = value

    def _join(self, path: Path) -> None:
        """Stack the values of the layers into one."""
        if path in self._given:
            return
        layers, old = self._layers[path], self._current(path)
        count = len(self._levels[path])
        leaves = jax.tree.leaves(old)
        lead = np.shape(leaves[0])[:count] if leaves else ()
        for index in np.ndindex(*lead):
            name = named(path, self._levels[path], index)
            if index in layers and name not in self._mismatched:
                continue
            if index not in layers:
                self._missing.append(name)
            if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
                # A part of a shape cannot be filled.
                self._given[path] = (path, None)
                return
            layers[index] = jax.tree.map(lambda x: x[index], old)  # noqa: B023 — used at once
        value = stacked(layers, lead)
        self._given[path] = (path, value)
        self._compare(path, jax.tree.map(lambda x, y: _cast(x, dtype_of(y)), value, old))

    def _current(self, path: Path) -> Any:
        return self._arrays[path] if path in self._arrays else self._old[path]

    def _add_to(self, path: Path, given: Path, value: Any) -> None:
        if path not in self._given:
            self._given[path] = (given, value)
            self._compare(path, value)
        elif not _equal(self._given[path][1], value):
            # All names of a tied weight load the same Ref, so their values must agree.
            first = self._given[path][0]
            there = f"{_text(jax.tree.leaves(value))} with other values than {dotted(first)!r}"
            self._mismatched[given] = (there, f"tied to {dotted(path)!r}")

    def _find(self, given: Path) -> Path | None:
        """The canonical path of the Ref or array at a path."""
        if given in self._old or given in self._arrays:
            return given
        name = dotted(given)
        if name in self._by_dots:
            return self._by_dots[name]
        child = self._dagdef.root
        for part in name.split("."):
            child = self._parts(child).get(part)
            if child is None:
                return None
        if type(child) is int and child in self._ref_numbers:
            return self._ref_paths[self._ref_numbers[child]]
        return self._dagdef.leaf_paths[child.number] if type(child) is Leaf else None

    def _parts(self, child: Any) -> dict[str, Any]:
        if type(child) is int:
            child = self._dagdef.nodes[child]
        if not isinstance(child, NodeDef | Tree):
            return {}
        if id(child) not in self._children:
            names = map(str, child.names)
            self._children[id(child)] = dict(zip(names, child.children, strict=True))
        return self._children[id(child)]

    def _compare(self, path: Path, value: Any) -> None:
        is_array = path in self._arrays
        old = self._current(path)
        new_leaves, new_tree = jax.tree.flatten(value)
        old_leaves, old_tree = jax.tree.flatten(old)
        there, here = _text(new_leaves), _text(old_leaves)
        fits = there in (here, _text(map(_canonical, old_leaves)))
        if new_tree != old_tree and fits:
            there, here = str(new_tree), str(old_tree)
        elif fits and is_array and self._places[path][0] is None:
            here += ", but in a tuple, which cannot change (keep it in a list, or in a Ref),"
            fits = False
        if new_tree != old_tree or not fits:
            self._mismatched[path] = (there, here)
            return
        placed = [put_like(a, b) for a, b in zip(new_leaves, old_leaves, strict=True)]
        self._new[path] = jax.tree.unflatten(old_tree, placed)

    def _all(self) -> Iterable[Path]:
        return (p for p in (*self._old, *self._arrays) if self._is_chosen(p))

    def report(self) -> LoadReport:
        """What was found."""
        return LoadReport(
            tuple(self._new),
            (*(p for p in self._all() if p not in self._given), *self._missing),
            tuple(self._unexpected),
            self._mismatched,
        )

    def write(self) -> None:
        """Write what fits."""
        done: list[tuple[Any, Any, Any]] = []
        try:
            for path, value in self._new.items():
                if path in self._arrays:
                    content, name = self._places[path]
                    done.append((content, name, self._arrays[path]))
                    self._set(content, name, value)
            update(self._tree, {p: v for p, v in self._new.items() if p in self._old})
        except BaseException:
            for content, name, value in reversed(done):
                self._set(content, name, value)
            raise

    def _set(self, content: Any, name: Any, value: Any) -> None:
        node = self._nodes.get(id(content))
        if node is not None:
            setattr(node, name, value)
        else:
            content[name] = value


def _outside(path: Path, ref: Ref[Any]) -> Any:
    try:
        value = peek(ref)
    except EndedTraceError as error:
        raise LoadError(f"The Ref at {dotted(path)!r} cannot take a value. {error}") from error
    for x in jax.tree.leaves(value):
        _check_outside(path, x)
    return value


def _check_outside(path: Path, x: Any) -> None:
    if not isinstance(x, Tracer):
        return
    if current_trace(()) is EVAL:
        raise LoadError(
            f"The value at {dotted(path)!r} is a tracer of a transformation that has ended, so it "
            "cannot take a value. Return the model from the transformed function, or make it "
            "again."
        )
    raise LoadError(
        f"The value at {dotted(path)!r} is a tracer: nnx.load_state was called inside a "
        "transformation, which would keep the file's present content as a constant. Call it "
        "outside, before the step."
    )


def _equal(a: Any, b: Any) -> bool:
    a_leaves, a_tree = jax.tree.flatten(a)
    b_leaves, b_tree = jax.tree.flatten(b)
    return a_tree == b_tree and all(map(_equal_leaves, a_leaves, b_leaves))


def _equal_leaves(a: Any, b: Any) -> bool:
    if _text([a]) != _text([b]):
        return False
    if hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    a, b = np.asarray(a), np.asarray(b)
    # Compare the bits, so that NaN equals itself.
    return a.tobytes() == b.tobytes() if not a.dtype.hasobject else bool((a == b).all())


def _canonical(x: Any) -> Any:
    # JAX would convert it anyway: NumPy's float64 becomes float32.
    return jax.ShapeDtypeStruct(x.shape, dtype_of(x)) if isinstance(x, np.ndarray) else x


def _shape(x: Any) -> Any:
    return jax.ShapeDtypeStruct(np.shape(x), dtype_of(x))


def _cast(x: Any, dtype: Any) -> Any:
    # Stacking has turned Python's numbers into int64 or float64.
    return x if x.dtype == dtype else x.astype(dtype)


def _text(leaves: Iterable[Any]) -> str:
    shapes = []
    for x in leaves:
        if isinstance(x, int | float | complex):
            # JAX would convert it the same way: a counter may begin as a Python number.
            shapes.append(f"{jnp.result_type(x)}[]")
        elif hasattr(x, "dtype"):
            shapes.append(f"{x.dtype}[{','.join(map(str, np.shape(x)))}]")
        else:
            shapes.append(type(x).__name__)
    return ", ".join(shapes) or "nothing"
