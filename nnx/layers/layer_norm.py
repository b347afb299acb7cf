"""Normalization of each example on its own: over its features, groups of them, or its positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nnx.layers._common import (
    Dtype,
    Initializer,
    Metadata,
    as_array,
    ones,
    promote_dtype,
    zeros,
)
from nnx.layers._norm import Axes, Norm
from nnx.layers._sharding import gathered, placed_as, shards

__all__ = ["GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"]


class LayerNorm(Norm):
    """Layer normalization (Ba et al. 2016, https://arxiv.org/abs/1607.06450).

    Each example is normalized to mean 0 and variance 1 over its features, independently of the others.

    Args:
      num_features: size of the feature axis, or product of the sizes if there are several.
      epsilon: added to the variance.
      dtype: dtype of the result; by default, the dtype that input and parameters promote to. The
        statistics are in at least float32.
      param_dtype: dtype of `scale` and `bias`.
      use_bias, use_scale: whether to have these parameters; if not, the attribute is None.
      bias_init, scale_init: initializers.
      reduction_axes: the axes to compute the statistics over.
      feature_axes: the axes along which `scale` and `bias` have an element for each position.
      axis_name: name of a mapped axis (`nnx.vmap`, `nnx.shard_map`) to average over as well.
      axis_index_groups: groups along that axis, as for `jax.lax.pmean`.
      use_fast_variance: compute the variance in one pass, with deviations from an element of the input,
        instead of two, with deviations from the mean.
      promote_dtype: a function for the casts, called with `(x, scale, bias), dtype=`; the dtype is at
        least float32.
      bias_metadata, scale_metadata: metadata of the Refs.

    Attributes: `scale` and `bias` of shape `(num_features,)`, in the collection `"params"`.

    >>> import jax, jax.numpy as jnp, nnx
    >>> norm = nnx.LayerNorm(4)
    >>> y = norm(jnp.array([[1.0, 2.0, 3.0, 4.0]]))
    >>> bool(jnp.allclose(y.mean(), 0, atol=1e-6)), bool(jnp.allclose(y.std(), 1))
    (True, True)
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = promote_dtype,
        bias_metadata: Metadata = {},  # noqa: B006 — never changed
        scale_metadata: Metadata = {},  # noqa: B006
    ):
        options = {
            "num_features": num_features,
            "epsilon": epsilon,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "axis_name": axis_name,
            "axis_index_groups": axis_index_groups,
            "use_fast_variance": use_fast_variance,
            "promote_dtype": promote_dtype,
        }
        scale = (scale_init, scale_metadata) if use_scale else None
        self._set_up(options, scale, (bias_init, bias_metadata) if use_bias else None)
        self.reduction_axes = reduction_axes
        self.feature_axes = feature_axes

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalize; the result has the shape of `x`.

        Args:
          x: an input whose feature axes have `num_features` elements.
          mask: a boolean array that broadcasts to `x`: which elements count in the statistics. If none
            does, the mean counts as 0 and the variance as 1.

        Raises:
          ValueError: the feature axes have the wrong size; the message has both shapes.
        """
        x = as_array(self, x)
        features = self._features(x, self.feature_axes)
        axes = self._axes(x, self.reduction_axes, "reduction axes")
        dtype, x, scale, bias = self._cast(x, self.scale, self.bias)
        along = _along(x, features)
        return self._normalized(x, axes, mask, scale, bias, along).astype(dtype)


class RMSNorm(Norm):
    """Normalization by the root mean square (Zhang and Sennrich 2019, arXiv:1910.07467).

    Like `LayerNorm`, but it does not subtract the mean and has no bias.

    Args:
      num_features: size of the feature axis, or product of the sizes if there are several.
      epsilon: added to the mean square.
      use_fast_variance: has no effect, because no mean is subtracted.
      promote_dtype: a function for the casts, called with `(x, scale), dtype=`; the dtype is at least
        float32.
      dtype, param_dtype, use_scale, scale_init, reduction_axes, feature_axes, axis_name,
        axis_index_groups, scale_metadata: as for `LayerNorm`.

    Attributes: `scale` of shape `(num_features,)`, in the collection `"params"`.

    >>> import jax, jax.numpy as jnp, nnx
    >>> norm = nnx.RMSNorm(4)
    >>> print(norm(jnp.array([1.0, -1.0, 7.0, -7.0])).round(1))
    [ 0.2 -0.2  1.4 -1.4]
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype = None,
        param_dtype: Dtype = jnp.float32,
        use_scale: bool = True,
        scale_init: Initializer = ones,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = promote_dtype,
        scale_metadata: Metadata = {},  # noqa: B006 — never changed
    ):
        options = {
            "num_features": num_features,
            "epsilon": epsilon,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "axis_name": axis_name,
            "axis_index_groups": axis_index_groups,
            "use_fast_variance": use_fast_variance,
            "promote_dtype": promote_dtype,
        }
        self._set_up(options, (scale_init, scale_metadata) if use_scale else None, None)
        self.reduction_axes = reduction_axes
        self.feature_axes = feature_axes

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Normalize; arguments and errors as for `LayerNorm`."""
        x = as_array(self, x)
        features = self._features(x, self.feature_axes)
        axes = self._axes(x, self.reduction_axes, "reduction axes")
        dtype, x, scale = self._cast(x, self.scale)
        along = _along(x, features)
        return self._normalized(x, axes, mask, scale, None, along, center=False).astype(dtype)


class GroupNorm(Norm):
    """Group normalization (Wu and He 2018, https://arxiv.org/abs/1803.08494).

    The channels, by default the last axis, are divided into groups. Each group of each example is
    normalized over its channels and all positions.

    Args:
      num_features: number of channels.
      num_groups: number of groups; None if `group_size` is given.
      group_size: number of channels in a group, instead of `num_groups`.
      reduction_axes: the axes to compute the statistics over. They must include the axis of the
        channels. By default, all but the first.
      feature_axis: the axis of the channels: 1 for inputs with the channels first.
      epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init, axis_name,
        axis_index_groups, promote_dtype, bias_metadata, scale_metadata: as for `LayerNorm`.
      use_fast_variance: has no effect; the variance always uses deviations from the mean.

    Attributes: `scale` and `bias` of shape `(num_features,)`, in the collection `"params"`.

    Raises:
      ValueError: the channels cannot be divided into these groups; or not exactly one of `num_groups`
        and `group_size` is given.

    >>> import jax, jax.numpy as jnp, nnx
    >>> norm = nnx.GroupNorm(6, num_groups=3)
    >>> norm(jnp.arange(48.0).reshape(2, 4, 6)).shape, norm.group_size
    ((2, 4, 6), 2)
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        reduction_axes: Axes | None = None,
        feature_axis: int = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = promote_dtype,
        bias_metadata: Metadata = {},  # noqa: B006 — never changed
        scale_metadata: Metadata = {},  # noqa: B006
    ):
        if (num_groups is None) == (group_size is None):
            raise ValueError(
                f"GroupNorm takes either num_groups (32 by default) or group_size, but num_groups is "
                f"{num_groups} and group_size is {group_size}. Set the other one to None: "
                f"GroupNorm({num_features}, num_groups=None, group_size=...)."
            )
        parts = num_groups if group_size is None else group_size
        if parts is None or parts <= 0 or num_features % parts:
            groups = f"{parts} equal groups" if group_size is None else f"groups of {parts}"
            raise ValueError(
                f"GroupNorm cannot divide {num_features} channels into {groups}. Use a divisor of the "
                f"number of channels."
            )
        options = {
            "num_features": num_features,
            "epsilon": epsilon,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "axis_name": axis_name,
            "axis_index_groups": axis_index_groups,
            "use_fast_variance": use_fast_variance,
            "promote_dtype": promote_dtype,
        }
        scale = (scale_init, scale_metadata) if use_scale else None
        self._set_up(options, scale, (bias_init, bias_metadata) if use_bias else None)
        self.group_size = num_features // parts if group_size is None else parts
        self.num_groups = num_features // self.group_size
        self.reduction_axes = reduction_axes
        self.feature_axis = feature_axis

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalize an input of shape `(batch, ..., num_features)`; the result has the same shape.

        With `feature_axis`, the channels are along that axis instead of the last.

        Args:
          x: the input; if it has several batch axes, or none, set `reduction_axes`.
          mask: a boolean array that broadcasts to `x`: which elements count in the statistics. If none
            does, the mean counts as 0 and the variance as 1.

        Raises:
          ValueError: the wrong number of channels; the message has both shapes.
        """
        x = as_array(self, x)
        (channels,) = self._features(x, self.feature_axis)
        given = range(min(1, x.ndim - 1), x.ndim)
        if self.reduction_axes is not None:
            given = self.reduction_axes
        axes = self._axes(x, given, "reduction axes")
        if channels not in axes:
            where = "the last axis" if channels == x.ndim - 1 else f"axis {channels}"
            raise ValueError(
                f"GroupNorm has the reduction_axes {self.reduction_axes}, but they must include {where}, "
                f"which has the channels. The input has the shape {tuple(x.shape)}."
            )
        if channels != x.ndim - 1:
            if mask is not None:
                mask = jnp.asarray(mask)
                mask = jnp.moveaxis(
                    mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape), channels, -1
                )
            axes = (*(i - (i > channels) for i in axes if i != channels), x.ndim - 1)
            return jnp.moveaxis(self._last(jnp.moveaxis(x, channels, -1), axes, mask), -1, channels)
        return self._last(x, axes, mask)

    def _last(self, x: jax.Array, axes: tuple[int, ...], mask: jax.Array | None) -> jax.Array:
        """Normalize an input whose last axis is the channels."""
        dtype, x, scale, bias = self._cast(x, self.scale, self.bias)
        given, channels = x, x.ndim - 1
        if self.num_groups % shards(x, channels):
            # A group is spread over several devices.
            x = gathered(x, [channels])
        along = (*(1,) * (x.ndim - 1), self.num_features)
        y = self._normalized(x, axes, mask, scale, bias, along, groups=self.num_groups)
        return placed_as(y, given, y.ndim).astype(dtype)


class InstanceNorm(Norm):
    """Instance normalization (Ulyanov et al. 2016, https://arxiv.org/abs/1607.08022).

    Each channel of each example is normalized over all positions.

    Args:
      num_features: number of channels.
      feature_axes: the axes of the channels. The first axis is the batch. The statistics are computed
        over all other axes.
      epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init, axis_name,
        axis_index_groups, use_fast_variance, promote_dtype, bias_metadata, scale_metadata: as for
        `LayerNorm`.

    Attributes: `scale` and `bias` of shape `(num_features,)`, in the collection `"params"`.

    >>> import jax, jax.numpy as jnp, nnx
    >>> y = nnx.InstanceNorm(3)(jnp.arange(24.0).reshape(2, 4, 3))
    >>> bool(jnp.allclose(y.mean(1), 0, atol=1e-5))
    True
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = promote_dtype,
        bias_metadata: Metadata = {},  # noqa: B006 — never changed
        scale_metadata: Metadata = {},  # noqa: B006
    ):
        options = {
            "num_features": num_features,
            "epsilon": epsilon,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "axis_name": axis_name,
            "axis_index_groups": axis_index_groups,
            "use_fast_variance": use_fast_variance,
            "promote_dtype": promote_dtype,
        }
        scale = (scale_init, scale_metadata) if use_scale else None
        self._set_up(options, scale, (bias_init, bias_metadata) if use_bias else None)
        self.feature_axes = feature_axes

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalize an input `(batch, ...)`; arguments and errors as for `LayerNorm`."""
        x = as_array(self, x)
        features = self._features(x, self.feature_axes)
        if 0 in features:
            raise ValueError(
                f"InstanceNorm has the feature axes {self.feature_axes}, but the first axis of the "
                f"input of shape {tuple(x.shape)} is the batch, and cannot be a feature axis."
            )
        axes = tuple(i for i in range(1, x.ndim) if i not in features)
        dtype, x, scale, bias = self._cast(x, self.scale, self.bias)
        along = _along(x, features)
        return self._normalized(x, axes, mask, scale, bias, along).astype(dtype)


def _along(x: jax.Array, features: tuple[int, ...]) -> list[int]:
    return [size if i in features else 1 for i, size in enumerate(x.shape)]
