"""Recurrent cells: one step of a recurrent network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nnx.layers._cell import Cell, carried, cast, orthogonal, products
from nnx.layers._common import (
    Dtype,
    Initializer,
    Metadata,
    default_kernel_init,
    promote_dtype,
    zeros,
)
from nnx.layers.linear import Linear

__all__ = ["GRUCell", "LSTMCell", "OptimizedLSTMCell", "SimpleCell"]

LSTMCarry = tuple[jax.Array, jax.Array]


class LSTMCell(Cell):
    """Long short-term memory (Hochreiter and Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735).

    With the carry `(c, h)` and the input `x`, and `*` elementwise::

        i = gate_fn(ii(x) + hi(h))            f = gate_fn(if_(x) + hf(h))
        g = activation_fn(ig(x) + hg(h))      o = gate_fn(io(x) + ho(h))
        c' = f * c + i * g                    h' = o * activation_fn(c')

    Args:
      in_features: size of the last axis of the inputs.
      hidden_features: size of the last axis of the carry and of the output.
      gate_fn, activation_fn: elementwise functions.
      kernel_init: initializer of the kernels of the input.
      recurrent_kernel_init: initializer of the kernels of the hidden state.
      bias_init: initializer of the biases.
      dtype: dtype of the products and of the output; by default, the dtype that input and parameters
        promote to. The gates are computed in at least float32.
      param_dtype: dtype of the parameters, and so of the first carry.
      carry_init: initializer of the first carry; by default zeros.
      promote_dtype: a function for the casts, as for `Linear`.
      kernel_metadata, recurrent_kernel_metadata, bias_metadata: metadata of the Refs.

    Attributes: the `Linear`s `ii`, `if_`, `ig`, `io` of the input, without bias, and `hi`, `hf`,
    `hg`, `ho` of the hidden state, with bias.

    >>> import jax, jax.numpy as jnp, nnx
    >>> cell = nnx.LSTMCell.init(jax.random.key(0))(3, 4)
    >>> x = jnp.ones((2, 3))
    >>> carry, y = cell(cell.initialize_carry(x.shape), x)
    >>> y.shape, [a.shape for a in carry]
    ((2, 4), [(2, 4), (2, 4)])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        gate_fn: Callable[..., Any] = jax.nn.sigmoid,
        activation_fn: Callable[..., Any] = jnp.tanh,
        kernel_init: Initializer = default_kernel_init,
        recurrent_kernel_init: Initializer = orthogonal,
        bias_init: Initializer = zeros,
        dtype: Dtype = None,
        param_dtype: Dtype = jnp.float32,
        carry_init: Initializer | None = None,
        promote_dtype: Callable[..., Any] = promote_dtype,
        kernel_metadata: Metadata = {},  # noqa: B006 — never changed
        recurrent_kernel_metadata: Metadata = {},  # noqa: B006
        bias_metadata: Metadata = {},  # noqa: B006
    ):
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.gate_fn = gate_fn
        self.activation_fn = activation_fn
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.carry_init = carry_init
        self.promote_dtype = promote_dtype
        dense_i, dense_h = self._linears(
            kernel_init,
            recurrent_kernel_init,
            bias_init,
            promote_dtype,
            (kernel_metadata, recurrent_kernel_metadata, bias_metadata),
            gates=self._fused,
            input_bias=False,
        )
        self._make(dense_i, dense_h)

    _fused = 1
    _of_hidden = "hi"

    def _make(self, dense_i: Callable[[], Linear], dense_h: Callable[[], Linear]) -> None:
        self.ii, self.if_, self.ig, self.io = dense_i(), dense_i(), dense_i(), dense_i()
        self.hi, self.hf, self.hg, self.ho = dense_h(), dense_h(), dense_h(), dense_h()

    def _gates(self, x: jax.Array, h: jax.Array) -> Any:
        pairs = (self.ii, self.hi), (self.if_, self.hf), (self.ig, self.hg), (self.io, self.ho)
        found = [products(*pair, x, h) for pair in pairs]
        return found[0][0], [a + b for _, a, b in found]

    def __call__(self, carry: LSTMCarry, inputs: jax.Array) -> tuple[LSTMCarry, jax.Array]:
        """One step: `((c, h), x) -> ((c', h'), h')`.

        Args:
          carry: two arrays of shape `(*batch, hidden_features)`.
          inputs: of shape `(*batch, in_features)`.

        Raises:
          ValueError: the last axis of one of them has the wrong size; the message has both shapes.
        """
        c, h = carry
        self._check(inputs, c, h)
        dtype, (i, f, g, o) = self._gates(inputs, h)
        new_c = self.gate_fn(f) * c + self.gate_fn(i) * self.activation_fn(g)
        new_h = self.gate_fn(o) * self.activation_fn(new_c)
        return (carried(new_c, c, dtype), carried(new_h, h, dtype)), cast(new_h, dtype)

    def initialize_carry(
        self, input_shape: tuple[int, ...], carry_init: Initializer | None = None
    ) -> LSTMCarry:
        """The first `(c, h)`, each of shape `(*batch, hidden_features)`; see `RNNCellBase`."""
        return self._first(input_shape, carry_init), self._first(input_shape, carry_init)


class OptimizedLSTMCell(LSTMCell):
    """An `LSTMCell` that computes its four gates in one product: the same function, usually faster.

    Args: as for `LSTMCell`.

    Attributes: the `Linear`s `dense_i` of the input, without bias, with a kernel of shape
    `(in_features, 4 * hidden_features)`, and `dense_h` of the hidden state, with bias, of shape
    `(hidden_features, 4 * hidden_features)`. The gates are in the order i, f, g, o.

    >>> import jax, jax.numpy as jnp, nnx
    >>> cell = nnx.OptimizedLSTMCell.init(jax.random.key(0))(3, 4)
    >>> x = jnp.ones((2, 3))
    >>> carry, y = cell(cell.initialize_carry(x.shape), x)
    >>> y.shape, cell.dense_i.kernel.shape
    ((2, 4), (3, 16))
    """

    _fused = 4
    _of_hidden = "dense_h"

    def _make(self, dense_i: Callable[[], Linear], dense_h: Callable[[], Linear]) -> None:
        self.dense_i, self.dense_h = dense_i(), dense_h()

    def _gates(self, x: jax.Array, h: jax.Array) -> Any:
        dtype, a, b = products(self.dense_i, self.dense_h, x, h)
        return dtype, jnp.split(a + b, 4, axis=-1)


class GRUCell(Cell):
    """Gated recurrent unit (Cho et al. 2014, https://arxiv.org/abs/1406.1078).

    With the carry `h` and the input `x`, and `*` elementwise. The `i` and `h` of each gate are
    thirds of `dense_i(x)` and of `dense_h(h)`::

        r = gate_fn(i_r + h_r)                z = gate_fn(i_z + h_z)
        n = activation_fn(i_n + r * h_n)      h' = (1 - z) * n + z * h

    Args: as for `LSTMCell`.

    Attributes: the `Linear`s `dense_i` of the input, with bias, with a kernel of shape
    `(in_features, 3 * hidden_features)`, and `dense_h` of the hidden state, without bias, of shape
    `(hidden_features, 3 * hidden_features)`. The gates are in the order r, z, n.

    >>> import jax, jax.numpy as jnp, nnx
    >>> cell = nnx.GRUCell.init(jax.random.key(0))(3, 4)
    >>> x = jnp.ones((2, 3))
    >>> carry, y = cell(cell.initialize_carry(x.shape), x)
    >>> y.shape
    (2, 4)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        gate_fn: Callable[..., Any] = jax.nn.sigmoid,
        activation_fn: Callable[..., Any] = jnp.tanh,
        kernel_init: Initializer = default_kernel_init,
        recurrent_kernel_init: Initializer = orthogonal,
        bias_init: Initializer = zeros,
        dtype: Dtype = None,
        param_dtype: Dtype = jnp.float32,
        carry_init: Initializer | None = None,
        promote_dtype: Callable[..., Any] = promote_dtype,
        kernel_metadata: Metadata = {},  # noqa: B006 — never changed
        recurrent_kernel_metadata: Metadata = {},  # noqa: B006
        bias_metadata: Metadata = {},  # noqa: B006
    ):
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.gate_fn = gate_fn
        self.activation_fn = activation_fn
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.carry_init = carry_init
        self.promote_dtype = promote_dtype
        dense_i, dense_h = self._linears(
            kernel_init,
            recurrent_kernel_init,
            bias_init,
            promote_dtype,
            (kernel_metadata, recurrent_kernel_metadata, bias_metadata),
            gates=3,
            input_bias=True,
        )
        self.dense_i, self.dense_h = dense_i(), dense_h()

    def __call__(self, carry: jax.Array, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One step: `(h, x) -> (h', h')`, with shapes and errors as for `LSTMCell`."""
        self._check(inputs, carry)
        dtype, a, b = products(self.dense_i, self.dense_h, inputs, carry)
        i_r, i_z, i_n = jnp.split(a, 3, axis=-1)
        h_r, h_z, h_n = jnp.split(b, 3, axis=-1)
        r, z = self.gate_fn(i_r + h_r), self.gate_fn(i_z + h_z)
        n = self.activation_fn(i_n + r * h_n)
        new = (1 - z) * n + z * carry
        return carried(new, carry, dtype), cast(new, dtype)


class SimpleCell(Cell):
    """The cell of Elman (1990, doi:10.1016/0364-0213(90)90002-E).

    With the carry `h` and the input `x`: `h' = activation_fn(dense_i(x) + dense_h(h))`. With
    `residual`, `h` is added inside the activation.

    Args:
      residual: whether to add `h` before the activation.
      in_features, hidden_features, dtype, param_dtype, carry_init, activation_fn, kernel_init,
        recurrent_kernel_init, bias_init, promote_dtype, kernel_metadata, recurrent_kernel_metadata,
        bias_metadata: as for `LSTMCell`.

    Attributes: the `Linear`s `dense_i` of the input, with bias, and `dense_h` of the hidden state,
    without bias.

    >>> import jax, jax.numpy as jnp, nnx
    >>> cell = nnx.SimpleCell.init(jax.random.key(0))(3, 4)
    >>> x = jnp.ones((2, 3))
    >>> carry, y = cell(cell.initialize_carry(x.shape), x)
    >>> y.shape
    (2, 4)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        dtype: Dtype = None,
        param_dtype: Dtype = jnp.float32,
        carry_init: Initializer | None = None,
        residual: bool = False,
        activation_fn: Callable[..., Any] = jnp.tanh,
        kernel_init: Initializer = default_kernel_init,
        recurrent_kernel_init: Initializer = orthogonal,
        bias_init: Initializer = zeros,
        promote_dtype: Callable[..., Any] = promote_dtype,
        kernel_metadata: Metadata = {},  # noqa: B006 — never changed
        recurrent_kernel_metadata: Metadata = {},  # noqa: B006
        bias_metadata: Metadata = {},  # noqa: B006
    ):
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.carry_init = carry_init
        self.residual = residual
        self.activation_fn = activation_fn
        self.promote_dtype = promote_dtype
        dense_i, dense_h = self._linears(
            kernel_init,
            recurrent_kernel_init,
            bias_init,
            promote_dtype,
            (kernel_metadata, recurrent_kernel_metadata, bias_metadata),
            gates=1,
            input_bias=True,
        )
        self.dense_i, self.dense_h = dense_i(), dense_h()

    def __call__(self, carry: jax.Array, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One step: `(h, x) -> (h', h')`, with shapes and errors as for `LSTMCell`."""
        self._check(inputs, carry)
        dtype, a, b = products(self.dense_i, self.dense_h, inputs, carry)
        new = a + b
        if self.residual:
            new = new + carry
        new = self.activation_fn(new)
        return carried(new, carry, dtype), cast(new, dtype)
