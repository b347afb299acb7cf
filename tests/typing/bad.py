"""A user's program with mistakes: a checker must find each marked line, and no other."""

import jax
import jax.numpy as jnp
import optax

import nnx


class Net(nnx.Module):
    w: jax.Array = nnx.param()

    def __init__(self, size: int):
        self.w = jnp.ones(size)
        self.head = nnx.Linear(size, 2)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(x * self.w)

    def encode(self, x: jax.Array) -> jax.Array:
        return x * self.w

    @nnx.jit
    def step(self, x: jax.Array) -> jax.Array:
        return self.haed(x)  # wrong


@nnx.dataclass
class Pool(nnx.Module):
    table: jax.Array = nnx.param()
    window: tuple[int, int] = nnx.static(default=(2, 2))


@nnx.jit
def step(model: Net, x: jax.Array) -> jax.Array:
    return model(x).sum()


def loss(model: Net, x: jax.Array) -> jax.Array:
    return model(x).sum()


x = jnp.ones(3)
net = Net(3)
Net()  # wrong
Net("3")  # wrong
Net.init(0)()  # wrong
Net.init(0)(3, sise=3)  # wrong
net.weight  # wrong
net.haed = nnx.Linear(3, 2)  # wrong
net.head = "no layer"  # wrong
net.encode()  # wrong
net.encode("text")  # wrong
net.apply(rngs=0).encodes(x)  # wrong
net.apply(rngs=0)("text")  # wrong
step(net)  # wrong
step("net", x)  # wrong
step(net, x, x)  # wrong
step.lowr(net, x)  # wrong
step.lower(x)  # wrong
net.step("text")  # wrong
Pool(x, windw=(2, 2))  # wrong
nnx.Linear(2)  # wrong
nnx.Lineer(2, 3)  # wrong
nnx.rellu(x)  # wrong
nnx.grad(loss, has_auxx=True)  # wrong
nnx.grad(loss)(net)  # wrong
value, grads, aux = nnx.value_and_grad(loss)(net, x)  # wrong
nnx.clone(net).weight  # wrong
nnx.load("model.npz", Net).weight  # wrong
dagdef, params = nnx.split(net, "params", ...)  # wrong
nnx.merge(nnx.split(net)[0]).weight  # wrong
nnx.cond(True, loss, loss, net)  # wrong
nnx.vmap(loss, in_axes=(None, 0))(net)  # wrong
nnx.Optimizer(net, optax.sgd(0.1)).update(nnx.grad(loss)(net, x), net)  # wrong
