"""The base of the layers in `layer_norm.py`: normalizing by statistics over some axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnx.fields import param
from nnx.layers._common import (
    Dtype,
    Initializer,
    Metadata,
    check_parameters,
    new_ref,
    shape_error,
)
from nnx.layers._moments import mean_square, moments
from nnx.layers._numerics import result_dtype, wide
from nnx.layers._sharding import fitted
from nnx.module import Module

Axes = int | Sequence[int]


class Norm(Module):
    """The base class of the layers, with `scale`, `bias` and the statistics."""

    scale: jax.Array | None = param()
    bias: jax.Array | None = param()

    num_features: int
    epsilon: float
    dtype: Dtype
    axis_name: Any
    axis_index_groups: Any
    use_fast_variance: bool
    promote_dtype: Callable[..., Any]

    def _set_up(
        self,
        options: dict[str, Any],
        scale: tuple[Initializer, Metadata] | None,
        bias: tuple[Initializer, Metadata] | None,
    ) -> None:
        for name, option in options.items():
            setattr(self, name, option)
        self.use_scale = scale is not None
        self.use_bias = bias is not None

        def make(given: tuple[Initializer, Metadata] | None) -> Any:
            if given is None:
                return None
            init, metadata = given
            return new_ref(init, (self.num_features,), options["param_dtype"], metadata)

        self.scale = make(scale)
        self.bias = make(bias)

    def _axes(self, x: jax.Array, axes: Axes, what: str) -> tuple[int, ...]:
        """The axes counted from the front, each once."""
        given = (axes,) if isinstance(axes, int) else tuple(axes)
        if any(not -x.ndim <= axis < x.ndim for axis in given):
            raise ValueError(
                f"{type(self).__name__} has the {what} {given}, but got an input of shape "
                f"{tuple(x.shape)}, which has only {x.ndim} axes."
            )
        return tuple(sorted({axis % x.ndim for axis in given}))

    def _features(self, x: jax.Array, axes: Axes) -> tuple[int, ...]:
        found = self._axes(x, axes, "feature axes")
        if math.prod(x.shape[axis] for axis in found) != self.num_features:
            along = f"axis {axes}" if isinstance(axes, int) else f"axes {tuple(axes)} together"
            expected = f"(..., {self.num_features}) along {along}"
            raise shape_error(self, "an input", expected, x.shape)
        return found

    def _cast(self, x: jax.Array, *parameters: jax.Array | None) -> tuple[Any, ...]:
        """The dtype of the result, and `x` and the parameters in the dtype of the computation.

        Half precision is not enough for sums over features, nor for differences of large numbers.
        """
        dtype = result_dtype(self.dtype, x, *parameters)
        cast = self.promote_dtype((x, *parameters), dtype=wide(x.dtype, dtype))
        return dtype, *cast

    def _normalized(
        self,
        x: jax.Array,
        axes: tuple[int, ...],
        mask: jax.Array | None,
        scale: jax.Array | None,
        bias: jax.Array | None,
        along: Sequence[int],
        center: bool = True,
        groups: int | None = None,
    ) -> jax.Array:
        """Normalize over the axes; `along` is the shape that makes the parameters broadcast to `x`."""
        lanes = {"axis_name": self.axis_name, "axis_index_groups": self.axis_index_groups}
        if center:
            found = moments(x, axes, mask, fast=self.use_fast_variance, groups=groups, **lanes)
            y, var, count = found.centered - found.mean, found.var, found.count
        else:
            y = x
            var, count = mean_square(x, axes, mask, **lanes)
        if mask is not None:
            # If everything is hidden, there is nothing to normalize by.
            var = jnp.where(count > 0, var, 1.0)
        factor = jax.lax.rsqrt(var + self.epsilon)
        try:
            if scale is not None:
                factor = factor * fitted(scale, along, x)
            y = y * factor
            return y if bias is None else y + fitted(bias, along, x)
        except (TypeError, ValueError):
            check_parameters(self, scale=(self.num_features,), bias=(self.num_features,))
            raise
