"""Layers on a mesh with explicit axes, where the sharding of an array is part of its type."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nnx


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


IDS = jnp.arange(24).reshape(8, 3) % 7


def attention(**options):
    return nnx.MultiHeadAttention(2, 4, **options)


class Tied(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(7, 4)

    def __call__(self, x):
        return self.embed.attend(self.embed(x))


class Causal(nnx.Module):
    def __init__(self):
        self.attention = attention(dropout_rate=0.5)

    def __call__(self, x):
        return self.attention(x, is_causal=True)


class Decoding(nnx.Module):
    def __init__(self):
        self.attention = attention()
        self.attention.init_cache((8, 12, 4))

    def __call__(self, x):
        return self.attention(x, decode=True)


class Noisy(nnx.RNNCellBase):
    num_feature_axes = 1

    def __init__(self):
        self.cell, self.dropout = nnx.LSTMCell(4, 4), nnx.Dropout(0.5)

    def initialize_carry(self, input_shape, carry_init=None):
        return self.cell.initialize_carry(input_shape)

    def __call__(self, carry, inputs):
        return self.cell(carry, self.dropout(inputs))


class Padded(nnx.Module):
    def __init__(self):
        self.rnn = nnx.RNN(nnx.GRUCell(4, 4), reverse=True, keep_order=True, return_carry=True)

    def __call__(self, x):
        return self.rnn(x, seq_lengths=jnp.array([1, 2, 3, 1, 2, 3, 1, 2]))[1]


def after(*layers):
    return nnx.Sequential(nnx.Linear(4, 4), *layers)


LAYERS = {
    "Linear": (lambda: nnx.Linear(4, 4), draw(8, 4)),
    "Dropout": (lambda: after(nnx.Dropout(0.5)), draw(8, 3, 4)),
    "Dropout, rows": (lambda: after(nnx.Dropout(0.5, broadcast_dims=(1,))), draw(8, 3, 4)),
    "Dropout, batch": (lambda: after(nnx.Dropout(0.5, broadcast_dims=(0,))), draw(8, 3, 4)),
    "BatchNorm": (lambda: after(nnx.BatchNorm(4)), draw(8, 4)),
    "Conv": (lambda: nnx.Conv(4, 4, (3, 3)), draw(8, 4, 4, 4)),
    "Embed": (lambda: nnx.Embed(7, 4), IDS),
    "Embed, attend": (Tied, IDS),
    "attention": (attention, draw(8, 3, 4)),
    "attention, dropout": (lambda: attention(dropout_rate=0.5), draw(8, 3, 4)),
    "attention, dropout of each": (
        lambda: attention(dropout_rate=0.5, broadcast_dropout=False), draw(8, 3, 4),
    ),
    "attention, causal": (Causal, draw(8, 3, 4)),
    "attention, decoding": (Decoding, draw(8, 3, 4)),
    "RNN": (lambda: nnx.RNN(Noisy()), draw(8, 3, 4)),
    "RNN, lengths": (Padded, draw(8, 3, 4)),
    "Stack": (
        lambda: nnx.Stack(lambda: nnx.Sequential(nnx.Linear(4, 4), nnx.Dropout(0.5)), 2),
        draw(8, 4),
    ),
}  # fmt: skip


def step(model, x):
    def loss(model):
        y = model(x)
        return jnp.mean(y**2), y

    grads, y = nnx.grad(loss, wrt="params", has_aux=True)(model)
    model["params"] = jax.tree.map(lambda w, g: w - 0.1 * g, model["params"], grads)
    return y


def trained(make, x):
    with nnx.scope(0):
        model = make()
        if isinstance(x.sharding, NamedSharding):
            everywhere = NamedSharding(x.sharding.mesh, P())
            nnx.update(model, jax.device_put(nnx.get_partition(model), everywhere))
        jitted = nnx.jit(step)
        jitted(model, x)
        return jitted(model, x), model["params"]


@pytest.mark.parametrize(
    ("name", "ambient"),
    [
        # From JAX 0.11 on, the gradient through a scan needs the mesh in the context.
        *((name, name.startswith("RNN")) for name in LAYERS),
        ("attention, decoding", True),
    ],
)
def test_two_steps_and_a_call_are_those_without_a_mesh(mesh, name, ambient):
    make, x = LAYERS[name]
    y, params = trained(make, x)
    with jax.set_mesh(mesh) if ambient else contextlib.nullcontext():
        z, placed = trained(make, jax.device_put(x, NamedSharding(mesh, P("data"))))
    assert z.sharding.spec[0] == "data"
    np.testing.assert_allclose(z, y, atol=1e-4)
    for path in params:
        np.testing.assert_allclose(placed[path], params[path], atol=1e-4)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("options", [{}, {"broadcast_dims": (1,)}])
def test_dropout_with_a_stream_that_is_on_the_mesh(mesh, jitted, options):
    drop = nnx.Dropout(0.5, **options)
    call = nnx.jit(drop) if jitted else drop
    with nnx.scope(0):
        plain = [call(jnp.ones((8, 8))) for _ in range(3)]
    x = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, P("data")))
    key = jax.device_put(jax.random.key(0), NamedSharding(mesh, P()))
    for given in (0, key):
        with nnx.scope(given):
            sharded = [call(x) for _ in range(3)]
        assert all(y.sharding.spec == P("data", None) for y in sharded)
        assert [y.tolist() for y in sharded] == [y.tolist() for y in plain]
    assert not jnp.array_equal(sharded[0], sharded[1])


def test_dropout_of_an_array_that_is_sharded_along_two_axes():
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    x = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("a", "b")))
    for dims in ((), (0,), (1,)):
        drop = nnx.Dropout(0.5, broadcast_dims=dims)
        with nnx.scope(0):
            y = nnx.jit(drop)(x)
        assert y.sharding.spec == P("a", "b")
        with nnx.scope(0):
            assert jnp.array_equal(jax.device_get(y), drop(jnp.ones((8, 4))))


@pytest.mark.parametrize("jitted", [False, True])
def test_embed_is_sharded_as_its_indices_and_features(jitted):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    embed = nnx.Embed.init(0)(7, 4)
    call = nnx.jit(embed) if jitted else embed
    ids = jnp.array([[0, 6, -1], [7, -7, -8]] * 2)
    expected = np.asarray(embed(ids))
    assert np.isnan(expected[1, 0]).all() and np.isnan(expected[1, 2]).all()
    table = embed.embedding
    for of_table, of_ids, spec in [
        (None, P("a"), ("a", None, None)),
        (P(), P("a"), ("a", None, None)),
        (P(None, "b"), P("a"), ("a", None, "b")),
        (P(None, "b"), P(), (None, None, "b")),
        (P(None, "a"), P(("a", "b")), (("a", "b"), None, None)),
        (P(None, "a"), P("a"), ("a", None, None)),
    ]:
        if of_table is not None:
            table = jax.device_put(embed.embedding, NamedSharding(mesh, of_table))
        embed.embedding = table
        y = call(jax.device_put(ids, NamedSharding(mesh, of_ids)))
        assert tuple(y.sharding.spec) == spec
        np.testing.assert_array_equal(y, expected)
        assert y.dtype == jnp.float32
