"""A multilayer perceptron."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnx.layers._common import Dtype, Initializer, default_kernel_init, zeros
from nnx.layers._out_sharding import OutSharding, explain_sharding
from nnx.layers.linear import Linear
from nnx.layers.stochastic import Dropout
from nnx.module import Module

__all__ = ["MLP"]


class MLP(Module):
    """A multilayer perceptron: linear layers with an activation, and dropout, between them.

    Args:
      in_features: size of the last axis of the input.
      hidden_features: size of the hidden layer, or sizes of several; an empty list gives one linear layer.
      out_features: size of the last axis of the output; by default `in_features`.
      activation: a function or module to apply after each hidden layer.
      final_activation: a function or module to apply at the end.
      dropout_rate: the probability that an element of a hidden layer is dropped; see `Dropout`.
      use_bias, dtype, param_dtype, precision, kernel_init, bias_init: as for `Linear`.

    Attributes: `layers`, a list of `Linear`, and `dropout`.

    Raises:
      MissingStreamError: made outside a scope with a `"params"` stream.

    >>> import jax, jax.numpy as jnp, nnx
    >>> mlp = nnx.MLP.init(jax.random.key(0))(3, [16, 16], 1, activation=jnp.tanh)
    >>> mlp(jnp.ones((5, 3))).shape, len(mlp.layers)
    ((5, 1), 3)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | Sequence[int],
        out_features: int | None = None,
        *,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
        final_activation: Callable[[jax.Array], jax.Array] | None = None,
        dropout_rate: float = 0.0,
        use_bias: bool = True,
        dtype: Dtype = None,
        param_dtype: Dtype = jnp.float32,
        precision: Any = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = zeros,
    ):
        hidden = [hidden_features] if isinstance(hidden_features, int) else list(hidden_features)
        sizes = [in_features, *hidden, in_features if out_features is None else out_features]
        self.layers = [
            Linear(
                given,
                made,
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                precision=precision,
                kernel_init=kernel_init,
                bias_init=bias_init,
            )
            for given, made in itertools.pairwise(sizes)
        ]
        self.activation = activation
        self.final_activation = final_activation
        self.dropout = Dropout(dropout_rate) if dropout_rate else None

    def __call__(
        self,
        x: jax.Array,
        out_sharding: OutSharding = None,
        hidden_sharding: OutSharding = None,
    ) -> jax.Array:
        """Apply the layers to an input of shape `(..., in_features)`; errors as for `Linear`.

        Args:
          x: the input.
          out_sharding: how to shard the output, as for `Linear`.
          hidden_sharding: how to shard the output of each hidden layer.
        """
        given, says = x, "hidden_sharding"
        try:
            for layer in self.layers[:-1]:
                x = self.activation(layer(x, hidden_sharding))
                if self.dropout is not None:
                    x = self.dropout(x)
            says = "out_sharding"
            x = self.layers[-1](x, out_sharding)
        except Exception as error:
            explain_sharding(self, error, says, x=given)
            raise
        return x if self.final_activation is None else self.final_activation(x)
