"""Arrays on a mesh with explicit axes, where the sharding of an array is part of its type."""

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
    """Whether `x` is an array on one device: a quick way to see that nothing is to be placed."""
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
    """How the type of `x` says that it is sharded, along no axis it may be; None without a mesh."""
    mesh = explicit_mesh(x)
    return None if mesh is None else NamedSharding(mesh, PartitionSpec(*spec_of(x)))


def spec_of(x: Any) -> list[Any]:
    """The mesh axes of each axis of `x`, as its type says; None where it is not sharded."""
    return _axes(_explicit(x), jnp.ndim(x))


def shards(x: Any, axis: int) -> int:
    """In how many parts the type of `x` says that an axis is."""
    sharding = _explicit(x)
    if sharding is None:
        return 1
    return math.prod(sharding.mesh.shape[name] for name in names_in(_axes(sharding, x.ndim)[axis]))


def _explicit(x: Any) -> NamedSharding | None:
    """The sharding that the type of `x` says; None where nothing is sharded or XLA is to choose."""
    sharding: Any = jax.typeof(x).sharding
    if not any(sharding.spec):
        return None
    # That of a type is without devices, which only a trace can do without.
    concrete = None if isinstance(x, Tracer) else getattr(x, "sharding", None)
    return concrete if isinstance(concrete, NamedSharding) else sharding


def _axes(sharding: NamedSharding | None, ndim: int) -> list[Any]:
    spec: Any = () if sharding is None else sharding.spec
    return [*spec, *(None,) * (ndim - len(spec))]


def explicit_axes(x: jax.Array) -> set[int]:
    """The axes of `x` that its type says are sharded."""
    return {i for i, axis in enumerate(_axes(_explicit(x), jnp.ndim(x))) if axis is not None}


def dropped(x: jax.Array, rate: float, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Zero with the probability `rate`, and else scaled by `1 / (1 - rate)`.

    Args:
      x: any array.
      rate: from 0 to less than 1.
      key: what to draw with.
      shape: one that broadcasts to that of `x`: of the draws.
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
    """Rows of a table, sharded as is said, or as the indices are and in the last axis as the table."""
    if sharding is not None:
        return table.at[indices].get(mode="fill", out_sharding=sharding)
    of_indices, of_table = _explicit(indices), _explicit(table)
    if of_indices is None and of_table is None:
        return jnp.take(table, indices, axis=0)
    along, features = _axes(of_indices, indices.ndim), _axes(of_table, 2)[1]
    taken = {name for axis in along for name in names_in(axis)}
    # A mesh axis that shards the indices already cannot shard the features as well.
    if taken.intersection(names_in(features)):
        features = None
    mesh = (of_indices or of_table).mesh  # pyright: ignore[reportOptionalMemberAccess]
    sharding = NamedSharding(mesh, PartitionSpec(*along, features))
    return table.at[indices].get(mode="fill", out_sharding=sharding)


def placed_as(x: jax.Array, like: jax.Array, axes: int, start: int = 0) -> jax.Array:
    """`x` with its first axes sharded as axes of `like`, where these have a sharding.

    Args:
      x: an array whose first axes are among those of `like`.
      like: an array.
      axes: how many axes that are.
      start: where in `like` they begin.
    """
    wanted, along = _explicit(like), slice(start, start + axes)
    if wanted is None or jnp.shape(x)[:axes] != like.shape[along]:
        return x
    own = _axes(_explicit(x), jnp.ndim(x))
    spec = PartitionSpec(*_axes(wanted, like.ndim)[along], *own[axes:])
    return _put(x, NamedSharding(wanted.mesh, spec))


def fitted(parameter: jax.Array, shape: Sequence[int], like: jax.Array) -> jax.Array:
    """A parameter in a shape that broadcasts to `like`, sharded as the last axes of `like` are.

    So what a layer returns is sharded as its input, or its product, wherever the parameter is kept.
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
        # A reshape that splits a sharded axis is more than JAX does.
        spec = []
    if spec != _axes(own, parameter.ndim):
        parameter = _put(parameter, NamedSharding(own.mesh, PartitionSpec(*spec)))
    return parameter.reshape(sizes)


def as_placed(new: jax.Array, old: jax.Array) -> jax.Array:
    """A new value sharded as the old one, so that a Ref keeps its placement."""
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
    """Keys and values where the queries are: their batch and heads, and the whole length.

    Where there are fewer heads than devices for them, a device has a copy of those that it needs.
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
    """`x` with its first axes as one, which is sharded along the mesh axes of all of them."""
    shape = (math.prod(x.shape[:axes]), *x.shape[axes:])
    sharding = _explicit(x)
    if sharding is None:
        return x.reshape(shape)
    return _reshaped(x, shape, sharding, merged_spec(_axes(sharding, x.ndim), axes))


def merged_spec(spec: Sequence[Any], axes: int) -> PartitionSpec:
    """What a spec becomes where the first axes are merged."""
    names = tuple(name for axis in spec[:axes] for name in names_in(axis))
    return PartitionSpec(entry_of(names), *spec[axes:])


def unmerged(y: jax.Array, batch: Sequence[int], spec: Sequence[Any]) -> jax.Array:
    """`y` with axes of the sizes `batch`, sharded as `spec` says, in the place of its first."""
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
    # Outside of a trace it may be on other devices.
    return jax.device_put(x, sharding)
