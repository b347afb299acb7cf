"""Mean and variance over axes, devices and a mask, computed so that offsets lose no precision."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnx.layers._numerics import wide
from nnx.layers._sharding import explicit_axes

__all__ = ["Moments", "moments"]


class Moments(NamedTuple):
    """The moments of an array over some axes, which are kept with size 1.

    Attributes:
      centered: the array minus `shift`, a constant near its mean.
      shift: that constant.
      mean: the mean of `centered`; the mean of the array is `shift + mean`.
      var: the variance, divided by the number of elements.
      count: how many elements there are; an int, unless there is a mask.
    """

    centered: jax.Array
    shift: jax.Array
    mean: jax.Array
    var: jax.Array
    count: Any


def moments(
    x: jax.Array,
    axes: tuple[int, ...],
    mask: jax.Array | None,
    *,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    fast: bool = True,
    groups: int | None = None,
) -> Moments:
    """The moments of `x`, which must be in at least float32.

    `E[x²] - E[x]²` loses all digits if the mean is far from zero. So a constant is subtracted
    first: one element if `fast`, otherwise the mean, which takes another pass. The mean and the
    variance of no elements are zero.

    Args:
      x: the array.
      axes: the axes, counted from the front.
      mask: which elements count; broadcasts to `x`.
      axis_name, axis_index_groups: a mapped axis; all its lanes count together.
      fast: whether to take only one pass. With a mask it takes two, because any element may be
        hidden. With groups it takes two, because XLA fuses that better on CPUs.
      groups: into how many groups the last axis, one of `axes`, is divided. Each group has its own
        moments, repeated for each of its elements, so the last axis keeps its size.
    """
    total = _Total(x, axes, mask, axis_name, axis_index_groups, groups)
    if math.prod(x.shape[axis] for axis in axes) == 0:
        shift = jnp.zeros_like(total.of(x)[0])
    elif fast and mask is None and groups is None and not explicit_axes(x).intersection(axes):
        first = [1 if i in axes else size for i, size in enumerate(x.shape)]
        (shift,) = total.over_lanes(jax.lax.slice(x, [0] * x.ndim, first))
    else:
        (shift,) = total.of(x)
    shift = jax.lax.stop_gradient(shift)
    centered = x - shift
    mean, square = total.of(centered, squared(centered))
    # Rounding may make the difference negative.
    var = jnp.maximum(0.0, jnp.real(square) - squared(mean))
    return Moments(centered, shift, mean, var, total.count)


def mean_square(x: jax.Array, axes: tuple[int, ...], mask: jax.Array | None, **lanes: Any) -> Any:
    """The mean of the squares of `x`, and the count; arguments as for `moments`."""
    total = _Total(x, axes, mask, lanes.get("axis_name"), lanes.get("axis_index_groups"))
    return jnp.real(total.of(squared(x))[0]), total.count


def squared(x: jax.Array) -> jax.Array:
    """`|x|²`."""
    return jnp.real(x * jnp.conj(x)) if jnp.iscomplexobj(x) else x * x


class _Total:
    """Averages over axes and lanes, of the elements that a mask lets through."""

    def __init__(
        self,
        x: jax.Array,
        axes: tuple[int, ...],
        mask: Any,
        name: Any,
        lanes: Any,
        groups: int | None = None,
    ):
        self.groups = groups
        # The groups of the last axis are summed after the other axes, because small groups are slow.
        self.axes = axes if groups is None else axes[:-1]
        self.name, self.lanes = name, lanes
        self.mask: Any = None
        self.size = math.prod(x.shape[axis] for axis in axes) // (groups or 1)
        if mask is None:
            self.count: Any = self.size
            if name is not None:
                self.count *= _lanes(name, lanes)
            return
        mask = jnp.asarray(mask)
        self.mask = mask = mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape).astype(bool)
        times = math.prod(x.shape[axis] for axis in self.axes if mask.shape[axis] == 1)
        kept = mask.sum(self.axes, keepdims=True, dtype=wide(x.real.dtype)) * times
        kept = jnp.broadcast_to(
            kept, [1 if i in self.axes else size for i, size in enumerate(x.shape)]
        )
        (self.count,) = self._collected(jax.lax.psum, self._by_group(kept))

    def of(self, *arrays: jax.Array) -> list[jax.Array]:
        """The averages of arrays with the shape of `x`; zero if there are no elements."""
        if self.mask is None:
            return self.over_lanes(*(self._sum(a) / max(1, self.size) for a in arrays))
        # Hidden elements may be NaN, and multiplying NaN by zero gives NaN.
        sums = [self._sum(jnp.where(self.mask, a, 0)) for a in arrays]
        return [a / jnp.maximum(self.count, 1) for a in self._collected(jax.lax.psum, *sums)]

    def _sum(self, x: jax.Array) -> jax.Array:
        return self._by_group(x.sum(self.axes, keepdims=True))

    def _by_group(self, x: jax.Array) -> jax.Array:
        if self.groups is None:
            return x
        grouped = x.reshape(*x.shape[:-1], self.groups, x.shape[-1] // self.groups)
        return jnp.broadcast_to(grouped.sum(-1, keepdims=True), grouped.shape).reshape(x.shape)

    def over_lanes(self, *arrays: jax.Array) -> list[jax.Array]:
        """The averages over lanes with the same number of elements each."""
        return self._collected(jax.lax.pmean, *arrays)

    def _collected(self, collective: Any, *arrays: jax.Array) -> list[jax.Array]:
        if self.name is None:
            return list(arrays)
        # Stacked, so that devices exchange only one message.
        stacked = jnp.stack(arrays)
        return list(collective(stacked, self.name, axis_index_groups=self.lanes))


def _lanes(name: Any, groups: Any) -> int:
    return len(groups[0]) if groups else jax.lax.psum(1, name)
