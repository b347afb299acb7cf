"""Layers that draw random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from nnx.layers._common import as_array, evaluates
from nnx.layers._sharding import dropped
from nnx.module import Module

__all__ = ["Dropout"]


class Dropout(Module):
    """Dropout (Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html).

    It sets each element to zero with probability `rate`, and scales the others by
    `1 / (1 - rate)`. Keys come from the scope: call it in `nnx.scope(key)` or with
    `model.apply(rngs=key)`.

    Args:
      rate: the probability that an element is dropped, from 0 to 1.
      broadcast_dims: axes along which all elements are dropped together.
      deterministic: return the input unchanged. These override it, in this order: the argument of the
        call, the scope flag of this name, the opposite of the scope flag `training`. `model.train()` and
        `model.eval()` set it.
      rng_collection: name of the random stream.

    Raises:
      ValueError: `rate` is not between 0 and 1.

    >>> import jax, jax.numpy as jnp, nnx
    >>> drop = nnx.Dropout(0.5)
    >>> float(drop.apply(rngs=jax.random.key(0))(jnp.ones(1000)).mean()) > 0
    True
    >>> float(drop.apply(training=False)(jnp.ones(1000)).mean())
    1.0
    """

    def __init__(
        self,
        rate: float,
        *,
        broadcast_dims: Sequence[int] = (),
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
    ):
        if not 0 <= rate <= 1:
            raise ValueError(
                f"The rate of Dropout must be a probability, from 0 to 1, but got {rate}."
            )
        self.rate = rate
        self.broadcast_dims = tuple(broadcast_dims)
        self.deterministic = deterministic
        self.rng_collection = rng_collection

    def __call__(
        self,
        x: jax.Array,
        *,
        deterministic: bool | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """Drop elements of `x`; the shape stays the same, and so does a floating-point dtype.

        Args:
          x: any array.
          deterministic: whether to return `x` unchanged.
          rng: a key to use instead of the next one from the stream.

        Raises:
          MissingStreamError: a key is needed, but no stream gives one.
          MissingFlagError: `deterministic` is None everywhere.
        """
        if evaluates(self, "deterministic", deterministic) or self.rate == 0:
            return x
        x = as_array(self, x)
        if self.rate == 1:
            return jnp.zeros_like(x)
        shape = list(x.shape)
        for axis in self.broadcast_dims:
            shape[axis] = 1
        key = self.make_rng(self.rng_collection) if rng is None else rng
        return dropped(x, self.rate, key, tuple(shape))
