"""numpyro and blackjax: samplers and variational inference over the values of a module."""

import blackjax
import jax
import jax.numpy as jnp
import numpyro
import optax
import pytest
from numpyro import distributions
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO

import nnx

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (16, 2))
Y = X @ jnp.array([1.0, -2.0]) + 0.5


@pytest.fixture
def net():
    return nnx.Linear.init(0)(2, 1)


def sample(model, *args):
    mcmc = MCMC(NUTS(model), num_warmup=60, num_samples=40, progress_bar=False)
    mcmc.run(KEY, *args)
    return mcmc.get_samples()


def test_numpyro_takes_a_frozen_module_as_a_constant(net):
    # The mean of the residuals of the module's predictions, whose posterior is known.
    def model(net, x, y):
        shift = numpyro.sample("shift", distributions.Normal(0.0, 1.0))
        numpyro.sample("y", distributions.Normal(net(x)[:, 0] + shift, 1.0), obs=y)

    samples = sample(model, nnx.frozen(net), X, Y)
    expected = (Y - net(X)[:, 0]).sum() / (len(X) + 1)
    assert abs(samples["shift"].mean() - expected) < 3 * (1 / 17) ** 0.5
    with pytest.raises(
        nnx.ClosureError, match=r"(?s)numpyro.*use nnx\.frozen\(model\), a constant"
    ):
        sample(model, net, X, Y)


def test_numpyro_samples_the_weights_of_a_module(net):
    pure, state = nnx.functional(net)

    def model(x, y):
        prior = lambda w: distributions.Normal(jnp.zeros(w.shape), 3.0).to_event(w.ndim)
        weights = {path: numpyro.sample(".".join(path), prior(w)) for path, w in state.items()}
        out, _ = pure(nnx.Partition(weights), x)
        numpyro.sample("y", distributions.Normal(out[:, 0], 0.1), obs=y)

    samples = sample(model, X, Y)
    assert jnp.allclose(samples["kernel"].mean(0)[:, 0], jnp.array([1.0, -2.0]), atol=0.15)
    # The samples are a stack of models.
    outputs = jax.vmap(lambda weights: pure(nnx.Partition(weights), X)[0])(samples)
    assert outputs.shape == (40, 16, 1)


def test_numpyro_learns_the_parameters_of_a_module(net):
    def model(x, y):
        params = numpyro.param("net", first)
        out = nnx.merge(dagdef, params)(x)
        numpyro.sample("y", distributions.Normal(out[:, 0], 1.0), obs=y)

    dagdef, first = nnx.split(net)
    svi = SVI(model, lambda x, y: None, optax.adam(0.3), Trace_ELBO())
    result = svi.run(KEY, 60, X, Y, progress_bar=False)
    nnx.update(net, result.params["net"])
    assert jnp.allclose(net.kernel[:, 0], jnp.array([1.0, -2.0]), atol=0.1)


def test_numpyro_in_a_step_with_an_amortised_guide():
    class Guide(nnx.Module):
        def __init__(self):
            self.encoder = nnx.Linear(2, 2)

        def __call__(self, x):
            loc, scale = jnp.moveaxis(self.encoder(x), -1, 0)
            numpyro.sample("z", distributions.Normal(loc, jnp.exp(scale)).to_event(1))

    def model(guide, x):
        z = numpyro.sample("z", distributions.Normal(jnp.zeros(16), 1.0).to_event(1))
        numpyro.sample("x", distributions.Normal(z[:, None], 1.0).to_event(2), obs=x)

    guide = Guide.init(0)()
    optimizer = nnx.Optimizer(guide, optax.adam(0.1))

    @nnx.jit
    def step(guide, optimizer, key):
        elbo = lambda guide: Trace_ELBO(8).loss(key, {}, model, lambda g, x: g(x), guide, X)
        loss, grads = nnx.value_and_grad(elbo)(guide)
        optimizer.update(guide, grads)
        return loss

    losses = [step(guide, optimizer, jax.random.key(i)) for i in range(15)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("as_module", [True, False])
def test_blackjax_samples_weights(net, as_module):
    pure, state = nnx.functional(net)
    predict = (lambda m: m(X)) if as_module else (lambda state: pure(state, X)[0])

    def log_density(position):
        prior = sum((w**2).sum() for w in jax.tree.leaves(position))
        return -50 * ((predict(position)[:, 0] - Y) ** 2).sum() - prior / 18

    sampler = blackjax.hmc(log_density, 1e-2, jnp.ones(3), num_integration_steps=10)
    first = sampler.init(net if as_module else state)

    @jax.jit
    def run(state):
        return jax.lax.scan(
            lambda s, key: (sampler.step(key, s)[0],) * 2, state, jax.random.split(KEY, 60)
        )

    position = run(first)[1].position
    kernel = position.kernel if as_module else position["kernel"]
    assert jnp.allclose(kernel[30:].mean(0)[:, 0], jnp.array([1.0, -2.0]), atol=0.15)


def test_blackjax_inside_a_step_that_closes_over_a_module(net):
    @nnx.jit
    def step(key, shift):
        log_density = lambda shift: -((net(X)[:, 0] + shift - Y) ** 2).sum() / 2
        sampler = blackjax.mala(log_density, 1e-2)
        return sampler.step(key, sampler.init(shift))[0].logdensity

    before = step(KEY, jnp.array(0.0))
    net.bias = net.bias + 100
    assert step(KEY, jnp.array(0.0)) < before - 1000
