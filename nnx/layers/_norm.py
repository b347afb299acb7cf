"""What the layers of `layer_norm.py` share: normalizing by statistics over some axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnx.layers._common import (
    Dtype,
    Initializer,
    Metadata,
    check_parameters,
    new_ref,
    shape_error,
)
from nnx.module import Module, param

Axes = int | Sequence[int]


class Norm(Module):
    """The base of the layers: `scale`, `bias`, and the statistics."""

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

    def _statistics(
        self, x: jax.Array, axes: tuple[int, ...], mask: jax.Array | None, center: bool = True
    ) -> tuple[jax.Array | None, jax.Array]:
        """Mean and variance over the axes, which stay with size 1; no mean without `center`."""
        # Half precision is not enough to sum over features.
        dtype = x.dtype if self.dtype is None else self.dtype
        x = x.astype(jnp.promote_types(dtype, jnp.float32))

        def average(*arrays: jax.Array) -> list[jax.Array]:
            means = [a.mean(axes, where=mask, keepdims=True) for a in arrays]
            if self.axis_name is None:
                return means
            # Together, so that devices exchange one message.
            stacked = jnp.stack(means)
            return list(
                jax.lax.pmean(stacked, self.axis_name, axis_index_groups=self.axis_index_groups)
            )

        if not center:
            return None, average(_square(x))[0]
        if self.use_fast_variance:
            mean, square = average(x, _square(x))
            # Rounding may make the difference negative.
            return mean, jnp.maximum(0.0, square - _square(mean))
        (mean,) = average(x)
        return mean, average(_square(x - mean))[0]

    def _normalized(
        self,
        x: jax.Array,
        mean: jax.Array | None,
        var: jax.Array,
        scale: jax.Array | None,
        bias: jax.Array | None,
        features: tuple[int, ...],
    ) -> jax.Array:
        along = [size if i in features else 1 for i, size in enumerate(x.shape)]
        dtype = self.dtype
        if dtype is None:
            dtype = jnp.result_type(*(a for a in (x, scale, bias) if a is not None))
        factor = jax.lax.rsqrt(var + self.epsilon)
        try:
            if scale is not None:
                factor = factor * scale.reshape(along)
            y = (x if mean is None else x - mean) * factor
            if bias is not None:
                y = y + bias.reshape(along)
        except (TypeError, ValueError):
            check_parameters(self, scale=(self.num_features,), bias=(self.num_features,))
            raise
        return y.astype(dtype)


def _square(x: jax.Array) -> jax.Array:
    return jnp.real(x * jnp.conj(x)) if jnp.iscomplexobj(x) else x * x
