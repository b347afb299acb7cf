"""Equinox over modules, modules in Equinox, and Equinox in modules."""

import io

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import nnx

X = jax.random.normal(jax.random.key(0), (6, 2))


@pytest.fixture
def net():
    with nnx.scope(0):
        return nnx.Sequential(nnx.Linear(2, 4), nnx.tanh, nnx.Linear(4, 2))


def loss(model):
    return (model(X) ** 2).mean()


def same(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) == len(b) and all(map(lambda x, y: bool(jnp.allclose(x, y, atol=1e-5)), a, b))


def test_the_filtered_transformations_take_modules(net):
    grads = nnx.grad(loss)(net)
    assert same(eqx.filter_jit(eqx.filter_grad(loss))(net), grads)
    assert same(eqx.filter_jit(lambda m, x: m(x))(net, X), net(X))
    stacked = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), net)
    out = eqx.filter_vmap(lambda m, x: m(x), in_axes=(eqx.if_array(0), None))(stacked, X)
    assert same(out[0], net(X))
    assert same(eqx.filter_jit(eqx.filter_checkpoint(loss))(net), loss(net))
    frozen = nnx.frozen(net)
    assert same(eqx.filter_jit(lambda x: frozen(x))(X), net(X))
    with pytest.raises(nnx.ReadOnlyError, match=r"plain jax transformation that compiles"):
        eqx.filter_jit(lambda m: m(X))(nnx.BatchNorm(2))


def test_partition_combine_and_a_step(net):
    params, static = eqx.partition(net, eqx.is_inexact_array)
    grads = jax.jit(jax.grad(lambda params: loss(eqx.combine(params, static))))(params)
    assert same(grads, nnx.grad(loss)(net))
    tx = optax.adam(0.1)

    @eqx.filter_jit
    def step(model, state):
        value, grads = eqx.filter_value_and_grad(loss)(model)
        updates, state = tx.update(grads, state, model)
        return eqx.apply_updates(model, updates), state, value

    model, state, values = net, tx.init(eqx.filter(net, eqx.is_array)), []
    for _ in range(5):
        model, state, value = step(model, state)
        values.append(value)
    assert same(values[0], loss(net)) and values[-1] < values[0]


def test_backward_rules_over_modules(net):
    @eqx.filter_custom_vjp
    def total(model, x):
        return model(x).sum()

    @total.def_fwd
    def forward(perturbed, model, x):
        return total(model, x), None

    @total.def_bwd
    def backward(residuals, cotangent, perturbed, model, x):
        return jax.tree.map(lambda w, p: jnp.full_like(w, 7) if p else None, model, perturbed)

    for gradient in (nnx.grad(total)(net, X), nnx.jit(nnx.grad(total))(net, X)):
        assert all((g == 7).all() for g in gradient.values())


def test_surgery_and_files(net):
    zeroed = eqx.tree_at(lambda m: m.layers[0].kernel, net, jnp.zeros((2, 4)))
    assert not zeroed.layers[0].kernel.any() and net.layers[0].kernel.any()
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, net)
    file.seek(0)
    assert same(eqx.tree_deserialise_leaves(file, zeroed), net)


def test_a_module_in_an_equinox_module(net):
    class Scaled(eqx.Module):
        net: nnx.Module
        scale: jax.Array

        def __call__(self, x):
            return self.net(x) * self.scale

    model = Scaled(net, jnp.array(2.0))
    expected = nnx.grad(lambda m: ((2 * m(X)) ** 2).mean())(net)
    assert same(eqx.filter_grad(loss)(model).net, expected)
    grads = nnx.grad(loss)(model)
    assert same(grads, expected) and next(iter(grads))[0] == "net"
    # The nnx transformations write to the module in it.
    model = Scaled(nnx.BatchNorm(2), jnp.array(1.0))
    nnx.jit(lambda m: m(X))(model)
    assert jnp.allclose(model.net.mean, 0.01 * X.mean(0), atol=1e-4)


@pytest.mark.parametrize("how", ["partition", "linear"])
def test_an_equinox_module_is_a_parameter(how):
    class Model(nnx.Module):
        inner: eqx.Module = nnx.param()

        def __init__(self):
            if how == "linear":
                self.inner, self.rest = eqx.nn.Linear(2, 2, key=jax.random.key(0)), None
            else:
                mlp = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
                self.inner, self.rest = eqx.partition(mlp, eqx.is_array)

        def __call__(self, x):
            whole = self.inner if self.rest is None else eqx.combine(self.inner, self.rest)
            return jax.vmap(whole)(x)

    model = Model()
    optimizer = nnx.Optimizer(model, optax.adam(0.05))

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    values = [step(model, optimizer) for _ in range(5)]
    assert values[-1] < values[0]


def test_an_equinox_module_as_an_attribute_and_as_a_parameter_with_functions():
    mlp = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))

    class Model(nnx.Module):
        def __init__(self):
            self.mlp = mlp

        def __call__(self, x):
            return jax.vmap(self.mlp)(x)

    model = Model()
    assert same(nnx.jit(model)(X), jax.vmap(mlp)(X))
    grads = nnx.grad_filter(loss, filter_fn=nnx.is_inexact_array)(model)
    assert same(grads, eqx.filter_grad(loss)(model))

    class Wrong(nnx.Module):
        mlp: eqx.Module = nnx.param()

        def __init__(self):
            self.mlp = mlp

    with pytest.raises(
        nnx.RefError,
        match=r"Ref Wrong\.mlp was given.*holds a custom_jvp.*Keep settings and functions",
    ):
        nnx.grad(lambda m: jax.vmap(m.mlp)(X).sum())(Wrong())
