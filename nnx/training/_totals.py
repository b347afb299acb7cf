"""Totals of very many numbers: sums in two floats, counts in two integers, and how to merge them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__: list[str] = []

# A count is `high * _SPILL + low`: one int32 would overflow at 2³¹, and float32 stops counting at
# 2²⁴.
_SPILL_BITS = 30
_SPILL = 1 << _SPILL_BITS


class Sum(NamedTuple):
    """`total + rest`, where `rest` holds the part that `total` cannot represent."""

    total: jax.Array
    rest: jax.Array


def added(a: Sum, total: Any, rest: Any = 0.0) -> Sum:
    """The sum plus another number, or plus another sum."""
    # Knuth's two-sum: `error` is the rounding error of `new`.
    total = jnp.asarray(total, a.total.dtype)
    new = a.total + total
    part = new - a.total
    error = (a.total - (new - part)) + (total - part)
    # An infinite total has no rest.
    rest = jnp.where(jnp.isfinite(new), a.rest + rest + error, 0)
    high = new + rest
    return Sum(high, jnp.where(jnp.isfinite(high), rest - (high - new), 0))


class Count(NamedTuple):
    """A count, as two int32."""

    low: jax.Array
    high: jax.Array

    def as_float(self, dtype: Any) -> jax.Array:
        """The number, rounded."""
        return self.high.astype(dtype) * float(_SPILL) + self.low.astype(dtype)


def counted(a: Count, low: Any, high: Any = 0) -> Count:
    """The count plus another one; `low` may be a Python int of any size."""
    if isinstance(low, int):
        high, low = high + (low >> _SPILL_BITS), low & (_SPILL - 1)
    low = a.low + low
    spilled = low >> _SPILL_BITS
    return Count(low - (spilled << _SPILL_BITS), a.high + high + spilled)


class Spread(NamedTuple):
    """The count, the mean, and the sum of squared differences from the mean."""

    number: Count
    mean: Sum
    m2: Sum


def spread_of_both(a: Spread, b: Spread) -> Spread:
    """The merged spread, by Chan, Golub and LeVeque (1983)."""
    dtype = a.mean.total.dtype
    own, other = a.number.as_float(dtype), b.number.as_float(dtype)
    share = other / jnp.maximum(own + other, 1)
    # Subtract the totals first: means that are close share their leading digits.
    delta = (b.mean.total - a.mean.total) + (b.mean.rest - a.mean.rest)
    delta = jnp.where((own > 0) & (other > 0), delta, 0)
    mean = added(a.mean, delta * share)
    m2 = added(added(a.m2, *b.m2), delta**2 * own * share)
    mean = jax.tree.map(lambda x, y: jnp.where(own > 0, x, y), mean, b.mean)
    return Spread(counted(a.number, *b.number), mean, m2)
