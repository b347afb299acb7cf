"""Random variables as functions of white noise, so that a standard normal prior serves them all."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from nnx.purify.markers import intermediate, param

__all__ = [
    "log_normal",
    "log_normal_variable",
    "normal",
    "normal_variable",
    "uniform",
    "uniform_variable",
]


def normal(x: Any, *, mean: Any = 0.0, sigma: Any = 1.0) -> jax.Array:
    """A standard normal value as one with this mean and standard deviation.

    >>> from nnx.purify import normal
    >>> float(normal(2.0, mean=1.0, sigma=0.5))
    2.0
    """
    return jnp.asarray(x) * sigma + mean


def log_normal(x: Any, *, mean: Any = 1.0, sigma: Any = 1.0) -> jax.Array:
    """A standard normal value as a log-normal one.

    Args:
      x: the value.
      mean, sigma: mean, which is positive, and standard deviation of the result, not of its logarithm.

    >>> from nnx.purify import log_normal
    >>> round(float(log_normal(0.0, mean=3.0, sigma=0.1)), 3)
    2.998
    """
    variance = jnp.log1p((sigma / jnp.asarray(mean)) ** 2)
    return mean * jnp.exp(jnp.sqrt(variance) * x - variance / 2)


def uniform(x: Any, *, low: Any = 0.0, high: Any = 1.0) -> jax.Array:
    """A standard normal value as one that is uniform between `low` and `high`.

    >>> from nnx.purify import uniform
    >>> float(uniform(0.0, low=1.0, high=3.0))
    2.0
    """
    return low + (high - low) * jax.scipy.stats.norm.cdf(x)


def normal_variable(
    name: str, mean: Any = 0.0, sigma: Any = 1.0, shape: Any = (), dtype: Any = None
) -> jax.Array:
    """A normal random variable: a parameter of white noise, and an intermediate of the same name.

    Args:
      name: of both.
      mean, sigma: mean and standard deviation.
      shape, dtype: as for `param`.

    >>> from nnx.purify import normal_variable, purify
    >>> model = purify(lambda: normal_variable("height", mean=1.7, sigma=0.1))
    >>> round(float(model({"height": 1.0})), 2)
    1.8
    """
    return intermediate(normal(param(shape, name, dtype), mean=mean, sigma=sigma), name)


def log_normal_variable(
    name: str, mean: Any = 1.0, sigma: Any = 1.0, shape: Any = (), dtype: Any = None
) -> jax.Array:
    """A log-normal random variable: a parameter of white noise, and an intermediate of the same name.

    Args:
      name: of both.
      mean, sigma: mean and standard deviation of the variable itself.
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
    """A uniform random variable: a parameter of white noise, and an intermediate of the same name.

    Args:
      name: of both.
      low, high: the bounds.
      shape, dtype: as for `param`.

    >>> from nnx.purify import purify, uniform_variable
    >>> model = purify(lambda: uniform_variable("phase", high=4.0))
    >>> float(model(model.zeros()))
    2.0
    """
    return intermediate(uniform(param(shape, name, dtype), low=low, high=high), name)
