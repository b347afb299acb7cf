"""Attention as plain functions of queries, keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nnx.layers._common import Dtype, promote_dtype
from nnx.layers._sharding import dropped, heads_beside
from nnx.module import Module
from nnx.probe import sow

__all__ = ["dot_product_attention", "dot_product_attention_weights"]


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Dtype = None,
    precision: Any = None,
    promote_dtype: Callable[..., Any] = promote_dtype,
    is_causal: bool = False,
    module: Module | None = None,
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762).

    It calls `jax.nn.dot_product_attention` where that suffices. Otherwise (dropout, a `precision`,
    float64) it computes the same: logits and softmax are in at least float32.

    On a mesh with Explicit axes, the result is sharded like the query. Keys and values are moved to the
    queries, which must be whole along their features.

    Args:
      query: an array of shape `(*batch, query length, heads, features)`.
      key: an array of shape `(*batch, key length, key heads, features)`. The number of heads is a multiple
        of the key heads; each key head serves neighbouring query heads (https://arxiv.org/abs/2305.13245).
      value: an array of shape `(*batch, key length, key heads, value features)`.
      bias: added to the logits; broadcasts to `(*batch, heads, query length, key length)`.
      mask: where it is 0 or False, a query does not see a key; broadcasts to the same shape. A query
        that sees no key gets the mean of all values.
      broadcast_dropout: drop the same weights in every batch entry and head.
      dropout_rng: a key, needed if weights are dropped.
      dropout_rate: the probability that a weight is dropped.
      deterministic: drop nothing.
      dtype: dtype of the computation; by default, the dtype that the three arrays promote to.
      precision: precision of the products, as for `jax.lax.dot_general`.
      promote_dtype: a function for the casts, called with `(query, key, value), dtype=`.
      is_causal: let query i see only the keys 0 to i.
      module: a module for which to store the weights, before dropout, as `attention_weights` (`nnx.sow`).

    Returns:
      An array of shape `(*batch, query length, heads, value features)`.

    Raises:
      ValueError: the shapes do not fit each other; dropout has no key.

    >>> import jax, jax.numpy as jnp, nnx
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 4, 8))
    >>> nnx.dot_product_attention(q, k, v, is_causal=True).shape
    (2, 5, 4, 8)
    """
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    _check_shapes(query, key, value)
    key, value = heads_beside(query, key, value)
    drops = dropout_rate > 0 and not deterministic
    # JAX's function computes logits in float32 whatever the dtype, and has no float16 on CPU.
    fits = query.dtype in (jnp.float32, jnp.bfloat16) and key.shape == value.shape
    if fits and not drops and precision is None and module is None:
        return _plain(query, key, value, bias, mask, is_causal)
    weights = dot_product_attention_weights(
        query,
        key,
        bias,
        mask,
        broadcast_dropout=broadcast_dropout,
        dropout_rng=dropout_rng,
        dropout_rate=dropout_rate,
        deterministic=deterministic,
        dtype=query.dtype,
        precision=precision,
        promote_dtype=promote_dtype,
        is_causal=is_causal,
        module=module,
    )
    heads, groups = query.shape[-2], value.shape[-2]
    shape = (*weights.shape[:-3], groups, heads // groups, *weights.shape[-2:])
    out = jnp.einsum("...kgts,...skh->...tkgh", weights.reshape(shape), value, precision=precision)
    return out.reshape(*out.shape[:-3], heads, value.shape[-1])


def dot_product_attention_weights(
    query: jax.Array,
    key: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Dtype = None,
    precision: Any = None,
    promote_dtype: Callable[..., Any] = promote_dtype,
    is_causal: bool = False,
    module: Module | None = None,
) -> jax.Array:
    """The weights with which `dot_product_attention` sums the values; the arguments are the same.

    Returns:
      An array of shape `(*batch, heads, query length, key length)`; without dropout its last axis
      sums to 1.

    >>> import jax, jax.numpy as jnp, nnx
    >>> q, k = jax.random.normal(jax.random.key(0), (2, 3, 1, 8))
    >>> nnx.dot_product_attention_weights(q, k, is_causal=True)[0, 0].tolist()
    [1.0, 0.0, 0.0]
    """
    query, key = promote_dtype((query, key), dtype=dtype)
    _check_shapes(query, key, key)
    (key,) = heads_beside(query, key)
    heads, groups = query.shape[-2], key.shape[-2]
    grouped = query.reshape(*query.shape[:-2], groups, heads // groups, query.shape[-1])
    # Compute as jax.nn does, so that training with dropout and evaluation round alike.
    wide = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum(
        "...tkgh,...skh->...kgts",
        grouped,
        key,
        precision=precision,
        preferred_element_type=wide,
    )
    logits = logits.reshape(*logits.shape[:-4], heads, *logits.shape[-2:])
    logits = logits * (query.shape[-1] ** -0.5)
    if bias is not None:
        logits = logits + bias.astype(wide)
    seen = None if mask is None else mask.astype(bool)
    if is_causal:
        causal = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        seen = causal if seen is None else seen & causal
    if seen is not None:
        logits = jnp.where(seen, logits, -0.7 * float(jnp.finfo(wide).max))
    weights = jax.nn.softmax(logits).astype(query.dtype)
    if module is not None:
        sow(module, "attention_weights", weights)
    if deterministic or dropout_rate == 0:
        return weights
    if dropout_rng is None:
        raise ValueError(
            f"dot_product_attention has a dropout_rate of {dropout_rate}, so it needs a key. "
            f"Pass dropout_rng=jax.random.key(...), or deterministic=True to drop nothing."
        )
    if dropout_rate >= 1:
        return jnp.zeros_like(weights)
    shape = weights.shape
    if broadcast_dropout:
        shape = (1,) * (len(shape) - 2) + shape[-2:]
    return dropped(weights, dropout_rate, dropout_rng, shape)


def _plain(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    is_causal: bool,
) -> jax.Array:
    """`jax.nn.dot_product_attention`, for any number of batch axes."""
    batch = query.shape[:-3]
    if mask is not None:
        mask = mask.astype(bool)
    if len(batch) != 1:
        query, key, value = (
            x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value)
        )
    out = jax.nn.dot_product_attention(
        query, key, value, _one_batch(bias, batch), _one_batch(mask, batch), is_causal=is_causal
    )
    return out if len(batch) == 1 else out.reshape(*batch, *out.shape[-3:])


def _one_batch(x: jax.Array | None, batch: tuple[int, ...]) -> jax.Array | None:
    """A mask or bias with exactly one batch axis, of size 1 if it is the same for the whole batch."""
    if x is None:
        return None
    x = x.reshape((1,) * (len(batch) + 3 - x.ndim) + x.shape)
    if math.prod(x.shape[:-3]) == 1:
        return x.reshape(1, *x.shape[-3:])
    return jnp.broadcast_to(x, batch + x.shape[-3:]).reshape(math.prod(batch), *x.shape[-3:])


def _check_shapes(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    arrays = (query, key, value)
    if (
        min(x.ndim for x in arrays) < 3
        or len({x.shape[:-3] for x in arrays}) > 1
        or query.shape[-1] != key.shape[-1]
        or key.shape[-3] != value.shape[-3]
        or query.shape[-2] % key.shape[-2]
        or query.shape[-2] % value.shape[-2]
    ):
        raise ValueError(
            f"dot_product_attention expects a query of shape (*batch, query length, heads, "
            f"features), a key of shape (*batch, key length, key heads, features) and a value of "
            f"shape (*batch, key length, key heads, value features), where the number of heads is a "
            f"multiple of the number of key heads, but got shapes {query.shape}, {key.shape} and "
            f"{value.shape}."
        )
