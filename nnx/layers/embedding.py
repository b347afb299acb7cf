"""Tables of vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from nnx.fields import param
from nnx.layers._common import (
    Dtype,
    Initializer,
    Metadata,
    as_array,
    new_ref,
    promote_dtype,
    shape_error,
)
from nnx.layers._numerics import rows, wide
from nnx.layers._out_sharding import OutSharding, explain_sharding, wanted_sharding
from nnx.module import Module

__all__ = ["Embed"]

_default_embedding_init: Initializer = initializers.variance_scaling(
    1.0, "fan_in", "normal", out_axis=0
)


class Embed(Module):
    """A table of vectors, one for each integer from 0 to `num_embeddings - 1`.

    An index out of range gives NaN: compiled code cannot raise, and a clipped index would silently
    train another row. Negative indices down to `-num_embeddings` count from the end. A table with one
    row returns that row for every index.

    Args:
      num_embeddings: number of rows.
      features: size of a row.
      dtype: dtype of the result; by default, the dtype of the table at the time of the call.
      param_dtype: dtype of the table.
      embedding_init: initializer, called with a key, a shape and a dtype.
      promote_dtype: a function for the casts, called with the rows, `(rows,), dtype=`, or by `attend`
        with `(query, embedding), dtype=`.
      embedding_metadata: metadata of the Ref.

    Attributes: `embedding` of shape `(num_embeddings, features)` in the collection `"params"`.

    Raises:
      MissingStreamError: made outside a scope with a `"params"` stream.

    >>> import jax, jax.numpy as jnp, nnx
    >>> embed = nnx.Embed.init(jax.random.key(0))(5, 3)
    >>> embed(jnp.array([[0, 1], [4, -1]])).shape
    (2, 2, 3)
    >>> bool(jnp.isnan(embed(jnp.array(5))).all())
    True
    """

    embedding: jax.Array = param()

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        dtype: Dtype = None,
        param_dtype: Dtype = jnp.float32,
        embedding_init: Initializer = _default_embedding_init,
        promote_dtype: Callable[..., Any] = promote_dtype,
        embedding_metadata: Metadata = {},  # noqa: B006 — never changed
    ):
        shape = (num_embeddings, features)
        self.embedding = new_ref(  # pyright: ignore[reportAttributeAccessIssue]
            embedding_init, shape, param_dtype, embedding_metadata
        )
        self.num_embeddings = num_embeddings
        self.features = features
        self._dtype = dtype
        self.param_dtype = param_dtype
        self.promote_dtype = promote_dtype

    @property
    def dtype(self) -> Dtype:
        """The dtype of the result: the constructor's argument, or else the dtype of the table."""
        return self._dtype or self.embedding.dtype

    @dtype.setter
    def dtype(self, dtype: Dtype) -> None:
        self._dtype = dtype

    def __call__(self, x: jax.Array, out_sharding: OutSharding = None) -> jax.Array:
        """Look up integers of any shape; the result has an additional last axis of size `features`.

        Args:
          x: the integers.
          out_sharding: how to shard the result, as for `Linear`. On a mesh with Explicit axes, it is by
            default sharded like the integers, and along the last axis like the table.

        Raises:
          ValueError: the dtype is not an integer dtype; `out_sharding` does not fit.
        """
        x = as_array(self, x)
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(
                f"{type(self).__name__}({self.num_embeddings}, {self.features}) looks up integers, "
                f"but got an input of dtype {x.dtype} and shape {x.shape}. Cast it with "
                f"x.astype(jnp.int32), or use a Linear for vectors."
            )
        table = self.embedding
        wanted = wanted_sharding(self, out_sharding, (*x.shape, table.shape[-1]), x, table)
        if self.num_embeddings == 1:
            shape = (*x.shape, self.features)
            row = table.astype(wide(table.dtype))
            found = jnp.broadcast_to(row, shape, **wanted.options).astype(table.dtype)
        else:
            found = rows(table, x, wanted.explicit)
        # Cast only now, so that the gradient of the table is summed in the dtype of the table.
        return wanted.constrained(self.promote_dtype((found,), dtype=self.dtype)[0])

    def attend(self, query: jax.Array, out_sharding: OutSharding = None) -> jax.Array:
        """The product of each query with each row: logits from the same table as the inputs.

        The initial rows have a length of about 1, which suits logits. Models that use one table for
        both often multiply the rows that they look up by the square root of `features`.

        Args:
          query: an array of shape `(..., features)`.
          out_sharding: how to shard the result, as for `Linear`.

        Returns:
          An array of shape `(..., num_embeddings)`.

        Raises:
          ValueError: the last axis has the wrong size; the message has both shapes. Or `out_sharding`
            is missing or does not fit.

        >>> import jax, jax.numpy as jnp, nnx
        >>> nnx.Embed.init(jax.random.key(0))(5, 3).attend(jnp.ones((2, 3))).shape
        (2, 5)
        """
        if not jnp.ndim(query) or jnp.shape(query)[-1] != self.features:
            raise shape_error(self, "a query", f"(..., {self.features})", jnp.shape(query))
        query, embedding = self.promote_dtype((query, self.embedding), dtype=self.dtype)
        if out_sharding is None:
            try:
                return query @ embedding.T
            except Exception as error:
                explain_sharding(self, error, query=query, embedding=embedding)
                raise
        wanted = wanted_sharding(
            self, out_sharding, (*query.shape[:-1], len(embedding)), query, embedding
        )
        return wanted.constrained(jnp.dot(query, embedding.T, **wanted.options))
