"""Modules and steps that many tests use."""

import jax
import jax.numpy as jnp
import numpy as np

import nnx


class Dense(nnx.Module):
    w: jax.Array = nnx.param()
    b: jax.Array = nnx.param()
    calls: jax.Array = nnx.ref("counters")

    def __init__(self, n: int = 2, m: int = 2, seed: int = 0):
        self.w = jnp.asarray(np.random.default_rng(seed).normal(size=(n, m)), jnp.float32)
        self.b = jnp.zeros(m)
        self.calls = jnp.array(0)

    def __call__(self, x):
        self.calls = self.calls + 1
        return x @ self.w + self.b


class Net(nnx.Module):
    """Two blocks in a list that share one layer, and a separate layer."""

    def __init__(self):
        shared = Dense(seed=1)
        self.blocks = [shared, Dense(seed=2), shared]
        self.scale = 2.0

    def __call__(self, x):
        for block in self.blocks:
            x = jnp.tanh(block(x)) * self.scale
        return x


def sgd(model, x, y):
    """One step of gradient descent; it returns nothing."""
    grads = nnx.grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
    model["params"] = jax.tree.map(lambda w, g: w - 0.1 * g, model["params"], grads)
