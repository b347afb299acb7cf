"""Normalization layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nnx.fields import param, ref
from nnx.layers._common import (
    Dtype,
    Initializer,
    Metadata,
    as_array,
    check_parameters,
    evaluates,
    new_ref,
    ones,
    promote_dtype,
    shape_error,
    zeros,
)
from nnx.layers._moments import Moments, moments
from nnx.layers._numerics import result_dtype, wide
from nnx.layers._sharding import as_placed, fitted
from nnx.module import Module

__all__ = ["BatchNorm"]


class BatchNorm(Module):
    """Batch normalization (Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167).

    In training, it normalizes by the statistics of the batch and moves its running averages towards
    them. With `use_running_average`, it normalizes by the running averages and writes nothing.

    Args:
      num_features: size of the feature axis.
      use_running_average: normalize by the running averages. These override it, in this order: the
        argument of the call, the scope flag of this name, the opposite of the scope flag `training`.
        `model.train()` and `model.eval()` set it.
      axis: the feature axis; the statistics are computed over all other axes.
      momentum: the running averages become `momentum * old + (1 - momentum) * new`.
      epsilon: added to the variance.
      dtype: dtype of the result; by default, the dtype that input, `scale` and `bias` promote to. The
        statistics are in at least float32.
      param_dtype: dtype of `scale` and `bias`.
      use_bias, use_scale: whether to have these parameters; if not, the attribute is None.
      bias_init, scale_init: initializers.
      axis_name: name of a mapped axis (`nnx.vmap`, `nnx.shard_map`) to average over as well.
      axis_index_groups: groups along that axis, as for `jax.lax.pmean`, which supports them only in
        `jax.pmap` and `nnx.shard_map(..., check_vma=False)`. There, the running averages are those of a
        single group.
      use_fast_variance: compute the variance in one pass, with deviations from an element of the batch,
        instead of two, with deviations from the mean.
      promote_dtype: a function for the casts, called with `(x, mean, var, scale, bias), dtype=`; the
        dtype is at least float32.
      bias_metadata, scale_metadata: metadata of the Refs.
      correction: subtracted from the number of elements in the denominator of the running variance:
        0 as in flax, 1 as in PyTorch. The batch itself is always normalized with 0.

    Attributes, all of shape `(num_features,)`: `scale` and `bias` in the collection `"params"`,
    `mean` and `var`, in at least float32, in `"batch_stats"`.

    >>> import jax, jax.numpy as jnp, nnx
    >>> norm = nnx.BatchNorm(3)
    >>> y = norm(jnp.arange(12.0).reshape(4, 3))
    >>> y.mean(0).round(3).tolist(), norm.mean.tolist() != [0.0, 0.0, 0.0]
    ([0.0, 0.0, 0.0], True)
    """

    mean: jax.Array = ref("batch_stats")
    var: jax.Array = ref("batch_stats")
    scale: jax.Array | None = param()
    bias: jax.Array | None = param()

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = promote_dtype,
        bias_metadata: Metadata = {},  # noqa: B006 — never changed
        scale_metadata: Metadata = {},  # noqa: B006
        correction: int = 0,
    ):
        shape = (num_features,)
        self.mean = jnp.zeros(shape, wide(param_dtype))
        self.var = jnp.ones(shape, wide(param_dtype))
        self.scale = (  # pyright: ignore[reportAttributeAccessIssue]
            new_ref(scale_init, shape, param_dtype, scale_metadata) if use_scale else None
        )
        self.bias = (  # pyright: ignore[reportAttributeAccessIssue]
            new_ref(bias_init, shape, param_dtype, bias_metadata) if use_bias else None
        )
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.correction = correction
        self.promote_dtype = promote_dtype

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalize; the result has the shape of `x`.

        Args:
          x: an input whose axis `axis` has size `num_features`.
          use_running_average: whether to use the running averages.
          mask: a boolean array that broadcasts to `x`: which elements count in the statistics. If none
            does, or the batch is empty, it normalizes by the running averages and leaves them unchanged.

        Raises:
          ValueError: the feature axis has the wrong size; the message has both shapes.
          MissingFlagError: `use_running_average` is None everywhere.
        """
        use_running_average = evaluates(self, "use_running_average", use_running_average)
        x = as_array(self, x)
        if not -x.ndim <= self.axis < x.ndim or x.shape[self.axis] != self.num_features:
            expected = f"(..., {self.num_features}) along axis {self.axis}"
            raise shape_error(self, "an input", expected, x.shape)
        feature_axis = self.axis % x.ndim
        others = tuple(i for i in range(x.ndim) if i != feature_axis)
        dtype = result_dtype(self.dtype, x, self.scale, self.bias)
        # The statistics are in float32, but they must not turn the result into float32.
        x, mean, var, scale, bias = self.promote_dtype(
            (x, self.mean, self.var, self.scale, self.bias), dtype=wide(x.dtype, dtype)
        )
        along = [-1 if i == feature_axis else 1 for i in range(x.ndim)]
        try:
            mean, var = fitted(mean, along, x), fitted(var, along, x)
            if use_running_average:
                y = x - mean
            else:
                found = moments(
                    x,
                    others,
                    mask,
                    axis_name=self.axis_name,
                    axis_index_groups=self.axis_index_groups,
                    fast=self.use_fast_variance,
                )
                self._move(found)
                # If everything is hidden, only the running averages are left to normalize by.
                known = True if mask is None else found.count > 0
                y = found.centered - _where(known, found.mean, mean)
                var = _where(known, found.var, var)
            factor = jax.lax.rsqrt(var + self.epsilon)
            if scale is not None:
                factor = factor * fitted(scale, along, x)
            y = y * factor
            if bias is not None:
                y = y + fitted(bias, along, x)
        except (TypeError, ValueError):
            size = (self.num_features,)
            check_parameters(self, scale=size, bias=size, mean=size, var=size)
            raise
        return y.astype(dtype)

    def _move(self, found: Moments) -> None:
        """Move the running averages, unless there are no elements to move them towards."""
        mean, var = jax.lax.stop_gradient((found.shift + found.mean, found.var))
        count = found.count
        left: Any = count - self.correction
        if self.correction:
            var = var * (count / jnp.maximum(left, 1))
        keep = self.momentum
        self.mean = _averaged(self.mean, mean, keep, count > 0)
        self.var = _averaged(self.var, var, keep, (count > 0) & (left > 0))


def _where(known: Any, new: jax.Array, old: jax.Array) -> jax.Array:
    return new if known is True else jnp.where(known, new, old)


def _averaged(old: jax.Array, new: jax.Array, keep: float, known: Any) -> jax.Array:
    if known is False:
        return old
    average = keep * old + (1 - keep) * as_placed(new.reshape(old.shape), old)
    # A float64 batch would turn it into float64, and then no loop could carry it.
    average = average if jnp.iscomplexobj(average) else average.astype(old.dtype)
    return average if known is True else jnp.where(known.reshape(old.shape), average, old)
