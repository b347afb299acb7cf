"""Random variables as functions of white noise, so that all of them have a standard normal prior."""

from __future__ import annotations

import hashlib
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from nnx.purify.errors import MarkerError
from nnx.purify.markers import intermediate, param
from refx.text import a_kind

__all__ = [
    "log_normal",
    "log_normal_variable",
    "normal",
    "normal_like",
    "normal_variable",
    "uniform",
    "uniform_variable",
    "zeros_like",
]

T = TypeVar("T")


def zeros_like(tree: T) -> T:
    """A pytree of zeros.

    Args:
      tree: a pytree of arrays, numbers or `jax.ShapeDtypeStruct`, where only shapes and dtypes matter.

    Raises:
      MarkerError: a leaf is something else, or its dtype has no zero, as for a random key.

    >>> import jax
    >>> from nnx.purify import zeros_like
    >>> zeros_like({"w": jax.ShapeDtypeStruct((2,), "float32")})["w"].tolist()
    [0.0, 0.0]
    """
    return _filled(
        "zeros_like", tree, lambda _, shape, dtype: jnp.zeros(shape, dtype), (np.number, np.bool_)
    )


def normal_like(key: jax.Array, tree: T) -> T:
    """A pytree of independent standard normal values.

    Args:
      key: a random key. Each leaf depends on the key and on its own path, not on other leaves.
      tree: a pytree of arrays, numbers or `jax.ShapeDtypeStruct` with floating or complex dtypes.
        Only shapes and dtypes matter.

    Raises:
      MarkerError: a leaf is something else.

    >>> import jax, jax.numpy as jnp
    >>> from nnx.purify import normal_like
    >>> drawn = normal_like(jax.random.key(0), {"w": jnp.zeros(3), "b": 0.0})
    >>> {name: x.shape for name, x in drawn.items()}
    {'b': (), 'w': (3,)}
    """

    def draw(path: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        digest = hashlib.sha256(jax.tree_util.keystr(path).encode()).digest()
        own = key
        for start in (0, 4):
            own = jax.random.fold_in(own, int.from_bytes(digest[start : start + 4], "little"))
        return jax.random.normal(own, shape, dtype)

    return _filled("normal_like", tree, draw, (np.inexact,))


def _filled(name: str, tree: T, make: Any, kinds: Any) -> T:
    def fill(path: Any, x: Any) -> jax.Array:
        where = (
            f"{name} got a leaf{jax.tree_util.keystr(path) and ' at '}{jax.tree_util.keystr(path)}"
        )
        try:
            t = jax.typeof(x) if not isinstance(x, jax.ShapeDtypeStruct) else x
            dtype: Any = jax.dtypes.canonicalize_dtype(t.dtype, allow_extended_dtype=True)
        except (TypeError, AttributeError):
            raise MarkerError(
                f"{where} that is {x!r}, {a_kind(type(x))}. It takes a pytree of arrays, numbers or "
                f"jax.ShapeDtypeStruct."
            ) from None
        if not any(jnp.issubdtype(dtype, kind) for kind in kinds):
            what = "normal distribution" if kinds == (np.inexact,) else "zero"
            raise MarkerError(f"{where} of dtype {dtype}, which has no {what}. Leave it out.")
        return make(path, t.shape, dtype)

    return jax.tree_util.tree_map_with_path(fill, tree)


def normal(x: Any, *, mean: Any = 0.0, sigma: Any = 1.0) -> jax.Array:
    """Turn a standard normal value into a normal one with this mean and standard deviation.

    >>> from nnx.purify import normal
    >>> float(normal(2.0, mean=1.0, sigma=0.5))
    2.0
    """
    return jnp.asarray(x) * sigma + mean


def log_normal(x: Any, *, mean: Any = 1.0, sigma: Any = 1.0) -> jax.Array:
    """Turn a standard normal value into a log-normal one.

    Args:
      x: the value.
      mean, sigma: the mean (which must be positive) and the standard deviation of the result, not
        of its logarithm.

    >>> from nnx.purify import log_normal
    >>> round(float(log_normal(0.0, mean=3.0, sigma=0.1)), 3)
    2.998
    """
    variance = jnp.log1p((sigma / jnp.asarray(mean)) ** 2)
    return mean * jnp.exp(jnp.sqrt(variance) * x - variance / 2)


def uniform(x: Any, *, low: Any = 0.0, high: Any = 1.0) -> jax.Array:
    """Turn a standard normal value into one that is uniform between `low` and `high`.

    >>> from nnx.purify import uniform
    >>> float(uniform(0.0, low=1.0, high=3.0))
    2.0
    """
    return low + (high - low) * jax.scipy.stats.norm.cdf(x)


def normal_variable(
    name: str, mean: Any = 0.0, sigma: Any = 1.0, shape: Any = (), dtype: Any = None
) -> jax.Array:
    """A normal random variable: a white-noise parameter, and an intermediate of the same name.

    Args:
      name: the name of both.
      mean, sigma: the mean and the standard deviation. shape, dtype: as for `param`.

    >>> from nnx.purify import normal_variable, purify
    >>> model = purify(lambda: normal_variable("height", mean=1.7, sigma=0.1))
    >>> round(float(model({"height": 1.0})), 2)
    1.8
    """
    return intermediate(normal(param(shape, name, dtype), mean=mean, sigma=sigma), name)


def log_normal_variable(
    name: str, mean: Any = 1.0, sigma: Any = 1.0, shape: Any = (), dtype: Any = None
) -> jax.Array:
    """A log-normal random variable: a white-noise parameter, and an intermediate of the same name.

    Args:
      name: the name of both.
      mean, sigma: the mean and the standard deviation of the variable itself.
      shape, dtype: as for `param`.

    >>> from nnx.purify import log_normal_variable, purify
    >>> model = purify(lambda: log_normal_variable("alpha", mean=3.0, sigma=0.1))
    >>> round(float(model.intermediates(model.zeros())["alpha"]), 3)
    2.998
    """
    return intermediate(log_normal(param(shape, name, dtype), mean=mean, sigma=sigma), name)


def uniform_variable(
    name: str, low: Any = 0.0, high: Any = 1.0, shape: Any = (), dtype: Any = None
) -> jax.Array:
    """A uniform random variable: a white-noise parameter, and an intermediate of the same name.

    Args:
      name: the name of both.
      low, high: the bounds.
      shape, dtype: as for `param`.

    >>> from nnx.purify import purify, uniform_variable
    >>> model = purify(lambda: uniform_variable("phase", high=4.0))
    >>> float(model(model.zeros()))
    2.0
    """
    return intermediate(uniform(param(shape, name, dtype), low=low, high=high), name)
