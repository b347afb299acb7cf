"""Activations with parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nnx.fields import param
from nnx.layers._common import Dtype, Metadata, as_array, promote_dtype
from nnx.layers._numerics import broadcast
from nnx.module import Module
from refx import Ref

__all__ = ["PReLU"]


class PReLU(Module):
    """`x` where it is positive, otherwise a learned multiple of it (https://arxiv.org/abs/1502.01852).

    Args:
      negative_slope_init: the initial slope: a number, or an array that broadcasts to the input, such as
        one slope for each channel.
      dtype: dtype of the result; by default the dtype of the input.
      param_dtype: dtype of the slope.
      promote_dtype: a function for the casts, called with `(x, negative_slope), dtype=`.
      negative_slope_metadata: metadata of the Ref.

    Attributes: `negative_slope`, of shape `()`, in the collection `"params"`.

    >>> import jax.numpy as jnp, nnx
    >>> nnx.PReLU(0.25)(jnp.array([-4.0, 2.0])).tolist()
    [-1.0, 2.0]
    """

    negative_slope: jax.Array = param()

    def __init__(
        self,
        negative_slope_init: Any = 0.01,
        *,
        dtype: Dtype = None,
        param_dtype: Dtype = jnp.float32,
        promote_dtype: Callable[..., Any] = promote_dtype,
        negative_slope_metadata: Metadata = {},  # noqa: B006 — never changed
    ):
        slope = jnp.asarray(negative_slope_init, param_dtype)
        self.negative_slope = Ref(slope, "params", **negative_slope_metadata)  # pyright: ignore
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.promote_dtype = promote_dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the activation to an array of any shape; the result has the same shape.

        Raises:
          ValueError: the slope is an array that does not broadcast to the input; the message has
            both shapes.
        """
        x = as_array(self, x)
        shape = self.negative_slope.shape
        try:
            fits = jnp.broadcast_shapes(shape, x.shape) == x.shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"{type(self).__name__} has a negative_slope of shape {shape}, which does not "
                f"broadcast to an input of shape {tuple(x.shape)}."
            )
        # A slope of higher precision must not change the dtype of the activations.
        dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else None
        dtype = dtype if self.dtype is None else self.dtype
        x, slope = self.promote_dtype((x, self.negative_slope), dtype=dtype)
        return jnp.where(x >= 0, x, broadcast(jnp.multiply, x, slope))
