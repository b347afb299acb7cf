"""Custom rules with a traced value among the arguments that are not differentiated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx import CustomRuleError


@functools.partial(nnx.custom_vjp, nondiff_argnums=(0, 3))
def by_vjp(n, w, x, mode):
    return w.value * x * n["scale"] if mode == "times" else x


by_vjp.defvjp(
    lambda n, w, x, mode: (by_vjp(n, w, x, mode), x),
    lambda n, mode, x, g: ({"": 10 * g * x * n["scale"]}, None),
)


@functools.partial(nnx.custom_jvp, nondiff_argnums=(0, 3))
def by_jvp(n, w, x, mode):
    return w.value * x * n["scale"] if mode == "times" else x


@by_jvp.defjvp
def _(n, mode, primals, tangents):
    (w, x), (dw, _) = primals, tangents
    return by_jvp(n, w, x, mode), 10 * dw[""] * x * n["scale"]


@pytest.fixture(params=[by_vjp, by_jvp])
def f(request):
    def call(n, w, x):
        return request.param({"scale": n, "name": "n"}, w, x, "times")

    return call


@pytest.fixture
def w():
    return nnx.Ref(jnp.array(2.0), "params")


ns = jnp.arange(3.0)
WAYS = {
    "eager": lambda f, w: sum(nnx.grad(lambda w, n=n: f(n, w, 3.0))(w)[""] for n in (0.0, 1.0, 2.0)),
    "jit": lambda f, w: sum(nnx.jit(nnx.grad(lambda w, n: f(n, w, 3.0)))(w, n)[""] for n in ns),
    "grad of jit": lambda f, w: nnx.grad(nnx.jit(lambda w, n: f(n, w, 3.0)))(w, 3.0)[""],
    "vmap of grad": lambda f, w: nnx.vmap(lambda n: nnx.grad(lambda w: f(n, w, 3.0))(w)[""])(ns).sum(),
    "grad of vmap": lambda f, w: nnx.grad(lambda w: nnx.vmap(lambda n: f(n, w, 3.0))(ns).sum())(w)[""],
    "scan": lambda f, w: nnx.grad(
        lambda w: nnx.scan(lambda c, n: (c + f(n, w, 3.0), None), jnp.zeros(()), ns)[0]
    )(w)[""],
    "jax.jit": lambda f, w: jax.jit(lambda n, w: nnx.grad(lambda w: f(n, w, 3.0))(w)[""])(3.0, w),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_the_rule_gets_the_traced_value(way, f, w):
    with jax.check_tracer_leaks():
        np.testing.assert_allclose(WAYS[way](f, w), 90.0)


def test_differentiating_it_is_an_error(f, w):
    with pytest.raises(CustomRuleError, match=r"an argument in nondiff_argnums.*stop_gradient"):
        jax.grad(lambda n: f(n, w, 3.0))(2.0)
    grads = nnx.grad(lambda w: f(jax.lax.stop_gradient(w.value) + 1, w, 3.0))(w)
    np.testing.assert_allclose(grads[""], 90.0)


def test_keys_and_integers_may_be_traced(w):
    @functools.partial(nnx.custom_vjp, nondiff_argnums=(0, 1))
    def noisy(key, i, w):
        return w.value * jax.random.uniform(key) * i

    noisy.defvjp(
        lambda key, i, w: (noisy(key, i, w), None),
        lambda key, i, _, g: ({"": g * jax.random.uniform(key) * i},),
    )
    key = jax.random.key(0)
    grad = nnx.jit(lambda w, key, i: nnx.grad(lambda w: noisy(key, i, w))(w)[""])(w, key, 3)
    np.testing.assert_allclose(grad, 3 * jax.random.uniform(key), rtol=1e-6)
