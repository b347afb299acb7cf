"""Put values where they belong, in programs of one or several processes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

__all__: list[str] = []


def is_key(x: Any) -> bool:
    """Whether `x` is an array of typed random keys, or a ShapeDtypeStruct of one."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def spec_in_type(x: Any) -> PartitionSpec:
    """The Explicit axes along which an array, or a shape, is sharded, from its type."""
    parts = list(getattr(jax.typeof(x).sharding, "spec", ()))
    return PartitionSpec(*parts, *[None] * (np.ndim(x) - len(parts)))


def put(host: Any, sharding: Sharding | None) -> jax.Array:
    """Put an array of the host on the devices of a sharding, or on the default device.

    Each process puts its own part. No process waits for another.
    """
    if sharding is None:
        # Nobody else uses the buffer, so the array may take it over.
        return jax.device_put(host, may_alias=True)
    if sharding.is_fully_addressable:
        return jax.device_put(host, sharding)
    host = np.asarray(host)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def move(x: Any, sharding: Sharding) -> jax.Array:
    """Move an array to where a sharding says. Random keys may go to devices of several processes, too.

    An array that is not spread yet must be the same in every process. JAX checks that.
    """
    if not is_key(x) or sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if not x.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=sharding)(x)
    data = jax.device_put(np.asarray(jax.random.key_data(x)), data_sharding(sharding))
    return put_keys(data, jax.random.key_impl(x), sharding)


def put_keys(data: Any, impl: Any, sharding: Sharding | None) -> jax.Array:
    """Make random keys from their data, which is on the host or already where the sharding says."""
    if not isinstance(data, jax.Array):
        data = put(data, None if sharding is None else data_sharding(sharding))
    if sharding is None or sharding.is_fully_addressable:
        keys = jax.random.wrap_key_data(data, impl=impl)
        return keys if sharding is None else jax.device_put(keys, sharding)
    return jax.jit(lambda x: jax.random.wrap_key_data(x, impl=impl), out_shardings=sharding)(data)


def data_sharding(sharding: Sharding) -> Sharding:
    """The sharding for the data of keys that have this sharding. Each key stays whole."""
    if isinstance(sharding, NamedSharding):
        return sharding
    if sharding.is_fully_replicated and len(sharding.device_set) == 1:
        return sharding
    mesh = jax.sharding.Mesh(np.array(sorted(sharding.device_set, key=lambda d: d.id)), ("all",))
    return NamedSharding(mesh, PartitionSpec())


def place_of(old: Any) -> Sharding | None:
    """The sharding that a replacement of this value should have; None if nobody chose one."""
    if isinstance(old, jax.Array):
        return old.sharding if old.committed else None
    return old.sharding if isinstance(old, jax.ShapeDtypeStruct) else None


def put_like(new: Any, old: Any) -> Any:
    """Put the new value where the old one is: on its devices, or in NumPy."""
    sharding = place_of(old)
    if isinstance(old, np.ndarray):
        return np.asarray(new)
    if not isinstance(old, jax.Array) and sharding is None:
        return new
    if isinstance(new, jax.Array) and new.sharding == sharding:
        return new
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(new, sharding)
    if is_key(new):
        data = np.asarray(jax.random.key_data(new))
        return put_keys(data, jax.random.key_impl(new), sharding)
    return put(np.asarray(new), sharding)
