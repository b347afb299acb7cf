"""Code that the recurrent cells share: the base class, settings, carries, and the two products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.sharding import NamedSharding, PartitionSpec

from nnx.layers._common import (
    Dtype,
    Initializer,
    Metadata,
    ones,
    shape_error,
    zeros,
)
from nnx.layers._numerics import wide
from nnx.layers._sharding import explicit_mesh, spec_of
from nnx.layers.linear import Linear
from nnx.module import Module
from nnx.scope import make_rng

__all__ = ["RNNCellBase"]


def orthogonal(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.Array:
    """An orthogonal matrix. It is made in float32, because QR decomposition has no half precision."""
    return _orthogonal(key, shape, jnp.promote_types(dtype, jnp.float32)).astype(dtype)


_orthogonal = initializers.orthogonal()


class RNNCellBase(Module):
    """The methods that `nnx.RNN` needs in a cell: `initialize_carry`, a call, and `num_feature_axes`.

    Attributes: `sums_in_float32`, False by default: whether a half-precision carry may come in
    float32 and the cell still computes the same, up to rounding. If so, `nnx.RNN` adds up the steps,
    and the gradients of parameters, in float32.

    >>> import jax, jax.numpy as jnp, nnx
    >>> class Sum(nnx.RNNCellBase):
    ...     num_feature_axes = 1
    ...     def initialize_carry(self, input_shape, carry_init=None):
    ...         return jnp.zeros(input_shape)
    ...     def __call__(self, carry, inputs):
    ...         return carry + inputs, carry + inputs
    >>> nnx.RNN(Sum())(jnp.ones((1, 4, 1)))[0, :, 0].tolist()
    [1.0, 2.0, 3.0, 4.0]
    """

    sums_in_float32 = False

    def initialize_carry(
        self, input_shape: tuple[int, ...], carry_init: Initializer | None = None
    ) -> Any:
        """The carry before the first step.

        Args:
          input_shape: shape of the input of one step: `(*batch, *features)`.
          carry_init: initializer of its arrays.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define initialize_carry(input_shape, carry_init=None)."
        )

    def __call__(self, carry: Any, inputs: jax.Array) -> tuple[Any, Any]:
        """One step: the new carry and the output."""
        raise NotImplementedError(
            f"{type(self).__name__} must define __call__(carry, inputs) -> (carry, output)."
        )

    @property
    def num_feature_axes(self) -> int:
        """How many axes of an input are features; all axes before them are batch axes."""
        raise NotImplementedError(f"{type(self).__name__} must define num_feature_axes.")


class Cell(RNNCellBase):
    """The base class of the cells here, with their settings and a carry of arrays `(*batch, hidden)`."""

    in_features: int
    hidden_features: int
    dtype: Dtype
    param_dtype: Dtype
    carry_init: Initializer | None

    sums_in_float32 = True
    # The name of a layer for the hidden state, which determines the dtype of the first carry.
    _of_hidden = "dense_h"

    def _linears(
        self,
        kernel_init: Initializer,
        recurrent_kernel_init: Initializer,
        bias_init: Initializer,
        promote_dtype: Callable[..., Any],
        metadata: tuple[Metadata, Metadata, Metadata],
        *,
        gates: int,
        input_bias: bool,
    ) -> tuple[Callable[[], Linear], Callable[[], Linear]]:
        """Functions that make a layer for the input and one for the hidden state."""
        # The two are added, so one bias is enough.
        options: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "promote_dtype": promote_dtype,
            "bias_init": bias_init,
            "bias_metadata": metadata[2],
        }
        out = gates * self.hidden_features

        def dense_i() -> Linear:
            return Linear(
                self.in_features,
                out,
                use_bias=input_bias,
                kernel_init=kernel_init,
                kernel_metadata=metadata[0],
                **options,
            )

        def dense_h() -> Linear:
            return Linear(
                self.hidden_features,
                out,
                use_bias=not input_bias,
                kernel_init=recurrent_kernel_init,
                kernel_metadata=metadata[1],
                **options,
            )

        return dense_i, dense_h

    def _check(self, inputs: Any, *carry: Any) -> None:
        if not jnp.ndim(inputs) or jnp.shape(inputs)[-1] != self.in_features:
            raise shape_error(self, "inputs", f"(..., {self.in_features})", jnp.shape(inputs))
        for hidden in carry:
            if not jnp.ndim(hidden) or jnp.shape(hidden)[-1] != self.hidden_features:
                expected = f"(..., {self.hidden_features})"
                raise shape_error(self, "a carry", expected, jnp.shape(hidden))

    def _first(self, input_shape: tuple[int, ...], carry_init: Initializer | None) -> jax.Array:
        init = carry_init or self.carry_init or zeros
        key = None if init in (zeros, ones) else make_rng("carry")
        kernel = getattr(getattr(self, self._of_hidden), "kernel", None)
        dtype = self.param_dtype if kernel is None else kernel.dtype
        return init(key, (*input_shape[:-1], self.hidden_features), dtype)

    def initialize_carry(
        self, input_shape: tuple[int, ...], carry_init: Initializer | None = None
    ) -> Any:
        """The carry before the first step, of shape `(*batch, hidden_features)`.

        Args:
          input_shape: shape of the input of one step: `(*batch, in_features)`.
          carry_init: initializer; by default the cell's `carry_init`, or else zeros. Initializers
            other than zeros draw from the stream `"carry"`.
        """
        return self._first(input_shape, carry_init)

    @property
    def num_feature_axes(self) -> int:
        """One: the inputs have the shape `(*batch, in_features)`."""
        return 1


def products(
    dense_i: Callable[..., Any], dense_h: Callable[..., Any], x: jax.Array, h: Any
) -> tuple[Dtype, jax.Array, jax.Array]:
    """The dtype of the products, and the products of input and hidden state in at least float32.

    The dtype is that of the product with the input. A carry may be in float32 only to sum in it, so
    it does not count.
    """
    mesh = explicit_mesh(h)
    if mesh is not None and isinstance(dense_i, Linear) and isinstance(dense_h, Linear):
        # A carry keeps its sharding, so the products get the same.
        wanted = NamedSharding(mesh, PartitionSpec(*spec_of(h)))
        a = dense_i(x, wanted)
        b = dense_h(cast(h, a.dtype), wanted)
    else:
        a = dense_i(x)
        b = dense_h(cast(h, a.dtype))
    sum_in = wide(a.dtype)
    return a.dtype, cast(a, sum_in), cast(b, sum_in)


def cast(x: Any, dtype: Dtype) -> Any:
    """Cast to another floating dtype. Values that are not floating-point numbers stay unchanged."""
    own = jnp.result_type(x)
    if own == dtype or not all(jnp.issubdtype(d, jnp.floating) for d in (own, dtype)):
        return x
    return jnp.asarray(x, dtype)


def carried(new: jax.Array, old: Any, dtype: Dtype) -> jax.Array:
    """`new` in the dtype of the old carry, or of the products if that has more digits."""
    return cast(new, jnp.promote_types(jnp.result_type(old), dtype))
