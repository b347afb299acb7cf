"""Low-rank adapters beside convolutions, tables and einsums."""

from __future__ import annotations

import string

import jax
import jax.numpy as jnp

from nnx.layers._matrices import matrix_of
from nnx.layers._numerics import rows
from nnx.layers._out_sharding import OutSharding, wanted_sharding
from nnx.layers._sharding import placement
from nnx.layers.conv import Conv
from nnx.layers.embedding import Embed
from nnx.layers.linear_general import Einsum
from nnx.layers.lora import WithAdapter, added

__all__ = ["LoRAConv", "LoRAEinsum", "LoRAEmbed"]


class LoRAConv(WithAdapter, Conv):
    """A `Conv` with a low-rank adapter beside it; see `LoRA` and `apply_lora`.

    The adapter is a convolution over the same window to `lora_rank` channels, followed by a matrix from
    these to the output. With groups of channels, all groups have the same `lora_a`.

    Args:
      in_features, out_features, kernel_size, strides: as for `Conv`.
      lora_rank: the rank of the adapter.
      lora_dtype, lora_param_dtype, a_initializer, b_initializer, lora_param_type,
        lora_promote_dtype, a_metadata, b_metadata, alpha: as for `LoRA`.
      **kwargs: all other arguments of `Conv`.

    Attributes: `kernel` and `bias` as for `Conv`, and the adapter `lora`, with `lora_a` of shape
    `(inputs, lora_rank)`, where inputs is the size of the window times the channels of a group,
    and `lora_b` of shape `(lora_rank, out_features)`.

    Raises:
      ValueError: the layer has a mask, which would not apply to the adapter.

    >>> import jax, jax.numpy as jnp, nnx
    >>> conv = nnx.LoRAConv.init(jax.random.key(0))(3, 8, (5, 5), lora_rank=2)
    >>> conv(jnp.ones((1, 16, 16, 3))).shape, conv.lora.lora_a.shape
    ((1, 16, 16, 8), (75, 2))
    """

    def __call__(self, x: jax.Array, out_sharding: OutSharding = None) -> jax.Array:
        """Apply the layer, like a `Conv`."""
        y = super().__call__(x, out_sharding)
        x, a, b = self.lora.promoted(self._checked(x))
        narrow = wanted_sharding(self, placement(y), (0,) * y.ndim).without_last(y.ndim)
        groups, rank = self.feature_group_count, a.shape[-1]
        h = self._convolved(x, jnp.tile(a.reshape(*self.kernel_shape[:-1], rank), groups), narrow)
        h = h.reshape(*h.shape[:-1], groups, rank)
        low_rank = jnp.einsum("...gr,rgo->...go", h, b.reshape(rank, groups, -1))
        return added(y, self.lora.scaled(low_rank.reshape(y.shape)))


class LoRAEmbed(WithAdapter, Embed):
    """An `Embed` with a low-rank adapter beside it; see `LoRA` and `apply_lora`.

    Args:
      num_embeddings, features: as for `Embed`.
      lora_rank: the rank of the adapter.
      lora_dtype, lora_param_dtype, a_initializer, b_initializer, lora_param_type,
        lora_promote_dtype, a_metadata, b_metadata, alpha: as for `LoRA`. By default, the rows of
        `lora_a` have a length of about 1, because a lookup uses only one of them.
      **kwargs: all other arguments of `Embed`.

    Attributes: `embedding` as for `Embed`, and the adapter `lora`, with `lora_a` of shape
    `(num_embeddings, lora_rank)` and `lora_b` of shape `(lora_rank, features)`.

    >>> import jax, jax.numpy as jnp, nnx
    >>> embed = nnx.LoRAEmbed.init(jax.random.key(0))(50, 8, lora_rank=2)
    >>> embed(jnp.array([3, 4])).shape, embed.attend(jnp.ones(8)).shape
    ((2, 8), (50,))
    """

    def __call__(self, x: jax.Array, out_sharding: OutSharding = None) -> jax.Array:
        """Look up integers, like an `Embed`."""
        y = super().__call__(x, out_sharding)
        a = self.lora.lora_a
        found = jnp.broadcast_to(a, (*jnp.shape(x), a.shape[-1])) if len(a) == 1 else rows(a, x)
        found, b = self.lora.promote_dtype((found, self.lora.lora_b), dtype=self.lora.dtype)
        return added(y, self.lora.scaled(found @ b))

    def attend(self, query: jax.Array, out_sharding: OutSharding = None) -> jax.Array:
        """The product of each query with each row, like `Embed.attend`."""
        y = super().attend(query, out_sharding)
        query, a, b = self.lora.promoted(query)
        return added(y, self.lora.scaled((query @ b.T) @ a.T))


class LoRAEinsum(WithAdapter, Einsum):
    """An `Einsum` with a low-rank adapter beside it; see `LoRA` and `apply_lora`.

    The kernel axes that only the input has form the inputs of the adapter, as one axis. Those that only
    the output has form its outputs. For the axes that both have, each index has its own adapter.

    Args:
      einsum_str, kernel_shape, bias_shape: as for `Einsum`.
      lora_rank: the rank of the adapter.
      lora_dtype, lora_param_dtype, a_initializer, b_initializer, lora_param_type,
        lora_promote_dtype, a_metadata, b_metadata, alpha: as for `LoRA`.
      **kwargs: all other arguments of `Einsum`.

    Attributes: `kernel` and `bias` as for `Einsum`, and the adapter `lora`, with `lora_a` of shape
    `(*batch sizes, inputs, lora_rank)` and `lora_b` of shape `(*batch sizes, lora_rank, outputs)`.

    Raises:
      ValueError: the kernel has an ellipsis, the same axis twice, or an axis that is summed alone.

    >>> import jax, jax.numpy as jnp, nnx
    >>> layer = nnx.LoRAEinsum.init(jax.random.key(0))("nta,hab->nthb", (8, 2, 4), lora_rank=3)
    >>> layer(jnp.ones((16, 11, 2))).shape, layer.lora.lora_b.shape
    ((16, 11, 8, 4), (3, 32))
    """

    def __call__(
        self, x: jax.Array, einsum_str: str | None = None, out_sharding: OutSharding = None
    ) -> jax.Array:
        """Apply the layer; arguments and errors as for `Einsum`."""
        y = super().__call__(x, einsum_str, out_sharding)
        equation = self.einsum_str if einsum_str is None else einsum_str.replace(" ", "")
        left, right, result = self._parse(equation)
        matrix = matrix_of(self)
        rank = next(c for c in string.ascii_letters if c not in equation)
        x, a, b = self.lora.promoted(x)
        batch = matrix.sizes(matrix.batch)
        a = a.reshape(*batch, *matrix.sizes(matrix.inputs), -1)
        b = b.reshape(*batch, b.shape[-2], *matrix.sizes(matrix.outputs))
        of_a = "".join(right[i] for i in (*matrix.batch, *matrix.inputs)) + rank
        of_b = "".join(
            [*(right[i] for i in matrix.batch), rank, *(right[i] for i in matrix.outputs)]
        )
        low_rank = jnp.einsum(
            f"{left},{of_a},{of_b}->{result}", x, a, b, precision=self.precision, optimize="optimal"
        )
        return added(y, self.lora.scaled(low_rank))
