"""A cache of keys and values: where new ones go, and which queries see them.

The token at position p is at index `p % room`, so a full cache forgets its oldest tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nnx.layers._sharding import placed_as

__all__ = ["append", "check_room", "seen", "within"]

Window = tuple[int | None, int | None]


def check_room(cache: tuple[int, ...], queries: tuple[int, ...], keys: tuple[int, ...]) -> None:
    """Raise if inputs of these shapes cannot be added to a cache of this shape."""
    *batch, room, _, _ = cache
    if queries[:-1] != keys[:-1] or queries[:-2] != tuple(batch):
        raise ValueError(
            f"MultiHeadAttention has a cache for inputs of shape {(*batch, room)}, (*batch, length), "
            f"and adds a key for each query, but got queries of shape {queries[:-1]} and keys of "
            f"shape {keys[:-1]}. Call init_cache for another batch. Pass decode=False for cross "
            f"attention."
        )
    if queries[-2] > room:
        raise ValueError(
            f"The cache of MultiHeadAttention has room for {room} tokens, but {queries[-2]} came in "
            f"one call. Make a longer one with init_cache, or pass fewer at a time."
        )


def append(cached: jax.Array, new: jax.Array, start: jax.Array | int) -> jax.Array:
    """The cached keys or values, with the new ones from position `start` on."""
    axis = cached.ndim - 3
    room, count = cached.shape[axis], new.shape[axis]
    cached, new = placed_as(cached, new, axis), new.astype(cached.dtype)
    if count == 1:
        return jax.lax.dynamic_update_slice_in_dim(cached, new, start % room, axis)
    pad = [(0, room - count if i == axis else 0, 0) for i in range(new.ndim)]
    turned = jnp.roll(jax.lax.pad(new, jnp.zeros((), new.dtype), pad), start % room, axis)
    is_new = (jnp.arange(room) - start) % room < count
    return jnp.where(is_new[:, None, None], turned, cached)


def seen(
    mask: jax.Array | None,
    start: jax.Array,
    count: int,
    room: int,
    window: Window | None,
    ndim: int,
) -> jax.Array:
    """The mask for queries from position `start` on: each sees itself and those before it.

    Args:
      mask: another mask; a query sees a key only if both masks allow it.
      start: the position of the first query.
      count: how many queries there are.
      room: length of the cache.
      window: how many positions before and after itself a query sees; None for all.
      ndim: how many axes queries have.
    """
    last = start + count - 1
    # The latest position at each index of the cache; less than 0 where there is none yet.
    positions = last - (last - jnp.arange(room)) % room
    at = start + jnp.arange(count)[:, None]
    causal = (positions >= 0) & (positions <= at)
    if window is not None:
        causal &= within(window, at, positions)
    causal = causal.reshape((1,) * (ndim - 2) + causal.shape)
    return causal if mask is None else jnp.logical_and(mask, causal)


def within(window: Window, queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Whether each key position is in the window of each query position."""
    before, after = window
    found = jnp.ones(jnp.broadcast_shapes(queries.shape, keys.shape), bool)
    if before is not None:
        found &= queries - keys <= before
    if after is not None:
        found &= keys - queries <= after
    return found
