"""Adaptive pooling, against NumPy's reductions of the windows that PyTorch documents."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

import nnx


def windows(size, count):
    return [
        slice(math.floor(i * size / count), math.ceil((i + 1) * size / count)) for i in range(count)
    ]


def pooled(x, shape, reduce):
    first = x.ndim - 1 - len(shape)
    shape = [x.shape[first + i] if n is None else n for i, n in enumerate(shape)]
    out = np.zeros((*x.shape[:first], *shape, x.shape[-1]))
    grid = [list(enumerate(windows(x.shape[first + i], n))) for i, n in enumerate(shape)]
    for places in itertools.product(*grid):
        into = (..., *(i for i, _ in places), slice(None))
        axes = tuple(range(first, first + len(shape)))
        out[into] = reduce(x[(slice(None),) * first + tuple(s for _, s in places)], axis=axes)
    return out


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (None, 4), (5, 7), (8, 9)])
def test_the_windows_are_those_of_numpy(shape):
    x = np.random.default_rng(0).normal(size=(2, 5, 7, 3)).astype("float32")
    np.testing.assert_allclose(
        nnx.adaptive_avg_pool(x, shape), pooled(x, shape, np.mean), atol=1e-6
    )
    np.testing.assert_array_equal(nnx.adaptive_max_pool(x, shape), pooled(x, shape, np.max))


def test_dtypes():
    x = jnp.full((4096, 1), 1.001, jnp.bfloat16)
    y = nnx.adaptive_avg_pool(x, 1)
    assert y.dtype == jnp.bfloat16 and y[0, 0] == x[0, 0]
    assert nnx.adaptive_avg_pool(jnp.arange(4)[:, None], 2).dtype == jnp.float32
    assert nnx.adaptive_max_pool(jnp.arange(4)[:, None], 2).dtype == jnp.int32


@pytest.mark.parametrize("pool", [nnx.adaptive_avg_pool, nnx.adaptive_max_pool])
def test_what_cannot_be_pooled_says_why(pool):
    with pytest.raises(ValueError, match=r"\(2, 2\) expects inputs of shape .* but got \(4, 3\)"):
        pool(jnp.ones((4, 3)), (2, 2))
    with pytest.raises(
        ValueError, match=r"needs at least one position along each axis .* shape \(4, 3\)"
    ):
        pool(jnp.ones((4, 3)), 0)
    with pytest.raises(ValueError, match="needs at least one position along each axis"):
        pool(jnp.ones((0, 3)), 2)
