"""distrax: bijectors and distributions over modules, made in a call and kept as attributes."""

import distrax
import jax
import jax.numpy as jnp
import optax
import pytest

import nnx

X = jax.random.normal(jax.random.key(0), (6, 4))
MASK = jnp.arange(4) % 2 == 0


def affine(params):
    return distrax.ScalarAffine(params[..., :4], log_scale=jnp.tanh(params[..., 4:]))


def conditioner():
    return nnx.Sequential(nnx.Linear(4, 8), nnx.tanh, nnx.Linear(8, 8))


class InCall(nnx.Module):
    def __init__(self):
        self.net = conditioner()

    def __call__(self, x):
        coupling = distrax.MaskedCoupling(MASK, self.net, affine)
        base = distrax.MultivariateNormalDiag(jnp.zeros(4))
        return distrax.Transformed(base, distrax.Inverse(coupling)).log_prob(x)


class InInit(nnx.Module):
    def __init__(self):
        self.net = conditioner()
        # Bijectors flatten their contents, here a bijector in a bijector.
        self.bijector = distrax.Inverse(distrax.MaskedCoupling(MASK, self.net, affine))

    def __call__(self, x):
        base = distrax.MultivariateNormalDiag(jnp.zeros(4))
        return distrax.Transformed(base, self.bijector).log_prob(x)


def by_hand(net, x):
    params = net(jnp.where(MASK, x, 0))
    log_scale = jnp.where(MASK, 0, jnp.tanh(params[..., 4:]))
    y = x * jnp.exp(log_scale) + jnp.where(MASK, 0, params[..., :4])
    return (jax.scipy.stats.norm.logpdf(y) + log_scale).sum(-1)


@pytest.mark.parametrize("kind", [InCall, InInit])
def test_a_flow(kind):
    flow = kind.init(0)()
    assert len(nnx.refs(flow)) == 4
    assert jnp.allclose(flow(X), by_hand(flow.net, X), atol=1e-4)
    expected = nnx.grad(lambda net: by_hand(net, X).sum())(flow.net)
    log_prob = lambda flow: flow(X).sum()
    for transform in (nnx.grad, lambda f: nnx.jit(nnx.grad(f))):
        grads = transform(log_prob)(flow)
        assert all(jnp.allclose(grads["net", *p], g, atol=1e-3) for p, g in expected.items())
    grads = jax.jit(jax.grad(log_prob, allow_int=True))(flow)
    assert jnp.allclose(grads.net.layers[0].kernel, expected["layers.0.kernel"], atol=1e-3)
    optimizer = nnx.Optimizer(flow, optax.adam(0.01))

    @nnx.jit
    def step(flow, optimizer):
        loss, grads = nnx.value_and_grad(lambda flow: -flow(X).mean())(flow)
        optimizer.update(flow, grads)
        return loss

    losses = [step(flow, optimizer) for _ in range(10)]
    assert losses[-1] < losses[0]
    assert jnp.allclose(flow(X), by_hand(flow.net, X), atol=1e-4)
    assert len(nnx.refs(nnx.clone(flow))) == 4


def test_functions_that_close_over_a_bijector_see_its_module():
    with nnx.scope(0):
        net = conditioner()
    bijector = distrax.Chain([distrax.MaskedCoupling(MASK, net, affine)])
    for forward in (nnx.jit(bijector.forward), nnx.jit(lambda x: bijector.forward(x))):
        for _ in range(2):
            assert jnp.allclose(forward(X), bijector.forward(X), atol=1e-5)
            net.layers[2].bias = net.layers[2].bias + 1


def test_distributions_come_out_and_stay_in():
    class Policy(nnx.Module):
        def __init__(self):
            self.net = nnx.Linear(4, 3)
            self.prior = distrax.Normal(jnp.zeros(3), jnp.ones(3))

        def __call__(self, x):
            return distrax.Categorical(logits=self.net(x))

    policy = Policy.init(0)()
    expected = jax.nn.log_softmax(policy.net(X))[:, 0]
    for out in (nnx.jit(policy)(X), jax.jit(lambda p: p(X))(policy)):
        assert jnp.allclose(out.log_prob(jnp.zeros(6, int)), expected, atol=1e-5)
    penalty = lambda policy: policy.prior.log_prob(policy.net.bias + 1).sum()
    assert jnp.allclose(nnx.grad(penalty)(policy)["net.bias"], -1)
