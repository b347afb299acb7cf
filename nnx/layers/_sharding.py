"""Arrays on a mesh with Explicit axes, where the sharding of an array is part of its type."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import (
    AbstractMesh,
    AxisType,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
    reshard,
)

from nnx.sharding.rules import entry_of, names_in

__all__ = [
    "as_placed",
    "dropped",
    "explicit_axes",
    "explicit_mesh",
    "fitted",
    "gathered",
    "heads_beside",
    "looked_up",
    "merged",
    "merged_spec",
    "on_one_device",
    "placed_as",
    "placement",
    "shards",
    "spec_of",
    "unmerged",
]


def on_one_device(x: Any) -> bool:
    """Whether `x` is an array on one device: a quick test that nothing needs placing."""
    return not isinstance(x, Tracer) and type(getattr(x, "sharding", None)) is SingleDeviceSharding


def explicit_mesh(*arrays: Any) -> Any:
    """The mesh with explicit axes that the types of arrays name, or None."""
    for x in arrays:
        if x is None or on_one_device(x):
            continue
        mesh: Any = jax.typeof(x).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            concrete = None if isinstance(x, Tracer) else getattr(x, "sharding", None)
            return concrete.mesh if isinstance(concrete, NamedSharding) else mesh
    return None


def placement(x: Any) -> NamedSharding | None:
    """The sharding in the type of `x`, perhaps along no axis; None without a mesh."""
    mesh = explicit_mesh(x)
    return None if mesh is None else NamedSharding(mesh, PartitionSpec(*spec_of(x)))


def spec_of(x: Any) -> list[Any]:
    """The mesh axes of each axis of `x`, from its type; None for an axis that is not sharded."""
    return _axes(_explicit(x), jnp.ndim(x))


def shards(x: Any, axis: int) -> int:
    """Into how many parts an axis of `x` is split, according to its type."""
    sharding = _explicit(x)
    if sharding is None:
        return 1
    return math.prod(sharding.mesh.shape[name] for name in names_in(_axes(sharding, x.ndim)[axis]))


def _explicit(x: Any) -> NamedSharding | None:
    """The sharding in the type of `x`; None if nothing is sharded or XLA chooses."""
    sharding: Any = jax.typeof(x).sharding
    if not any(sharding.spec):
        return None
    # The sharding in a type has no devices. Only a trace can do without them.
    concrete = None if isinstance(x, Tracer) else getattr(x, "sharding", None)
    return concrete if isinstance(concrete, NamedSharding) else sharding


def _axes(sharding: NamedSharding | None, ndim: int) -> list[Any]:
    spec: Any = () if sharding is None else sharding.spec
    return [*spec, *(None,) * (ndim - len(spec))]


def explicit_axes(x: jax.Array) -> set[int]:
    """The axes of `x` that are sharded according to its type."""
    return {i for i, axis in enumerate(_axes(_explicit(x), jnp.ndim(x))) if axis is not None}


def dropped(x: jax.Array, rate: float, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`x` with each element set to zero with probability `rate`, or else scaled by `1 / (1 - rate)`.

    Args:
      x: any array.
      rate: from 0 to less than 1.
      key: the random key.
      shape: the shape of the random draws; broadcasts to the shape of `x`.
    """
    sharding = _explicit(x)
    if sharding is None or shape != x.shape or not isinstance(x, Tracer):
        kept = jax.random.bernoulli(key, 1 - rate, shape)
        if sharding is not None:
            kept = _put(jnp.broadcast_to(kept, x.shape), sharding)
    else:
        # Each device draws its own part.
        kept = jax.random.bernoulli(key, 1 - rate, shape, out_sharding=sharding)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def looked_up(
    table: jax.Array, indices: jax.Array, sharding: NamedSharding | None = None
) -> jax.Array:
    """Rows of a table, by default sharded like the indices, and along the last axis like the table."""
    if sharding is not None:
        return table.at[indices].get(mode="fill", out_sharding=sharding)
    of_indices, of_table = _explicit(indices), _explicit(table)
    if of_indices is None and of_table is None:
        return jnp.take(table, indices, axis=0)
    along, features = _axes(of_indices, indices.ndim), _axes(of_table, 2)[1]
    taken = {name for axis in along for name in names_in(axis)}
    # A mesh axis that already shards the indices cannot also shard the features.
    if taken.intersection(names_in(features)):
        features = None
    mesh = (of_indices or of_table).mesh  # pyright: ignore[reportOptionalMemberAccess]
    sharding = NamedSharding(mesh, PartitionSpec(*along, features))
    return table.at[indices].get(mode="fill", out_sharding=sharding)


def placed_as(x: jax.Array, like: jax.Array, axes: int, start: int = 0) -> jax.Array:
    """`x` with its first axes sharded like axes of `like`, if those are sharded.

    Args:
      x: an array whose first axes are also axes of `like`.
      like: an array.
      axes: the number of these axes.
      start: where in `like` they begin.
    """
    wanted, along = _explicit(like), slice(start, start + axes)
    if wanted is None or jnp.shape(x)[:axes] != like.shape[along]:
        return x
    own = _axes(_explicit(x), jnp.ndim(x))
    spec = PartitionSpec(*_axes(wanted, like.ndim)[along], *own[axes:])
    return _put(x, NamedSharding(wanted.mesh, spec))


def fitted(parameter: jax.Array, shape: Sequence[int], like: jax.Array) -> jax.Array:
    """A parameter in a shape that broadcasts to `like`, sharded like the last axes of `like`.

    So the output of a layer is sharded like its input, or its product, wherever the parameter is.
    """
    own = None if on_one_device(parameter) else _explicit(parameter)
    if own is None:
        return parameter.reshape(shape)
    last = like.shape[like.ndim - len(shape) :]
    sizes = [n if size == -1 else size for size, n in zip(shape, last, strict=True)]
    along = zip(spec_of(like)[like.ndim - len(shape) :], sizes, last, strict=True)
    wanted = [axis if size == n else None for axis, size, n in along if size != 1]
    if [size for size in parameter.shape if size != 1] == [size for size in sizes if size != 1]:
        given = iter(wanted)
        spec = [None if size == 1 else next(given) for size in parameter.shape]
    else:
        # JAX cannot do a reshape that splits a sharded axis.
        spec = []
    if spec != _axes(own, parameter.ndim):
        parameter = _put(parameter, NamedSharding(own.mesh, PartitionSpec(*spec)))
    return parameter.reshape(sizes)


def as_placed(new: jax.Array, old: jax.Array) -> jax.Array:
    """A new value sharded like the old one, so that a Ref keeps its placement."""
    mesh = explicit_mesh(new)
    if mesh is None or spec_of(new) == spec_of(old):
        return new
    return _put(new, NamedSharding(mesh, PartitionSpec(*spec_of(old))))


def gathered(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """`x` with these axes whole on every device."""
    sharding = _explicit(x)
    own = _axes(sharding, jnp.ndim(x))
    spec = [None if i in axes else axis for i, axis in enumerate(own)]
    if sharding is None or spec == own:
        return x
    return _put(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def heads_beside(query: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
    """Keys and values placed like the queries: the same batch and heads, and the whole length.

    If there are fewer key heads than devices for them, each device gets a copy of the heads that it needs.
    """
    mesh = explicit_mesh(query, *others)
    if mesh is None or not any(any(spec_of(x)) for x in (query, *others)):
        return others
    *batch, _, heads, _ = spec_of(query)
    wanted = NamedSharding(mesh, PartitionSpec(*batch, None, heads, None))
    count = query.shape[-2]

    def placed(x: jax.Array) -> jax.Array:
        if x.shape[-2] % shards(query, query.ndim - 2):
            x = gathered(x, [x.ndim - 2])
            x = jnp.repeat(x, count // x.shape[-2], axis=-2)
        return x if spec_of(x) == [*wanted.spec] else _put(x, wanted)

    return tuple(map(placed, others))


def merged(x: jax.Array, axes: int) -> jax.Array:
    """`x` with its first axes merged into one, which is sharded along the mesh axes of all of them."""
    shape = (math.prod(x.shape[:axes]), *x.shape[axes:])
    sharding = _explicit(x)
    if sharding is None:
        return x.reshape(shape)
    return _reshaped(x, shape, sharding, merged_spec(_axes(sharding, x.ndim), axes))


def merged_spec(spec: Sequence[Any], axes: int) -> PartitionSpec:
    """The spec after the first axes are merged."""
    names = tuple(name for axis in spec[:axes] for name in names_in(axis))
    return PartitionSpec(entry_of(names), *spec[axes:])


def unmerged(y: jax.Array, batch: Sequence[int], spec: Sequence[Any]) -> jax.Array:
    """`y` with its first axis split into axes of the sizes `batch`, sharded according to `spec`."""
    shape = (*batch, *y.shape[1:])
    sharding = _explicit(y)
    if sharding is None:
        return y.reshape(shape)
    along = PartitionSpec(*spec, *_axes(sharding, y.ndim)[1:])
    return _reshaped(y, shape, sharding, along)


def _reshaped(x: jax.Array, shape: Any, sharding: NamedSharding, spec: PartitionSpec) -> jax.Array:
    if shape == x.shape:
        return x
    return jnp.reshape(x, shape, out_sharding=NamedSharding(sharding.mesh, spec))


def _put(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    if isinstance(sharding.mesh, AbstractMesh):
        return reshard(x, sharding)
    # Outside a trace, it may be on other devices.
    return jax.device_put(x, sharding)
