"""Masks for attention: which keys each query may see.

A mask broadcasts to `(*batch, heads, query length, key length)`; where it is 0 or False, the query
does not see the key.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nnx.layers._common import Dtype

__all__ = [
    "combine_masks",
    "make_attention_mask",
    "make_causal_mask",
    "make_padding_mask",
    "make_window_mask",
]


def make_attention_mask(
    query_input: jax.Array,
    key_input: jax.Array,
    pairwise_fn: Callable[..., jax.Array] = jnp.multiply,
    extra_batch_dims: int = 0,
    dtype: Dtype = jnp.float32,
) -> jax.Array:
    """A mask computed from every pair of a query entry and a key entry.

    Args:
      query_input: an array of shape `(*batch, query length)`, for example 1 for each real token.
      key_input: an array of shape `(*batch, key length)`.
      pairwise_fn: a function that compares elementwise, with broadcasting.
      extra_batch_dims: number of axes of size 1 to put before the others.
      dtype: dtype of the mask.

    Returns:
      A mask of shape `(*batch, 1, query length, key length)`.

    >>> import jax.numpy as jnp, nnx
    >>> document = jnp.array([0, 0, 1])
    >>> nnx.make_attention_mask(document, document, jnp.equal, dtype=int)[0].tolist()
    [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """
    query_input, key_input = jnp.asarray(query_input), jnp.asarray(key_input)
    mask = pairwise_fn(query_input[..., :, None], key_input[..., None, :])[..., None, :, :]
    return mask.reshape((1,) * extra_batch_dims + mask.shape).astype(dtype)


def make_causal_mask(
    x: jax.Array, extra_batch_dims: int = 0, dtype: Dtype = jnp.float32
) -> jax.Array:
    """A mask that lets each position see itself and the positions before it.

    Args:
      x: an array of shape `(*batch, length)`; only its shape is used.
      extra_batch_dims: number of axes of size 1 to put before the others.
      dtype: dtype of the mask.

    Returns:
      A mask of shape `(*batch, 1, length, length)`.

    >>> import jax.numpy as jnp, nnx
    >>> nnx.make_causal_mask(jnp.ones(3), dtype=int)[0].tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """
    at = _positions(x)
    return make_attention_mask(at, at, jnp.greater_equal, extra_batch_dims, dtype)


def make_window_mask(
    x: jax.Array,
    before: int,
    after: int = 0,
    extra_batch_dims: int = 0,
    dtype: Dtype = jnp.float32,
) -> jax.Array:
    """A mask that lets each position see itself and its neighbours (https://arxiv.org/abs/2004.05150).

    Args:
      x: an array of shape `(*batch, length)`; only its shape is used.
      before: how many positions before itself it sees.
      after: how many positions after itself it sees; with 0 the mask is causal.
      extra_batch_dims: number of axes of size 1 to put before the others.
      dtype: dtype of the mask.

    Returns:
      A mask of shape `(*batch, 1, length, length)`.

    >>> import jax.numpy as jnp, nnx
    >>> nnx.make_window_mask(jnp.ones(4), before=1, dtype=int)[0].tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """
    at = _positions(x)

    def near(query: jax.Array, key: jax.Array) -> jax.Array:
        return (query - key <= before) & (key - query <= after)

    return make_attention_mask(at, at, near, extra_batch_dims, dtype)


def make_padding_mask(
    lengths: jax.Array, length: int, extra_batch_dims: int = 0, dtype: Dtype = jnp.float32
) -> jax.Array:
    """A mask that hides the padding at the end of each sequence.

    Args:
      lengths: an array of shape `batch`: how many entries of each sequence are real.
      length: length of the sequences, including the padding.
      extra_batch_dims: number of axes of size 1 to put before the others.
      dtype: dtype of the mask.

    Returns:
      A mask of shape `(*batch, 1, 1, length)`, the same for every query.

    >>> import jax.numpy as jnp, nnx
    >>> nnx.make_padding_mask(jnp.array([1, 3]), 3, dtype=int)[:, 0, 0].tolist()
    [[1, 0, 0], [1, 1, 1]]
    """
    mask = (jnp.arange(length) < jnp.asarray(lengths)[..., None])[..., None, None, :]
    return mask.reshape((1,) * extra_batch_dims + mask.shape).astype(dtype)


def combine_masks(*masks: jax.Array | None, dtype: Dtype = jnp.float32) -> jax.Array | None:
    """A mask that lets a query see a key only if all of these masks do.

    Args:
      *masks: masks with the same number of axes, and shapes that broadcast; None is ignored.
      dtype: dtype of the mask.

    Returns:
      A mask, or None if all masks are None.

    Raises:
      ValueError: the masks do not have the same number of axes.

    >>> import jax.numpy as jnp, nnx
    >>> mask = nnx.combine_masks(
    ...     nnx.make_causal_mask(jnp.ones((2, 3))), nnx.make_padding_mask(jnp.array([1, 3]), 3)
    ... )
    >>> mask.shape, mask[0, 0].sum(axis=-1).tolist()
    ((2, 1, 3, 3), [1.0, 1.0, 1.0])
    """
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    if len({mask.ndim for mask in given}) > 1:
        raise ValueError(
            f"combine_masks needs masks with the same number of axes, (*batch, heads, query length, "
            f"key length), but got shapes {', '.join(str(mask.shape) for mask in given)}."
        )
    combined = given[0]
    for mask in given[1:]:
        combined = jnp.logical_and(combined, mask)
    return combined.astype(dtype)


def _positions(x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(jnp.shape(x)[-1]), jnp.shape(x))
