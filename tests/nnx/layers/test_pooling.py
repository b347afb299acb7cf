"""Pooling against flax, and the activation with a parameter."""

import flax.linen
import flax.nnx as fnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx.layers.pooling import avg_pool, max_pool, min_pool, pool
from nnx.layers.prelu import PReLU
from tests.nnx.layers.test_layer_norm import compare
from tests.nnx.layers.test_layers import draw

X = draw(2, 5, 6, 3)
OPTIONS = [
    {"window_shape": (2, 3), "strides": (2, 1), "padding": "SAME"},
    {"window_shape": (3, 3), "strides": (2, 2), "padding": ((1, 0), (0, 2))},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "name, more", [("max", {}), ("min", {}), ("avg", {}), ("avg", {"count_include_pad": False})]
)
def test_pools(name, more, options):
    ours = {"max": max_pool, "min": min_pool, "avg": avg_pool}[name]
    theirs = getattr(flax.linen, f"{name}_pool", None)
    if theirs is None:  # the minimum is the maximum of the negative
        theirs = lambda x, **options: -flax.linen.max_pool(-x, **options)

    def results(function, **options):
        y, pull = jax.vjp(lambda x: function(x, **options), X)
        return y, pull(jnp.sin(y))[0]

    y, grad = jax.jit(lambda: results(ours, **options, **more))()
    z, expected = jax.jit(lambda: results(theirs, **options, **more))()
    np.testing.assert_allclose(y, z, rtol=1e-5)
    np.testing.assert_allclose(grad, expected, atol=1e-5)


@pytest.mark.parametrize("function", [max_pool, min_pool, avg_pool])
def test_batches_and_dtypes(function):
    whole = function(X, (2, 2))
    np.testing.assert_allclose(function(X[0], (2, 2)), whole[0], rtol=1e-6)
    np.testing.assert_allclose(function(X[None], (2, 2))[0], whole, rtol=1e-6)
    assert function(X.astype(jnp.bfloat16), (2, 2)).dtype == jnp.bfloat16
    numbers = jnp.arange(4)[:, None]
    y = function(numbers, (2,), (2,), "SAME")
    expected = {max_pool: [1, 3], min_pool: [0, 2], avg_pool: [0.5, 2.5]}[function]
    assert y.ravel().tolist() == expected
    assert y.dtype == (jnp.float32 if function is avg_pool else numbers.dtype)


def test_flags_and_any_reduction():
    flags = jnp.array([True, False, False, True])[:, None]
    assert max_pool(flags, (2,), (2,)).ravel().tolist() == [True, True]
    assert min_pool(flags, (2,), (2,)).ravel().tolist() == [False, False]
    product = pool(X, 1.0, jax.lax.mul, (1, 2), (1, 2))
    np.testing.assert_allclose(product, X[:, :, ::2] * X[:, :, 1::2], rtol=1e-5)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: max_pool(X[0, 0], (2, 2)),
            r"window \(2, 2\) .*\*, \*, channels\), but got \(6, 3\)",
        ),
        (lambda: max_pool(X, (2, 2), (2,)), r"needs 2 strides, but got \(2,\)"),
        (lambda: avg_pool(X, (2, 2), padding=((1, 1),)), "each of its 2 axes .* got"),
        (lambda: avg_pool(X, (2, 2), padding=(1, 1)), r"each of its 2 axes .* got \(1, 1\)"),
    ],
)
def test_mistakes_raise_errors_that_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("options", [{}, {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}])
def test_prelu(options):
    compare(PReLU(0.3, **options), fnx.PReLU(0.3, **options), draw(4, 3))


def test_prelu_of_half_precision_of_integers_and_by_channel():
    assert PReLU()(draw(3, dtype=jnp.bfloat16)).dtype == jnp.bfloat16
    assert PReLU(0.5)(jnp.array([-2, 2])).tolist() == [-1.0, 2.0]
    layer = PReLU(jnp.array([0.0, 1.0]), negative_slope_metadata={"axes": "channels"})
    assert layer(jnp.array([[-1.0, -1.0]])).tolist() == [[0.0, -1.0]]
    assert nnx.get_ref(layer, "negative_slope").metadata["axes"] == "channels"
    with pytest.raises(ValueError, match=r"PReLU has .*\(2,\), which .* shape \(4, 3\)"):
        layer(draw(4, 3))


@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float4_e2m1fn", "bfloat16"]
)
def test_small_floats_with_and_without_infinity(dtype):
    x = jnp.array([-2.0, 1.0, -0.5, -4.0])[:, None].astype(dtype)
    high = [-2, 1, 1, -0.5, -4]
    low = [-2, -2, -0.5, -4, -4]
    for f, expected in ((max_pool, high), (min_pool, low)):
        y = f(x, (2,), padding=[(1, 1)])
        assert y.dtype == dtype and y.astype(jnp.float32).ravel().tolist() == expected
    grad = jax.grad(lambda x: max_pool(x, (4,)).astype(jnp.float32).sum())(x)
    assert grad.astype(jnp.float32).ravel().tolist() == [0, 1, 0, 0]


def test_averages_of_small_integers_and_maxima_of_what_has_no_order():
    for dtype in (jnp.int4, jnp.uint4, jnp.int2, jnp.bool_):
        y = avg_pool(jnp.array([1, 0, 1])[:, None].astype(dtype), (2,))
        assert y.dtype == jnp.float32 and abs(y).ravel().tolist() == [0.5, 0.5]
    for f in (max_pool, min_pool):
        message = r"order, but got .* dtype complex64 and shape \(4, 1\)\. Pool jnp\.abs"
        with pytest.raises(ValueError, match=message):
            f(jnp.ones((4, 1), jnp.complex64), (2,))
    assert avg_pool(jnp.ones((4, 1), jnp.complex64), (2,)).dtype == jnp.complex64
