"""Sums of half-precision numbers, taken in float32 in the forward and the backward pass.

Products of arrays already accumulate in float32, on every device. The gradient of a parameter that
broadcasts does not: it is a sum in the parameter's own dtype. So parameters broadcast in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from nnx.layers._common import Dtype
from nnx.layers._sharding import fitted, looked_up, on_one_device

__all__ = ["add_bias", "broadcast", "is_half", "result_dtype", "rows", "wide"]


def is_half(dtype: Dtype) -> bool:
    """Whether a dtype is a floating-point one with sixteen bits or fewer."""
    return dtype.itemsize <= 2 and jnp.issubdtype(dtype, jnp.floating)


def wide(*dtypes: Dtype) -> Dtype:
    """The dtype to sum in: the dtype that these promote to, and at least float32."""
    # JAX does not promote floats of eight bits or fewer with anything.
    known = (jnp.float32 if jnp.finfo(d).bits <= 8 else d for d in map(_floating, dtypes))
    return jnp.result_type(*known, jnp.float32)


def _floating(dtype: Dtype) -> Dtype:
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.float32


def result_dtype(dtype: Dtype, *arrays: Any) -> Dtype:
    """`dtype`, or if it is None, the floating dtype that the arrays promote to; None arrays are ignored."""
    if dtype is not None:
        return jnp.dtype(dtype)
    found = jnp.result_type(*(x for x in arrays if x is not None))
    return found if jnp.issubdtype(found, jnp.inexact) else wide(found)


def broadcast(
    op: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, parameter: jax.Array
) -> jax.Array:
    """`op(x, parameter)`, in the dtype of `x` if that has half precision.

    The parameter broadcasts to `x` in float32, so its gradient is a sum in float32.
    """
    if x.dtype.itemsize > 2:
        return op(x, parameter)
    sum_in = wide(x.dtype, parameter.dtype)
    return op(x.astype(sum_in), parameter.astype(sum_in)).astype(x.dtype)


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """`y + bias`, in the dtype of `y` if that has half precision; see `broadcast`.

    The bias has the last axes of `y`, some perhaps with size 1. The sum is sharded like `y`.
    """
    # Eager code pays for every function call.
    if not on_one_device(bias):
        bias = fitted(bias, bias.shape, y)
    if y.dtype.itemsize > 2:
        return y + bias
    return broadcast(jnp.add, y, bias)


def rows(table: jax.Array, indices: jax.Array, sharding: NamedSharding | None = None) -> jax.Array:
    """Rows of a table. Its gradient is summed in at least float32."""
    find = _half_rows if is_half(table.dtype) else looked_up
    return find(table, indices, sharding)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _half_rows(table: jax.Array, indices: jax.Array, sharding: Any) -> jax.Array:
    return looked_up(table, indices, sharding)


@_half_rows.defjvp
def _half_rows_jvp(sharding: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # Only the tangent is looked up in float32, because casting the table would copy it.
    table, indices = primals
    found = looked_up(tangents[0].astype(wide(table.dtype)), indices, sharding)
    return _half_rows(table, indices, sharding), found.astype(table.dtype)
