"""Pooling: the maximum, minimum or average over windows of positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx.layers._numerics import wide

__all__ = ["avg_pool", "max_pool", "min_pool", "pool"]

Padding = str | Sequence[tuple[int, int]]


def pool(
    inputs: jax.Array,
    init: Any,
    reduce_fn: Callable[[jax.Array, jax.Array], jax.Array],
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
) -> jax.Array:
    """Reduce each window of positions to a single value, channel by channel.

    The reductions of the other functions here have gradients. Others may not.

    Args:
      inputs: of shape `(*batch, *spatial, channels)`, with any number of batch axes, or none,
        and as many spatial axes as the window has.
      init: the start value of the reduction, and the value of the padding.
      reduce_fn: a function of two arrays, such as `jax.lax.max`.
      window_shape: size of the window along each spatial axis.
      strides: steps from window to window along each spatial axis; by default 1.
      padding: `"SAME"`, `"VALID"`, or for each spatial axis a pair (before, after).

    Raises:
      ValueError: too few axes, or the number of strides or paddings does not match the window;
        the message has both.

    >>> import jax, jax.numpy as jnp, nnx
    >>> x = jnp.arange(1.0, 5.0).reshape(1, 4, 1)
    >>> nnx.pool(x, 1.0, jax.lax.mul, (2,), (2,)).ravel().tolist()
    [2.0, 12.0]
    """
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        return _pool(inputs, init, reduce_fn, window_shape, strides, padding)
    x = _widened(inputs)
    start = init.astype(x.dtype) if hasattr(init, "astype") else init
    return _pool(x, start, reduce_fn, window_shape, strides, padding).astype(inputs.dtype)


def _pool(
    inputs: jax.Array,
    init: Any,
    reduce_fn: Callable[[jax.Array, jax.Array], jax.Array],
    window_shape: Sequence[int],
    strides: Sequence[int] | None,
    padding: Padding,
) -> jax.Array:
    window = tuple(window_shape)
    steps = (1,) * len(window) if strides is None else tuple(strides)
    batch = inputs.ndim - len(window) - 1
    if batch < 0:
        raise ValueError(
            f"Pooling with the window {window} expects inputs of shape (*batch, "
            f"{', '.join('*' * len(window))}, channels), but got {tuple(inputs.shape)}."
        )
    if len(steps) != len(window):
        raise ValueError(
            f"Pooling with the window {window} needs {len(window)} strides, but got {steps}."
        )
    if not isinstance(padding, str):
        pairs = list(padding)
        if len(pairs) != len(window) or any(np.shape(pair) != (2,) for pair in pairs):
            raise ValueError(
                f"Pooling with the window {window} needs a pair (before, after) for each of its "
                f"{len(window)} axes as padding, but got {padding!r}."
            )
        padding = [(0, 0)] * batch + [(a, b) for a, b in pairs] + [(0, 0)]
    ones = (1,) * batch
    return jax.lax.reduce_window(
        inputs, init, reduce_fn, (*ones, *window, 1), (*ones, *steps, 1), padding
    )


def max_pool(
    inputs: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
) -> jax.Array:
    """The maximum of each window; arguments and errors as for `pool`.

    Raises:
      ValueError: the values have no order, such as complex numbers.

    >>> import jax.numpy as jnp, nnx
    >>> nnx.max_pool(jnp.ones((2, 28, 28, 8)), (2, 2), (2, 2)).shape
    (2, 14, 14, 8)
    """
    x = _widened(inputs)
    least = _extremes(x)[0]
    return pool(x, least, jax.lax.max, window_shape, strides, padding).astype(inputs.dtype)


def min_pool(
    inputs: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
) -> jax.Array:
    """The minimum of each window; arguments and errors as for `pool`.

    Raises:
      ValueError: the values have no order, such as complex numbers.

    >>> import jax.numpy as jnp, nnx
    >>> nnx.min_pool(jnp.arange(4.0)[:, None], (2,)).ravel().tolist()
    [0.0, 1.0, 2.0]
    """
    x = _widened(inputs)
    greatest = _extremes(x)[1]
    return pool(x, greatest, jax.lax.min, window_shape, strides, padding).astype(inputs.dtype)


def avg_pool(
    inputs: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
    count_include_pad: bool = True,
) -> jax.Array:
    """The average of each window; arguments and errors as for `pool`. Integers give float32.

    Args:
      count_include_pad: whether the zeros of the padding count as positions of the window.

    >>> import jax.numpy as jnp, nnx
    >>> x = jnp.full((3, 1), 6.0)
    >>> nnx.avg_pool(x, (3,), padding="SAME").ravel().tolist()
    [4.0, 6.0, 4.0]
    >>> nnx.avg_pool(x, (3,), padding="SAME", count_include_pad=False).ravel().tolist()
    [6.0, 6.0, 6.0]
    """
    if not jnp.issubdtype(inputs.dtype, jnp.inexact):
        inputs = inputs.astype(jnp.float32)
    dtype = inputs.dtype
    inputs = inputs.astype(wide(dtype))
    total = _pool(inputs, 0.0, jax.lax.add, window_shape, strides, padding)
    if count_include_pad:
        return (total / math.prod(window_shape)).astype(dtype)
    # The count is the same for each batch and channel.
    axes = len(window_shape)
    spatial = inputs.shape[-axes - 1 : -1]
    one = jnp.ones((*(1,) * (inputs.ndim - axes - 1), *spatial, 1), inputs.dtype)
    return (total / _pool(one, 0.0, jax.lax.add, window_shape, strides, padding)).astype(dtype)


def _widened(x: jax.Array) -> jax.Array:
    """Floats in at least float32, so that gradients are summed in at least float32 too."""
    return x.astype(wide(x.dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _extremes(x: jax.Array) -> tuple[Any, Any]:
    """The least and the greatest value of a dtype, as constants, because gradients need them."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        greatest = np.array(np.inf, x.dtype)
        if np.isinf(greatest):
            return -greatest, greatest
        # Some dtypes of eight bits or fewer have no infinity.
        info = jnp.finfo(x.dtype)
    elif x.dtype == jnp.bool_:
        return np.array(False), np.array(True)
    elif jnp.issubdtype(x.dtype, jnp.integer):
        info = jnp.iinfo(x.dtype)
    else:
        raise ValueError(
            f"max_pool and min_pool need values that have an order, but got inputs of dtype "
            f"{x.dtype} and shape {tuple(x.shape)}. Pool jnp.abs(x), or pool the real and imaginary "
            f"parts separately."
        )
    return np.array(info.min, x.dtype), np.array(info.max, x.dtype)
