"""Random streams: a key and a counter. Both are Refs, so they advance through every transformation."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from refx import Node, Ref
from refx.frame import is_eager

__all__ = ["RngStream"]


class RngStream(Node, hidden_slots=True):
    """A deterministic stream of keys: the n-th key is `fold_in(key, n)`.

    Args:
      key: a typed key (`jax.random.key`), a legacy one (`jax.random.PRNGKey`), or an int seed.

    Raises:
      TypeError: `key` is none of these.

    >>> import jax, nnx
    >>> stream = nnx.RngStream(jax.random.key(0))
    >>> bool((stream.next() == stream.next()).all())
    False
    """

    # Outside traces, the dispatch costs more than the key, so make many keys at a time.
    __slots__ = ("_ahead",)

    def __init__(self, key: Any):
        self.key = Ref(as_key(key), "rngs")
        self.count = Ref(0, "rngs")

    def next(self, name: str | None = None) -> jax.Array:
        """Return the next key and advance the stream.

        Args:
          name: several names that share one stream get different keys.
        """
        key, count = self.key.value, self.count.value
        self.advance()
        if type(count) is int and not isinstance(key, Tracer) and is_eager():
            return self._from_block(name, key, count)
        if name is not None:
            key = jax.random.fold_in(key, _number(name))
        return jax.random.fold_in(key, count)

    def _from_block(self, name: str | None, key: jax.Array, count: int) -> jax.Array:
        kept = getattr(self, "_ahead", None)
        if kept is None or kept[0] is not key:
            kept = (key, {})
            _set_ahead(self, kept)
        start = count - count % _BLOCK
        block = kept[1].get(name)
        if block is None or block[0] != start:
            base = key if name is None else jax.random.fold_in(key, _number(name))
            block = kept[1][name] = (start, _block(base, start))
        return block[1][count - start]

    def lanes(self, size: int) -> RngStream:
        """A stream of stacked keys, split from the key that `next()` would give. This stream does
        not advance.
        """
        key = jax.random.fold_in(self.key.value, self.count.value)
        stream = RngStream(jax.random.split(key, size))
        # Count per lane, because lanes may take different branches.
        stream.count = Ref(np.zeros((size,), np.int32), "rngs")
        return stream

    def advance(self) -> None:
        """Advance by one key."""
        self.count.value = self.count.value + 1


_set_ahead = RngStream._ahead.__set__  # pyright: ignore[reportAttributeAccessIssue]

_BLOCK = 32


@jax.jit
def _block(key: jax.Array, start: int) -> list[jax.Array]:
    keys = jax.vmap(lambda n: jax.random.fold_in(key, n))(start + jnp.arange(_BLOCK))
    return list(keys)


def _number(name: str) -> int:
    return zlib.crc32(name.encode())


def as_key(key: Any) -> Any:
    """Return a key of either kind as it is, and the key of an int seed. Anything else is an error."""
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        return jax.random.key(int(key))
    if isinstance(key, jax.Array | np.ndarray):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            return key
        if key.dtype == np.uint32 and key.ndim >= 1:
            return key
    seed = isinstance(key, jax.Array | np.ndarray) and jnp.issubdtype(key.dtype, jnp.integer)
    hint = " To use an array as a seed, write jax.random.key(seed)." if seed else ""
    raise TypeError(
        f"A random stream needs a key, as from jax.random.key(0), or an int seed, but got "
        f"{type(key).__name__}: {' '.join(repr(key).split())[:60]}.{hint}"
    )
