"""A user's program, with the type that a checker must infer behind each expression."""

from collections.abc import Callable
from typing import Any, assert_type

import jax
import jax.export
import jax.numpy as jnp
import optax

import nnx
from nnx import gelu, max_pool


class Block(nnx.Module):
    scale: jax.Array = nnx.param()
    count: jax.Array = nnx.ref("counters")

    def __init__(self, size: int):
        self.scale = jnp.ones(size)
        self.count = jnp.zeros(())
        self.linear = nnx.Linear(size, size)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.linear(x)) * self.scale


class Net(nnx.Module):
    def __init__(self, size: int, depth: int = 2):
        self.blocks = [Block(size) for _ in range(depth)]
        self.cell = nnx.LSTMCell(size, size)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return x

    def encode(self, x: jax.Array) -> jax.Array:
        return self.blocks[0](x)

    @nnx.jit
    def step(self, x: jax.Array) -> jax.Array:
        return self(x)


@nnx.dataclass
class Pool(nnx.Module):
    table: jax.Array = nnx.param()
    window: tuple[int, int] = nnx.static(default=(2, 2))


x = jnp.ones((3, 4))
net = Net(4)
assert_type(net, Net)
assert_type(Net.init(0)(4, depth=1), Net)
assert_type(Net.init(jax.random.key(0), training=True)(size=4), Net)
assert_type(net(x), jax.Array)
assert_type(net.apply(rngs=0)(x), jax.Array)
assert_type(net.apply(mutable="params").encode(x), jax.Array)
assert_type(net.train().eval(), Net)
assert_type(net.blocks[0].linear, nnx.Linear)
assert_type(net.blocks[0].scale, jax.Array)
assert_type(net["params"], nnx.Partition)
assert_type(nnx.clone(net), Net)
assert_type(nnx.frozen(net), Net)
assert_type(nnx.replace(net, nnx.Linear, lambda layer: layer), Net)
assert_type(nnx.modules(net, nnx.Linear), dict[tuple[str, ...], nnx.Linear])
assert_type(nnx.eval_shape(lambda: Net.init(0)(4)), Net)
loaded: Net = nnx.load("model.npz")
assert_type(nnx.load("model.npz", Net), Net)
assert_type(nnx.load("run/", kind=nnx.Linear, only="params"), nnx.Linear)
assert_type(Pool(x, window=(3, 3)).window, tuple[int, int])
assert_type(nnx.Linear(2, 3), nnx.Linear)
assert_type(gelu(x), jax.Array)
assert_type(max_pool(x, (2,)), jax.Array)
assert_type(nnx.make_causal_mask(x), jax.Array)

dagdef, params, rest = nnx.split(net, "params", ...)
assert_type(dagdef, nnx.DagDef[Net])
assert_type(rest, nnx.Partition)
assert_type(nnx.merge(dagdef, params, rest), Net)


def loss(model: Net, x: jax.Array) -> jax.Array:
    return model(x).sum()


def loss_and_size(model: Net, x: jax.Array) -> tuple[jax.Array, int]:
    return model(x).sum(), x.size


assert_type(nnx.grad(loss)(net, x), nnx.Partition | Any)
assert_type(nnx.grad(loss, argnums=(0, 1))(net, x), tuple[nnx.Partition | Any, ...])
assert_type(nnx.value_and_grad(loss)(net, x), tuple[jax.Array, nnx.Partition | Any])
assert_type(
    nnx.value_and_grad(loss_and_size, has_aux=True)(net, x),
    tuple[tuple[jax.Array, int], nnx.Partition | Any],
)
value, grads = nnx.value_and_grad(lambda model: model(x).sum())(net)


@nnx.jit
def step(model: Net, x: jax.Array) -> jax.Array:
    return loss(model, x)


@nnx.jit(donate=True)
def donating(model: Net, *, x: jax.Array) -> None:
    model.blocks[0].scale = model.blocks[0].scale + x.sum()


assert_type(step(net, x), jax.Array)
assert_type(donating(net, x=x), None)
assert_type(net.step(x), jax.Array)
assert_type(nnx.jit(net)(x), jax.Array)
assert_type(nnx.jit(net.encode)(x), jax.Array)
step.lower(net, x).compile().cost_analysis()
step.trace(net, x).lower()
step.explain(net, x).reasons
Net.step.lower(net, x)
net.step.lower(net, x)

assert_type(nnx.vmap(net)(x), jax.Array)
assert_type(nnx.vmap(loss, in_axes=(None, 0))(net, x), jax.Array)
assert_type(nnx.remat(loss)(net, x), jax.Array)
remat: Callable[[Net, jax.Array], jax.Array] = nnx.remat(prevent_cse=False)(loss)
assert_type(nnx.cond(True, loss, lambda model, x: x.sum(), net, x), jax.Array)
assert_type(nnx.scan(lambda c, x: (c + x.sum(), net(x)), x.sum(), x), tuple[jax.Array, jax.Array])
assert_type(nnx.scan(lambda _, x: (None, step(net, x)), None, x), tuple[None, jax.Array])
assert_type(nnx.map(net, x), jax.Array)
assert_type(nnx.while_loop(lambda x: x.sum() < 3, net, x), jax.Array)

optimizer = nnx.Optimizer(net, optax.sgd(0.1))
optimizer.update(net, grads)
average = nnx.metrics.Average()
average.update(values=value)
mask = nnx.training.mask(net, "params")
assert_type(isinstance(average, nnx.Metric), bool)

assert_type(jax.export.export(nnx.jit(loss))(net, x), jax.export.Exported)
jax.export.export(nnx.jit(net))(x)
jax.export.export(nnx.jit(net.encode))(x)
jax.export.export(Net.step)(net, x)
jax.export.export(net.step)(net, x)
jax.export.export(nnx.jit_filter(loss))(net, x)
wrapped: jax.stages.Wrapped = nnx.jit_filter(donate_argnums=1)(loss)
assert_type(nnx.jit_filter(loss)(net, x), jax.Array)
nnx.jit_filter(loss).lower(net, x).compile()(net, x)
