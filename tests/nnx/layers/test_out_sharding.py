"""`out_sharding=` in calls of layers, on every kind of mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nnx

EXPLICIT, AUTO = (AxisType.Explicit,) * 2, (AxisType.Auto,) * 2


def mesh_of(kinds):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=kinds)


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def on(mesh, x, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def axes(x):
    spec = x.sharding.spec
    return (*spec, *(None,) * (x.ndim - len(spec)))


# A layer, an input sharded along its features, the sharding of the kernel, and the requested output.
ROWS = P("data", None, None)
LAYERS = {
    "Linear": (lambda: nnx.Linear(8, 16), draw(4, 4, 8), ROWS),
    "LinearGeneral": (lambda: nnx.LinearGeneral(8, (4, 2)), draw(4, 4, 8), P("data", None, "model")),
    "Einsum": (lambda: nnx.Einsum("bta,ac->btc", (8, 4), (4,)), draw(4, 4, 8), ROWS),
    "Conv": (lambda: nnx.Conv(8, 4, (3,)), draw(4, 4, 8), ROWS),
    "Conv, two batch axes": (lambda: nnx.Conv(8, 4, (3,)), draw(2, 4, 4, 8), P("data", "model")),
    "Conv, circular": (lambda: nnx.Conv(8, 4, (3,), padding="CIRCULAR"), draw(4, 4, 8), ROWS),
    "ConvTranspose": (lambda: nnx.ConvTranspose(8, 4, (3,), 2), draw(4, 4, 8), P("data", None, "model")),
    "MLP": (lambda: nnx.MLP(8, [16], 8), draw(4, 4, 8), P("data", "model")),
    "LoRALinear": (lambda: nnx.LoRALinear(8, 16, lora_rank=4), draw(4, 4, 8), ROWS),
    "attention": (lambda: nnx.MultiHeadAttention(4, 8), draw(4, 4, 8), P("data", "model")),
}  # fmt: skip


def call(model, x, spec):
    if isinstance(model, nnx.MLP):
        return model(x, out_sharding=spec, hidden_sharding=P("data", None, "model"))
    if isinstance(model, nnx.MultiHeadAttention):
        heads = P("data", None, "model")
        return model(x, is_causal=True, out_sharding=spec, qkv_sharding=heads)
    return model(x, out_sharding=spec)


def step(model, x, spec):
    def loss(model):
        y = call(model, x, spec)
        return jnp.mean(y**2), y

    trained = ("params", "lora")
    grads, y = nnx.grad(loss, wrt=trained, has_aux=True)(model)
    model[trained] = jax.tree.map(lambda w, g: w - 0.1 * g, model[trained], grads)
    return y


step = nnx.jit(step, static_argnums=2)


def rows_of_kernels(path, ref):
    shape = ref.value.shape
    if len(shape) < 2 or shape[-2] % 4:
        return P(*["data"] * (len(shape) == 1 and shape[0] % 2 == 0))
    return P(*[None] * (len(shape) - 2), "model")


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kinds", [EXPLICIT, AUTO], ids=["explicit", "auto"])
def test_the_output_is_where_it_was_asked_for_and_parameters_stay(name, kinds):
    make, x, spec = LAYERS[name]
    with nnx.scope(0):
        alone = make()
    placed = nnx.clone(alone, copy=True)
    expected = step(alone, x, spec)  # without a mesh it means nothing
    mesh = mesh_of(kinds)
    with jax.set_mesh(mesh):
        nnx.shard(placed, rows_of_kernels)
        before = {path: ref.value.sharding for path, ref in nnx.refs(placed).items()}
        y = step(placed, on(mesh, x, "data", *[None] * (x.ndim - 2), "model"), spec)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, spec), y.ndim)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for path, ref in nnx.refs(placed).items():
        np.testing.assert_allclose(ref.value, nnx.refs(alone)[path].value, atol=1e-5)
        assert ref.value.sharding.is_equivalent_to(before[path], ref.value.ndim)


def test_embed_and_attend():
    mesh = mesh_of(EXPLICIT)
    embed = nnx.Embed.init(0)(8, 16)
    ids = jnp.arange(8).reshape(4, 2)
    rows, logits = embed(ids), embed.attend(draw(4, 2, 16))
    embed.embedding = on(mesh, embed.embedding, "model", None)
    with jax.set_mesh(mesh):
        found = embed(on(mesh, ids, "data"), out_sharding=P("data", None, "model"))
        query = on(mesh, draw(4, 2, 16), "data")
        scores = embed.attend(query, out_sharding=P("data", None, "model"))
    assert axes(found) == axes(scores) == ("data", None, "model")
    np.testing.assert_array_equal(found, rows)
    np.testing.assert_allclose(scores, logits, atol=1e-5)


def test_logical_names_a_named_sharding_and_no_mesh():
    mesh, layer, x = mesh_of(EXPLICIT), nnx.Linear.init(0)(8, 16), draw(4, 8)
    expected = layer(x)
    np.testing.assert_array_equal(layer(x, out_sharding=P("data", "model")), expected)
    y = layer(on(mesh, x), out_sharding=NamedSharding(mesh, P("data", "model")))
    assert axes(y) == ("data", "model")
    y = layer(on(mesh, x), out_sharding=P("data", "model"))  # the mesh of the input
    assert axes(y) == ("data", "model")
    with jax.set_mesh(mesh), nnx.axis_rules({"batch": "data", "mlp": "model"}):
        assert axes(layer(x, out_sharding=("batch", "mlp"))) == ("data", "model")
        assert axes(layer(x, out_sharding=("batch", "unknown"))) == ("data", None)


def test_a_missing_or_wrong_sharding_is_an_error():
    mesh, layer = mesh_of(EXPLICIT), nnx.Linear.init(0)(8, 16)
    layer.kernel = on(mesh, layer.kernel, "model")
    x = on(mesh, draw(4, 8), "data", "model")
    with pytest.raises(nnx.ShardingError) as error:
        layer(x)
    message = str(error.value)
    assert message.startswith("Linear does not know how to shard its result.")
    assert "x float32[4@data,8@model], kernel float32[8@model,16]" in message
    assert "layer(x, out_sharding=P('data', ...))" in message
    mlp = nnx.MLP.init(0)(8, [8], 8)
    nnx.shard(mlp, lambda path, ref: P(*["model"] * (ref.value.ndim > 1)), mesh=mesh)
    with pytest.raises(nnx.ShardingError, match=r"MLP does not know .* hidden_sharding=P\("):
        mlp(x)
    attention = nnx.MultiHeadAttention.init(0)(4, 8)
    nnx.shard(attention, lambda path, ref: P(*["model"] * (ref.value.ndim > 1)), mesh=mesh)
    with pytest.raises(nnx.ShardingError, match=r"MultiHeadAttention .* qkv_sharding=P\("):
        attention(on(mesh, draw(4, 4, 8), "data", None, "model"))
    for spec, said in [
        (P("data", None, "model"), "3 entries"),
        (P("data", "data"), "divided twice"),
        (P(("data", "model")), "cannot be divided into 8"),
    ]:
        with pytest.raises(nnx.ShardingError, match=f"The output of Linear .*{said}"):
            layer(x, out_sharding=spec)
    with pytest.raises(TypeError, match="The out_sharding of Linear must be a PartitionSpec"):
        layer(x, out_sharding="data")


@pytest.mark.parametrize("spec", [("data",), ("data", "model"), ("data", None, "model")])
@pytest.mark.parametrize("of_scale", [(), ("model",), ("data",)])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nnx.LayerNorm(8),
        lambda: nnx.RMSNorm(8),
        lambda: nnx.GroupNorm(8, 4),
        lambda: nnx.GroupNorm(8, 2),
        lambda: nnx.BatchNorm(8),
    ],
    ids=["LayerNorm", "RMSNorm", "GroupNorm", "GroupNorm, few", "BatchNorm"],
)
def test_norms_return_what_is_sharded_as_their_input(make, of_scale, spec):
    mesh, x = mesh_of(EXPLICIT), draw(4, 8, 8)
    norm = make()
    expected = norm(x)
    statistics = {path: np.asarray(v) for path, v in norm["batch_stats"].items()}
    norm = make()
    with jax.set_mesh(mesh):
        nnx.shard(norm, lambda path, ref: P(*of_scale))
        y: Any = nnx.jit(norm)(on(mesh, x, *spec))
    assert axes(y) == (*spec, *(None,) * (3 - len(spec)))
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for path, value in statistics.items():
        np.testing.assert_allclose(norm["batch_stats"][path], value, atol=1e-5)
        assert axes(norm["batch_stats"][path]) == (of_scale or (None,))


@pytest.mark.parametrize("cell", [nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell])
@pytest.mark.parametrize("of_kernel", [(None, "model"), ("model",), ("data",), (None, "data")])
def test_recurrent_networks_keep_their_carry_in_place(cell, of_kernel):
    mesh, x = mesh_of(EXPLICIT), draw(4, 4, 8)
    rnn = nnx.RNN.init(0)(cell.init(0)(8, 8))
    expected = rnn(x)
    with jax.set_mesh(mesh):
        nnx.shard(rnn, lambda path, ref: P(*of_kernel) if ref.value.ndim == 2 else P())
        y = nnx.jit(rnn)(on(mesh, x, "data", "model"))
    assert axes(y)[0] == "data"
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("spec", [("data", None, "model"), ("data", "model")])
def test_keys_and_values_go_where_the_queries_are(kv_heads, spec):
    mesh = mesh_of(EXPLICIT)
    q, k = draw(4, 8, 4, 8), draw(4, 8, kv_heads, 8)
    expected = nnx.dot_product_attention(q, k, k, is_causal=True)
    attend = jax.jit(lambda q, k: nnx.dot_product_attention(q, k, k, is_causal=True))
    with jax.set_mesh(mesh):
        y = attend(on(mesh, q, *spec), on(mesh, k, "data", "model"))
    assert axes(y) == (*spec, *(None,) * (4 - len(spec)))
    np.testing.assert_allclose(y, expected, atol=1e-5)


PLACES = {
    "**.query.kernel": (None, "model", None),
    "**.key.kernel": (None, "model", None),
    "**.value.kernel": (None, "model", None),
    "**.out.kernel": ("model", None, None),
    "**.up.kernel": (None, "model"),
    "**.down.kernel": ("model", None),
}


class Block(nnx.Module):
    def __init__(self):
        self.norm1, self.norm2 = nnx.LayerNorm(16), nnx.RMSNorm(16)
        self.attention = nnx.MultiHeadAttention(4, 16, use_bias=False)
        self.up = nnx.Linear(16, 32)
        self.drop = nnx.Dropout(0.1)
        self.down = nnx.Linear(32, 16)

    def __call__(self, x):
        rows, heads = P("data", None, None), P("data", None, "model", None)
        h = self.norm1(x)
        x += self.attention(h, is_causal=True, qkv_sharding=heads, out_sharding=rows)
        h = nnx.gelu(self.up(self.norm2(x), out_sharding=P("data", None, "model")))
        return x + self.down(self.drop(h), out_sharding=rows)


class Transformer(nnx.Module):
    def __init__(self, stacked):
        self.embed = nnx.Embed(32, 16, embedding_metadata={"sharding": ("model", None)})
        self.blocks = (
            nnx.Stack(Block, 2, remat=True) if stacked else nnx.Sequential(Block(), Block())
        )
        self.norm = nnx.LayerNorm(16)

    def __call__(self, ids):
        x = self.blocks(self.embed(ids, out_sharding=P("data", None, None)))
        return self.embed.attend(self.norm(x), out_sharding=P("data", None, "model"))


@nnx.jit
def train_step(model, optimizer, ids):
    def loss_fn(model):
        # The logits of one token are on several devices, and so is their row of a one-hot matrix.
        wanted = jax.nn.one_hot(ids[:, 1:], 32)
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(model(ids)[:, :-1]) * wanted, -1))

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


@pytest.mark.parametrize("stacked", [False, True])
def test_a_transformer_on_an_explicit_mesh_has_the_losses_of_one_device(stacked):
    ids = jax.random.randint(jax.random.key(1), (4, 8), 0, 32)

    lead = (None,) if stacked else ()
    places = {nnx.PathMatches(path): P(*lead, *spec) for path, spec in PLACES.items()}

    def losses(ids):
        with nnx.scope(0):
            model = Transformer(stacked)
            model.train()
            if isinstance(ids.sharding, NamedSharding):
                nnx.shard(model, places)
            optimizer = nnx.Optimizer(model, optax.adam(1e-2))
            return [float(train_step(model, optimizer, ids)) for _ in range(3)], model, optimizer

    expected, _, _ = losses(ids)
    mesh = mesh_of(EXPLICIT)
    with jax.set_mesh(mesh):
        found, model, optimizer = losses(on(mesh, ids, "data"))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found[-1] < found[0]
    moments, number = optimizer.opt_state[0].mu, "" if stacked else ".1"
    assert axes(model["params"][f"blocks.layers{number}.down.kernel"]) == (*lead, "model", None)
    assert axes(moments[f"blocks.layers{number}.down.kernel"]) == (*lead, "model", None)
    assert axes(moments["embed.embedding"]) == axes(model.embed.embedding) == ("model", None)


class Wide(nnx.Module):
    def __init__(self, out_sharding=None):
        self.linear = nnx.Linear(8, 8, kernel_metadata={"sharding": (None, "model")})
        self.out_sharding = out_sharding

    def __call__(self, x):
        return self.linear(x, out_sharding=self.out_sharding)


@pytest.mark.parametrize("remat", [False, True])
def test_a_layer_of_a_stack_returns_what_is_sharded_as_its_input(remat):
    mesh, x = mesh_of(EXPLICIT), draw(4, 8)
    expected = nnx.Stack.init(0)(lambda: Wide(), 2, remat=remat)(x)
    with jax.set_mesh(mesh):
        rows = on(mesh, x, "data")
        with pytest.raises(nnx.ShardingError) as error:
            nnx.Stack.init(0)(lambda: Wide(), 2, remat=remat)(rows)
        y = nnx.Stack.init(0)(lambda: Wide(P("data")), 2, remat=remat)(rows)
    message = str(error.value)
    assert message.startswith("A layer of Stack gets an input float32[4@data,8] and returns ")
    assert "float32[4@data,8@model]. All layers run as one program" in message
    assert "out_sharding=P('data', None), or use jax.sharding.reshard(x, P('data'" in message
    assert axes(y) == ("data", None)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_layers_of_a_stack_that_are_on_different_devices():
    stack = nnx.Stack.init(0)(lambda: nnx.Linear(8, 8), 4)
    expected = [np.asarray(layer.kernel) for layer in stack]
    with jax.set_mesh(mesh_of(EXPLICIT)):
        nnx.shard(stack, {...: P("model")})
        for layer, kernel in zip(stack, expected, strict=True):
            np.testing.assert_array_equal(layer.kernel, kernel)
        np.testing.assert_array_equal(stack[1:3].layers.kernel, expected[1:3])
