"""Arrays on a mesh with explicit axes, where the sharding of an array is part of its type."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, reshard

__all__ = ["dropped", "explicit_axes", "looked_up", "placed_as"]


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


def looked_up(table: jax.Array, indices: jax.Array) -> jax.Array:
    """Rows of a table, sharded as the indices are and, in the last axis, as the table is."""
    of_indices, of_table = _explicit(indices), _explicit(table)
    if of_indices is None and of_table is None:
        return jnp.take(table, indices, axis=0)
    along, features = _axes(of_indices, indices.ndim), _axes(of_table, 2)[1]
    taken = {name for axis in along for name in _names(axis)}
    # A mesh axis that shards the indices already cannot shard the features as well.
    if taken.intersection(_names(features)):
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


def _put(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    if isinstance(sharding.mesh, AbstractMesh):
        return reshard(x, sharding)
    # Outside of a trace it may be on other devices.
    return jax.device_put(x, sharding)


def _names(axis: Any) -> tuple[Any, ...]:
    if axis is None:
        return ()
    return axis if isinstance(axis, tuple) else (axis,)
