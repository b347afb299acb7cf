"""Dense layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nnx.fields import param
from nnx.layers._common import (
    Dtype,
    Initializer,
    Metadata,
    as_array,
    check_parameters,
    default_kernel_init,
    new_ref,
    promote_dtype,
    shape_error,
    zeros,
)
from nnx.layers._numerics import add_bias
from nnx.layers._out_sharding import OutSharding, explain_sharding, wanted_sharding
from nnx.module import Module

__all__ = ["Linear"]

_dot_general = jax.lax.dot_general


class Linear(Module):
    """A dense layer over the last axis: `x @ kernel + bias`.

    Args:
      in_features: size of the last axis of the input.
      out_features: size of the last axis of the output.
      use_bias: whether to add a bias; if not, `bias` is None.
      dtype: dtype of the computation; by default, the dtype that input and parameters promote to.
      param_dtype: dtype of the parameters.
      precision: precision of the product, as for `jax.lax.dot_general`.
      kernel_init, bias_init: initializers, called with a key, a shape and a dtype.
      dot_general: a function to use instead of `jax.lax.dot_general`.
      promote_dtype: a function to use for the casts, called with `(x, kernel, bias), dtype=`.
      preferred_element_type: dtype to accumulate in and to return, as for `jax.lax.dot_general`.
      kernel_metadata, bias_metadata: metadata of the Refs.

    Attributes: `kernel` of shape `(in_features, out_features)` and `bias` of shape
    `(out_features,)`, both in the collection `"params"`.

    Raises:
      MissingStreamError: made outside a scope with a `"params"` stream.

    >>> import jax, jax.numpy as jnp, nnx
    >>> layer = nnx.Linear.init(jax.random.key(0))(3, 4)
    >>> layer(jnp.ones((2, 3))).shape
    (2, 4)
    """

    kernel: jax.Array = param()
    bias: jax.Array | None = param()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: Dtype = None,
        param_dtype: Dtype = jnp.float32,
        precision: Any = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = zeros,
        dot_general: Callable[..., jax.Array] = _dot_general,
        promote_dtype: Callable[..., Any] = promote_dtype,
        preferred_element_type: Dtype = None,
        kernel_metadata: Metadata = {},  # noqa: B006 — never changed
        bias_metadata: Metadata = {},  # noqa: B006
    ):
        shape = (in_features, out_features)
        self.kernel = new_ref(kernel_init, shape, param_dtype, kernel_metadata)  # pyright: ignore
        self.bias = (  # pyright: ignore[reportAttributeAccessIssue]
            new_ref(bias_init, (out_features,), param_dtype, bias_metadata) if use_bias else None
        )
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.dot_general = dot_general
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        # With the default settings, the call is only a matrix product, so eager code is fast.
        self._plain = (
            precision is None
            and dtype is None
            and preferred_element_type is None
            and dot_general is _dot_general
            and promote_dtype is _promote_dtype
        )

    def __call__(self, x: jax.Array, out_sharding: OutSharding = None) -> jax.Array:
        """Apply the layer to an input of shape `(..., in_features)`.

        Args:
          x: the input.
          out_sharding: how to shard the output: a `PartitionSpec` or a tuple of names, as for
            `nnx.axis_rules`, or a `NamedSharding`. On a mesh with Explicit axes, it is needed where JAX
            cannot infer the sharding, for example if input and kernel are both sharded along the axis
            to sum over. On Auto axes it is a constraint, and without a mesh it is ignored.

        Raises:
          ValueError: the last axis has the wrong size, or the layer was given a kernel or a bias that
            does not fit; the message has both shapes. Or `out_sharding` is missing or does not fit.
          TypeError: the input is neither an array nor a list of numbers.
        """
        kernel, bias = self.kernel, self.bias
        try:
            if out_sharding is None and self._plain and x.dtype == kernel.dtype:
                y = x @ kernel
                return y if bias is None else add_bias(y, bias)
            return self._general(x, kernel, bias, out_sharding)
        except (AttributeError, TypeError, ValueError):
            array = as_array(self, x)
            if array is not x:
                return self(array, out_sharding)
            if not x.ndim or x.shape[-1] != self.in_features:
                expected = f"(..., {self.in_features})"
                raise shape_error(self, "an input", expected, x.shape) from None
            out = (self.out_features,)
            check_parameters(self, kernel=(self.in_features, *out), bias=out)
            raise
        except Exception as error:
            explain_sharding(self, error, x=x, kernel=kernel)
            raise

    def _general(self, x: Any, kernel: Any, bias: Any, out_sharding: OutSharding) -> jax.Array:
        wanted = wanted_sharding(self, out_sharding, (*x.shape[:-1], kernel.shape[-1]), x, kernel)
        x, kernel, bias = self.promote_dtype((x, kernel, bias), dtype=self.dtype)
        options: dict[str, Any] = {"precision": self.precision, **wanted.options}
        if self.preferred_element_type is not None:
            options["preferred_element_type"] = self.preferred_element_type
        y = self.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), **options)
        return wanted.constrained(y if bias is None else add_bias(y, bias))


_promote_dtype = promote_dtype
