"""A cache of keys and values: where new ones go, and who sees them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.core import Tracer

from nnx.layers._sharding import placed_as

__all__ = ["append", "check_room", "seen"]


def check_room(
    index: jax.Array, cache: tuple[int, ...], queries: tuple[int, ...], keys: tuple[int, ...]
) -> None:
    """Raise if inputs of these shapes cannot be added to a cache that is filled up to `index`."""
    *batch, room, _, _ = cache
    if queries[:-1] != keys[:-1] or queries[:-2] != tuple(batch):
        raise ValueError(
            f"MultiHeadAttention has a cache for inputs of shape {(*batch, room)}, (*batch, length), "
            f"and adds a key for each query, but got queries of shape {queries[:-1]} and keys of "
            f"shape {keys[:-1]}. Call init_cache for another batch; pass decode=False for cross "
            f"attention."
        )
    length = queries[-2]
    traced = isinstance(index, Tracer)
    if length > room or (not traced and int(index) + length > room):
        taken = "" if traced else f", of which {int(index)} are taken"
        raise ValueError(
            f"The cache of MultiHeadAttention has room for {room} tokens{taken}, but {length} more "
            f"came. Make a longer one with init_cache, or empty it by calling init_cache again."
        )


def append(cached: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """What is cached, with the new keys or values from position `start` on."""
    axis = cached.ndim - 3
    cached = placed_as(cached, new, axis)
    return jax.lax.dynamic_update_slice_in_dim(cached, new.astype(cached.dtype), start, axis)


def seen(mask: jax.Array | None, start: jax.Array, query: jax.Array, keys: jax.Array) -> jax.Array:
    """The mask for queries that start at `start`: each sees itself and those before."""
    at = start + jnp.arange(query.shape[-3])
    causal = jnp.arange(keys.shape[-3]) <= at[:, None]
    causal = causal.reshape((1,) * (query.ndim - 2) + causal.shape)
    return causal if mask is None else jnp.logical_and(mask, causal)
