"""Decide which arrays of a file to read, and where to put each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx.serialize.decode import decode, decode_state
from nnx.serialize.dtypes import dtype_of, has_bad_bits
from nnx.serialize.errors import LoadError
from nnx.serialize.fitting import Fitting
from nnx.serialize.grammar import Damaged, check
from nnx.sharding.placing import shardings, with_places
from nnx.sharding.putting import put, put_keys
from nnx.sharding.rules import current_mesh
from refx import Partition, Ref, get_partition

__all__: list[str] = []


ReadArray = Callable[[str, str, tuple[int, ...]], np.ndarray]


def shape_of(code: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype that stand for an array."""
    if "key" in code:
        like = jax.eval_shape(lambda: jax.random.key(0, impl=code["key"]))
        return jax.ShapeDtypeStruct(tuple(code["shape"]), like.dtype)
    return jax.ShapeDtypeStruct(tuple(code["shape"]), dtype_of(code["dtype"]))


class Plan:
    """For each array of a file, by name: whether to read it, and its sharding.

    Attributes:
      shapes: stand-ins for the arrays that are not read.
      shardings: the sharding of each array that has one.
    """

    def __init__(self) -> None:
        self.shapes: dict[str, jax.ShapeDtypeStruct] = {}
        self.shardings: dict[str, Any] = {}

    def from_file(self, read: ReadArray) -> Callable[[str, Any], Any]:
        """Gives an array of a single file, by its name and its description in the structure."""

        def new_array(name: str, code: Any) -> Any:
            if name in self.shapes:
                return self.shapes[name]
            return on_devices(name, code, _read(name, code, read), self.shardings.get(name))

        return new_array

    def from_directory(self, reader: Any) -> Callable[[str, Any], Any]:
        """Gives an array of a directory, by its name and its description. All are read at once."""
        codes = check(reader.structure).arrays
        wanted = {name: self.shardings.get(name) for name in codes if name not in self.shapes}
        values = reader.store(codes).read(wanted)

        def new_array(name: str, code: Any) -> Any:
            if name in self.shapes:
                return self.shapes[name]
            return on_devices(name, code, values[name], self.shardings.get(name))

        return new_array


def _read(name: str, code: Any, read: ReadArray) -> np.ndarray:
    if "key" in code:
        like = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=code["key"])))
        return read(name, "uint32", (*code["shape"], *like.shape))
    dtype_of(code["dtype"])
    return read(name, code["dtype"], tuple(code["shape"]))


def on_devices(name: str, code: Any, x: Any, sharding: Any) -> Any:
    """Turn the data that was read into an array of the right dtype, on its devices."""
    if "key" in code:
        return put_keys(x, code["key"], sharding)
    if isinstance(x, jax.Array):
        return x
    if has_bad_bits(x):
        raise Damaged(f"its array {name!r} has bits that are not a valid {x.dtype}")
    if "numpy" in code:
        return x
    if jnp.result_type(x.dtype) != x.dtype:
        raise LoadError(
            f"the array {name!r} is {x.dtype}, which JAX would turn into "
            f"{jnp.result_type(x.dtype)}. Allow it with jax.config.update('jax_enable_x64', True)"
        )
    return put(x, sharding)


class _Shapes:
    """The shapes that stand for the arrays of a file during decoding, and the name of each."""

    def __init__(self) -> None:
        # Keep the shapes alive, so that an id stays unique.
        self._by_id: dict[int, tuple[str, Any]] = {}
        self._numpy: set[str] = set()

    def new(self, name: str, code: Any) -> Any:
        """The shape of an array, from its description in the structure."""
        shape = shape_of(code)
        self._by_id[id(shape)] = name, shape
        if "numpy" in code:
            self._numpy.add(name)
        return shape

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self._by_id.values())

    def names_in(self, tree: Any) -> set[str]:
        """The names of the arrays in a tree."""
        leaves = jax.tree.leaves(tree)
        return {self._by_id[id(x)][0] for x in leaves if id(x) in self._by_id}

    def on_devices(self, shape: Any) -> str | None:
        """The name of an array, if it is a JAX array."""
        name, _ = self._by_id.get(id(shape), (None, None))
        return None if name in self._numpy else name


def plan_tree(structure: Any, names: Any, only: Any, specs: Any, axes: Any, mesh: Any) -> Plan:
    """The plan of `load`, with its arguments."""
    plan = Plan()
    here = mesh if mesh is not None else current_mesh()
    placed = not (specs is None and axes is None and here is None)
    if only is ... and not placed:
        return plan
    if isinstance(here, jax.sharding.AbstractMesh) and only is not None:
        raise LoadError(
            "the mesh is abstract, so it has no devices. Pass only=None to get shapes, or use a "
            "mesh from jax.make_mesh"
        )
    shapes = _Shapes()
    tree = decode(structure, names, shapes.new)
    if isinstance(tree, Partition):
        tree = _nested(tree)
    chosen = get_partition(tree, only)
    wanted = shapes.names_in(list(chosen.values()))
    if placed:
        where = shardings(tree, specs, axes=axes, mesh=mesh)
        for path, value in get_partition(tree).items():
            for x, sharding in with_places(value, where[path]):
                if (name := shapes.on_devices(x)) is not None:
                    plan.shardings[name] = sharding
    for name, x in shapes:
        if name not in wanted:
            sharding = plan.shardings.get(name)
            plan.shapes[name] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return plan


def _nested(partition: Partition) -> Any:
    """A tree with Refs at the paths of a Partition."""
    root: Any = {}
    for path, value in partition.items():
        if not path:
            return Ref(value)
        at = root
        for part in path[:-1]:
            at = at.setdefault(part, {})
        at[path[-1]] = Ref(value)
    return root


def plan_state(structure: Any, names: Any, fitting: Fitting) -> Plan:
    """The plan of `load_state`: arrays that fit the model go where its own values are."""
    plan = Plan()
    shapes = _Shapes()
    wanted: set[str] = set()
    for path, value in decode_state(structure, names, shapes.new).items():
        if fitting.wants(path):
            wanted |= shapes.names_in(value)
        for shape, sharding in fitting.places_of(path, value):
            name = shapes.on_devices(shape)
            if name is not None and sharding is not None:
                plan.shardings[name] = sharding
    for name, x in shapes:
        if name not in wanted:
            plan.shapes[name] = x
    return plan
