"""The quick start: a linear model, trained by a function that returns nothing."""

import jax
import jax.numpy as jnp

import nnx


class Linear(nnx.Module):
    w: jax.Array = nnx.param()
    b: jax.Array = nnx.param()

    def __init__(self, din: int, dout: int):
        self.w = jax.random.uniform(self.make_rng("params"), (din, dout))
        self.b = jnp.zeros((dout,))

    def __call__(self, x):
        return x @ self.w + self.b


model = Linear.init(jax.random.key(0))(12, 2)


@nnx.jit
def train_step(model, x, y):
    def loss_fn(model):
        return jnp.mean((model(x) - y) ** 2)

    grads = nnx.grad(loss_fn, wrt="params")(model)
    model["params"] = jax.tree.map(lambda w, g: w - 0.1 * g, model["params"], grads)


x = jax.random.normal(jax.random.key(1), (64, 12))
y = x[:, :2] - x[:, 2:4]

print("loss before:", jnp.mean((model(x) - y) ** 2))
for _ in range(100):
    train_step(model, x, y)  # no return: model has learned
print("loss after: ", jnp.mean((model(x) - y) ** 2))
