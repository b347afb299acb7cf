"""Pooling to a fixed number of positions, whatever the size of the input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx.layers._sharding import gathered

__all__ = ["adaptive_avg_pool", "adaptive_max_pool"]


def adaptive_avg_pool(inputs: jax.Array, output_shape: int | Sequence[int | None]) -> jax.Array:
    """Average over windows, one for each position of the output, divided as in PyTorch.

    Output position i of n is the average of the input positions from `floor(i * size / n)` to
    `ceil((i + 1) * size / n)`. Sums are in at least float32; integers give float32.

    Args:
      inputs: of shape `(*batch, *spatial, channels)`, with any number of batch axes.
      output_shape: the number of positions along each spatial axis; None leaves an axis as it is. An
        int means a single spatial axis.

    Returns:
      An array of shape `(*batch, *output_shape, channels)`.

    Raises:
      ValueError: too few axes, an empty axis, or an output without positions.

    >>> import jax.numpy as jnp, nnx
    >>> nnx.adaptive_avg_pool(jnp.arange(5.0)[:, None], 3).ravel().tolist()
    [0.5, 2.0, 3.5]
    >>> nnx.adaptive_avg_pool(jnp.ones((2, 9, 7, 4)), (1, None)).shape
    (2, 1, 7, 4)
    """
    if not jnp.issubdtype(inputs.dtype, jnp.inexact):
        inputs = inputs.astype(jnp.float32)
    wide = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))

    def reduce(windows: jax.Array, valid: jax.Array, axis: int) -> jax.Array:
        return jnp.mean(windows, axis, where=valid)

    return _pooled(wide, output_shape, reduce).astype(inputs.dtype)


def adaptive_max_pool(inputs: jax.Array, output_shape: int | Sequence[int | None]) -> jax.Array:
    """The maximum over windows, one for each position of the output; otherwise like `adaptive_avg_pool`.

    >>> import jax.numpy as jnp, nnx
    >>> nnx.adaptive_max_pool(jnp.arange(5)[:, None], 3).ravel().tolist()
    [1, 3, 4]
    """

    def reduce(windows: jax.Array, valid: jax.Array, axis: int) -> jax.Array:
        # Positions beyond the window repeat its last one.
        del valid
        return jnp.max(windows, axis)

    return _pooled(inputs, output_shape, reduce)


def _pooled(
    inputs: jax.Array,
    output_shape: int | Sequence[int | None],
    reduce: Callable[[jax.Array, jax.Array, int], Any],
) -> jax.Array:
    """Pool along one axis after the other, because each window is a product of intervals."""
    sizes = (output_shape,) if isinstance(output_shape, int) else tuple(output_shape)
    first = inputs.ndim - 1 - len(sizes)
    if first < 0:
        raise ValueError(
            f"Pooling to {sizes} expects inputs of shape (*batch, {', '.join('*' * len(sizes))}, "
            f"channels), but got {tuple(inputs.shape)}."
        )
    for axis, count in enumerate(sizes, first):
        size = inputs.shape[axis]
        if count is None or count == size:
            continue
        if count < 1 or size < 1:
            raise ValueError(
                f"Pooling to {sizes} needs at least one position along each axis of input and output, "
                f"but the inputs have the shape {tuple(inputs.shape)}."
            )
        starts = np.arange(count) * size // count
        ends = -(-(np.arange(count) + 1) * size // count)
        places = starts[:, None] + np.arange(max(ends - starts))
        valid = (places < ends[:, None]).reshape(places.shape + (1,) * (inputs.ndim - 1 - axis))
        windows = jnp.take(gathered(inputs, [axis]), np.minimum(places, ends[:, None] - 1), axis)
        inputs = reduce(windows, jnp.asarray(valid), axis + 1)
    return inputs
