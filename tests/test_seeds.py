"""Programs from the documents of other projects, in our terms."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx


class Linear(nnx.Module):
    # mark parameter fields
    w: jax.Array = nnx.param()
    b: jax.Array = nnx.param()

    def __init__(self, din: int, dout: int):
        key = self.make_rng("params")  # request an RNG key
        self.w = jax.random.uniform(key, (din, dout))
        self.b = jax.numpy.zeros((dout,))

    def __call__(self, x):
        return x @ self.w + self.b


@nnx.jit
def train_step(model, x, y):
    def loss_fn(model):
        y_pred = model(x)
        return jax.numpy.mean((y_pred - y) ** 2)

    # compute gradient
    grad = nnx.grad(loss_fn, wrt="params")(model)
    # sgd update
    model["params"] = jax.tree.map(lambda w, g: w - 0.1 * g, model["params"], grad)


def batch(din=12, dout=2):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(16, din)), jnp.float32)
    return x, jnp.asarray(rng.normal(size=(16, dout)), jnp.float32)


@pytest.mark.parametrize("key", [jax.random.PRNGKey(0), jax.random.key(0)])
def test_a_linear_module_trains_with_no_return(key):
    model = Linear.init(key)(12, 2)
    x, y = batch()
    losses = []
    for _ in range(4):
        losses.append(float(jnp.mean((model(x) - y) ** 2)))
        assert train_step(model, x, y) is None
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


class Block(nnx.Module):
    def __init__(self, linear: nnx.Linear):
        self.linear = linear
        self.bn = nnx.BatchNorm(2)

    def __call__(self, x):
        return nnx.relu(self.bn(self.linear(x)))


class Model(nnx.Module):
    def __init__(self):
        shared = nnx.Linear(2, 2)
        self.block1 = Block(shared)
        self.block2 = Block(shared)

    def __call__(self, x):
        x = self.block1(x)
        x = self.block2(x)
        return x


def loss_fn(model: Model, x: jax.Array, y: jax.Array):
    y_pred = model.apply(use_running_average=False)(x)
    return jnp.mean((y - y_pred) ** 2)


def test_blocks_that_share_a_layer_stay_in_sync():
    model = Model.init(jax.random.PRNGKey(0))()
    x, y = batch(2, 2)
    assert loss_fn(model, x, y).shape == ()

    @nnx.jit
    def step(model, x, y):
        grads = nnx.grad(loss_fn)(model, x, y)
        model["params"] = jax.tree.map(lambda w, g: w - 0.1 * g, model["params"], grads)

    linear, kernel = model.block1.linear, model.block1.linear.kernel
    mean = model.block1.bn.mean
    with jax.check_tracer_leaks():
        step(model, x, y)
    assert model.block1.linear is model.block2.linear is linear
    assert not (linear.kernel == kernel).all() and not (model.block1.bn.mean == mean).all()
    assert [p for p in model["params"] if "linear" in p] == [
        ("block1", "linear", "kernel"),
        ("block1", "linear", "bias"),
    ]
    clone = nnx.merge(*nnx.split(model))
    assert clone.block1.linear is clone.block2.linear is not linear


def test_running_averages_are_chosen_by_the_scope():
    model = Model.init(0)()
    x, _ = batch(2, 2)
    model.apply(use_running_average=True)(x)
    assert (model.block1.bn.mean == 0).all()
    model.apply(use_running_average=False)(x)
    assert not (model.block1.bn.mean == 0).all()


# ---- modules as pytrees, with a generated __init__


@nnx.dataclass
class Affine(nnx.Module):
    # The __init__ method is generated
    w: jax.Array = nnx.param()
    b: jax.Array = nnx.param()

    # additional initialization methods via classmethods
    @classmethod
    def make(cls, key, dim_in, dim):
        w = jax.random.normal(key, (dim, dim_in)) * 0.02
        b = jax.numpy.zeros((dim,))
        return cls(w=w, b=b)

    def __call__(self, x):
        return self.w @ x + self.b


@pytest.fixture
def sequential():
    key1, key2 = jax.random.split(jax.random.PRNGKey(42))
    return nnx.Sequential(Affine.make(key1, 3, 2), Affine.make(key2, 2, 5))


def test_every_transformation_takes_a_module(sequential):
    x = jnp.ones((4, 3))
    out = jnp.stack([sequential(row) for row in x])
    assert out.shape == (4, 5)
    both = jax.jit(lambda m, x: jax.vmap(lambda row: m(row))(x))(sequential, x)
    np.testing.assert_allclose(both, out, rtol=1e-5)
    grads = jax.grad(lambda m: m(x[0]).sum())(sequential)
    assert isinstance(grads, nnx.Sequential) and (grads.layers[1].b == 1).all()


def test_bound_methods_are_modules_too(sequential):
    x = jnp.ones(3)
    method = sequential.__call__
    assert len(jax.tree.leaves(method)) == 4
    np.testing.assert_allclose(jax.jit(lambda f, x: f(x))(method, x), sequential(x), rtol=1e-5)


def test_key_paths_name_attributes(sequential):
    names = [
        jax.tree_util.keystr(path, simple=True)
        for path, _ in jax.tree_util.tree_leaves_with_path(sequential)
    ]
    assert names == ["layers.0.w", "layers.0.b", "layers.1.w", "layers.1.b"]

    def freeze(path, leaf):
        return leaf * 0 if jax.tree_util.keystr(path, simple=True).endswith("b") else leaf

    grads = jax.grad(lambda m: m(jnp.ones(3)).sum())(sequential)
    frozen = jax.tree_util.tree_map_with_path(freeze, grads)
    assert (frozen.layers[1].b == 0).all() and not (frozen.layers[1].w == 0).all()


def test_the_generated_init_has_the_fields_as_its_signature():
    assert list(inspect.signature(Affine).parameters) == ["w", "b"]
    with pytest.raises(TypeError):
        Affine(jnp.ones(1))
