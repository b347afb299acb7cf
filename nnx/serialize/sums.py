"""A checksum of an array. It does not depend on how the array is spread over devices.

Each word is mixed with its position, and the results are added modulo 2³². The order of addition
does not matter, so NumPy and the devices of any mesh get the same number.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__: list[str] = []

# How many words NumPy mixes at a time.
_PIECE = 1 << 22


def checksum(x: Any) -> Any:
    """The checksum of an array of numbers: an int for NumPy, or a JAX scalar that is still on the device."""
    return _of_jax(x) if isinstance(x, jax.Array) else _of_numpy(x)


def _mix(word: Any, place: Any) -> Any:
    """Mix a word with its position into a number that looks random. All are uint32."""
    u32 = np.uint32
    x = (word + u32(1)) * u32(0x9E3779B1) ^ place * u32(0x85EBCA6B)
    x = (x ^ (x >> u32(15))) * u32(0x2C1B3C6D)
    x = (x ^ (x >> u32(12))) * u32(0x297A2D39)
    return x ^ (x >> u32(15))


@jax.jit
def _of_jax(x: jax.Array) -> jax.Array:
    words = _words(x)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(words.shape):
        step = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = place * np.uint32(size % (1 << 32)) + step
    return jnp.sum(_mix(words, place), dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return _words(jnp.stack([x.real, x.imag], axis=-1))
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = jnp.finfo(x.dtype).bits if _is_float(x.dtype) else jnp.iinfo(x.dtype).bits
    if bits < 8:
        narrow = jnp.uint8 if jnp.issubdtype(x.dtype, jnp.unsignedinteger) else jnp.int8
        return _words(x.astype(jnp.float32) if _is_float(x.dtype) else x.astype(narrow))
    if bits < 32:
        return lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)
    return lax.bitcast_convert_type(x, jnp.uint32)


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _of_numpy(x: np.ndarray) -> int:
    if x.dtype.itemsize == 1 and x.dtype != np.uint8:
        name = x.dtype.name
        if name.startswith(("int2", "int4")):
            x = x.astype(np.int8)
        elif name.startswith(("uint2", "uint4")):
            x = x.astype(np.uint8)
        elif name.startswith("float4"):
            x = x.astype(np.float32)
    size = min(x.dtype.itemsize, 4)
    words = np.ascontiguousarray(x).reshape(-1).view(f"uint{8 * size}")
    total = 0
    for start in range(0, words.size, _PIECE):
        piece = words[start : start + _PIECE].astype(np.uint32)
        place = np.arange(start, start + piece.size, dtype=np.uint64).astype(np.uint32)
        with np.errstate(over="ignore"):
            total += int(_mix(piece, place).sum(dtype=np.uint64))
    return total % (1 << 32)
