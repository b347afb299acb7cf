"""Low-rank adapters beside LinearGeneral, as in attention: against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx.layers.lora import LoRALinearGeneral
from tests.nnx.layers.test_layer_norm import cheap
from tests.nnx.layers.test_layers import draw

QUERY_AND_VALUE = (nnx.PathContains("query"), nnx.PathContains("value"))


def exact(x):
    return np.asarray(x, np.float64)


def value_and_grads(layer, x):
    def loss(layer):
        y = layer(x)
        return jnp.sum(jnp.sin(y)), y

    grads, y = nnx.jit(nnx.grad(loss, wrt=..., has_aux=True))(layer)
    return y, grads


def adapted(layer, scale=1.0):
    """The kernel plus the product, summed index by index."""
    a, b = exact(layer.lora.lora_a), exact(layer.lora.lora_b)
    kernel = exact(layer.kernel)
    product = np.einsum("...ir,...ro->...io", a, b).reshape(kernel.shape)
    return kernel + scale * product


@pytest.mark.parametrize(
    "sizes, options, x, equation",
    [
        ((6, (2, 4)), {}, (3, 5, 6), "bti,iho->btho"),
        ((6, 4), {"use_bias": False}, (6,), "i,io->o"),
        (((2, 3), 4), {"axis": (-2, -1)}, (5, 2, 3), "bij,ijo->bo"),
        (((2, 3), 4), {"axis": (-1, 0)}, (2, 5, 3), "ibj,ijo->bo"),
        ((3, (2, 2)), {"axis": 1}, (4, 3, 5), "bit,iop->btop"),
        ((6, 4), {"batch_axis": {0: 3, 1: 2}}, (3, 2, 4, 5, 6), "abtui,abio->abtuo"),
        ((6, (2, 2)), {"batch_axis": {0: 3}}, (3, 6), "bi,bijk->bjk"),
        (((2, 3), 4), {"axis": (1, 3), "batch_axis": {0: 3}}, (3, 2, 0, 3), "bitj,bijo->bto"),
    ],
)
def test_values_and_gradients(sizes, options, x, equation):
    layer = LoRALinearGeneral.init(0)(
        *sizes, lora_rank=3, alpha=6.0, b_initializer=cheap, bias_init=cheap, **options
    )
    x = draw(*x)
    kernel, bias = adapted(layer, 2.0), 0.0
    if layer.bias is not None:
        batch = layer.bias.shape[: len(layer.batch_axis)]
        outputs = layer.bias.shape[len(batch) :]
        between = (1,) * (len(equation.split("->")[1]) - layer.bias.ndim)
        bias = exact(layer.bias).reshape(*batch, *between, *outputs)
    expected = np.einsum(equation, exact(x), kernel) + bias
    y, grads = value_and_grads(layer, x)
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, atol=1e-5)

    # The gradient of the product equals that of the kernel, so the chain rule gives both others.
    a, b, dense = layer.lora.lora_a, layer.lora.lora_b, exact(grads["kernel"])
    dense = dense.reshape(*a.shape[:-1], b.shape[-1])
    rows = np.einsum("...io,...ro->...ir", dense, exact(b)) * 2
    np.testing.assert_allclose(grads["lora.lora_a"], rows, atol=1e-5)
    columns = np.einsum("...io,...ir->...ro", dense, exact(a)) * 2
    np.testing.assert_allclose(grads["lora.lora_b"], columns, atol=1e-5)


def test_initial_values_dtypes_and_metadata():
    options = {"lora_rank": 2, "lora_param_type": "adapters", "a_metadata": {"axes": "in"}}
    half = {"dtype": jnp.bfloat16, "lora_dtype": jnp.bfloat16, "lora_param_dtype": jnp.bfloat16}
    layer = LoRALinearGeneral.init(0)(64, (4, 16), batch_axis={0: 3}, **options, **half)
    plain = nnx.LinearGeneral.init(0)(64, (4, 16), batch_axis={0: 3}, dtype=jnp.bfloat16)
    shapes = {path: value.shape for path, value in layer["adapters"].items()}
    assert shapes == {("lora", "lora_a"): (3, 64, 2), ("lora", "lora_b"): (3, 2, 64)}
    assert nnx.get_ref(layer.lora, "lora_a").metadata["axes"] == "in"
    a = layer.lora.lora_a
    assert a.dtype == jnp.bfloat16 and not jnp.array_equal(a[0], a[1])
    assert abs(float(a.astype(jnp.float32).std()) - (2 / 64) ** 0.5) < 0.03
    x = draw(3, 5, 64)
    y = layer(x)
    assert y.dtype == jnp.bfloat16 and jnp.array_equal(y, plain(x))


def attention(**options):
    return nnx.MultiHeadAttention.init(0)(num_heads=4, in_features=8, **options)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def test_grouped_query_attention():
    """Query and value get adapters, and the result is NumPy's for the summed kernels."""
    layer = attention(num_kv_heads=2, use_bias=False)
    nnx.apply_lora(layer, 2, QUERY_AND_VALUE, alpha=1.0, b_initializer=cheap, rngs=1)
    assert {path[0] for path in layer["lora"]} == {"query", "value"}
    assert type(layer.key) is nnx.LinearGeneral and layer.value.lora.lora_b.shape == (2, 4)
    x = draw(2, 5, 8)
    q = np.einsum("bti,ihd->bthd", exact(x), adapted(layer.query, 0.5))
    k = np.einsum("bti,ihd->bthd", exact(x), exact(layer.key.kernel)).repeat(2, 2)
    v = np.einsum("bti,ihd->bthd", exact(x), adapted(layer.value, 0.5)).repeat(2, 2)
    weights = softmax(np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(2))
    y = np.einsum("bhqk,bkhd,hdo->bqo", weights, v, exact(layer.out.kernel))
    np.testing.assert_allclose(layer(x), y, atol=1e-5)


def test_decoding_with_adapters_and_after_merging():
    layer = nnx.apply_lora(attention(num_kv_heads=2), 2, b_initializer=cheap, rngs=1)
    assert len(layer["lora"]) == 8
    x = draw(2, 6, 8)
    whole = layer(x, is_causal=True)

    @nnx.jit
    def decode(layer, x):
        return layer(x, decode=True)

    def piecewise():
        layer.init_cache((2, 6, 8))
        return jnp.concatenate([decode(layer, x[:, i : i + 3]) for i in (0, 3)], axis=1)

    np.testing.assert_allclose(piecewise(), whole, atol=1e-5)
    cells = nnx.refs(layer)
    nnx.merge_lora(layer)
    assert not layer["lora"] and type(layer.out) is nnx.LinearGeneral
    assert nnx.get_ref(layer.out, "kernel") is cells["out", "kernel"]
    np.testing.assert_allclose(layer(x, is_causal=True), whole, atol=1e-5)
    np.testing.assert_allclose(piecewise(), whole, atol=1e-5)


class Block(nnx.Module):
    def __init__(self):
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=4)
        self.expert = nnx.LinearGeneral(4, 4, batch_axis={0: 2})

    def __call__(self, x):
        x = x + self.attention(x, is_causal=True)
        return x + self.expert(x)


def test_stacked_blocks_have_stacked_adapters():
    model = nnx.Stack.init(0)(Block, 2)
    x, forward = draw(2, 5, 4), nnx.jit(lambda m, x: m(x))
    y = forward(model, x)
    nnx.apply_lora(model, 2, rngs=1)
    np.testing.assert_array_equal(forward(model, x), y)
    stack = model.layers
    assert stack.attention.out.lora.lora_a.shape == (2, 4, 2)
    assert stack.expert.lora.lora_b.shape == (2, 2, 2, 4)
    a = stack.attention.query.lora.lora_a
    assert not jnp.array_equal(a[0], a[1])

    params, target = model["params"], jnp.zeros((2, 5, 4))

    @nnx.jit
    def step(model):
        loss = lambda m: jnp.mean((m(x) - target) ** 2)  # noqa: E731
        value, grads = nnx.value_and_grad(loss, wrt="lora")(model)
        model["lora"] = jax.tree.map(lambda w, g: w - 0.1 * g, model["lora"], grads)
        return value, grads

    values, grads = zip(*(step(model) for _ in range(10)), strict=True)
    assert values[-1] < values[0] and set(grads[0]) == set(model["lora"]) and len(grads[0]) == 10
    assert all(jnp.array_equal(w, params[path]) for path, w in model["params"].items())
    assert stack.attention.query.lora.lora_b.any(axis=(1, 2)).all()

    y = forward(model, x)
    each = x
    for i in range(2):
        one = Block.init(0)()
        for path, cell in nnx.refs(one).items():
            layer = stack
            for name in path[:-1]:
                layer = getattr(layer, name)
            cell.value = (adapted(layer) if path[-1] == "kernel" else exact(layer.bias))[i]
        each = forward(one, each)
    np.testing.assert_allclose(each, y, atol=1e-5)
    nnx.merge_lora(model)
    np.testing.assert_allclose(forward(model, x), y, atol=1e-5)
    assert set(model["params"]) == set(params)


def test_applied_twice():
    layer = nnx.apply_lora(attention(), 2, nnx.PathContains("query"), rngs=1)
    first = layer.query
    nnx.apply_lora(layer, 3, rngs=2)
    assert layer.query is first and layer.out.lora.lora_b.shape == (3, 8)
    both = nnx.PathContains("query"), nnx.PathContains("no")
    with pytest.raises(
        ValueError, match="layers are: none, and query, key, value, out with an adapter already"
    ):
        nnx.apply_lora(layer, 2, both, rngs=1)


def test_saved_shared_and_shown(tmp_path):
    shared = nnx.LinearGeneral.init(0)(4, (2, 2))
    model = nnx.Sequential(shared, nnx.LinearGeneral.init(1)((2, 2), 4, axis=(-2, -1)), shared)
    nnx.apply_lora(model, 2, b_initializer=cheap, rngs=1)
    assert model.layers[0] is model.layers[2] and len(model["lora"]) == 4
    nnx.save(tmp_path / "model.npz", model)
    again = nnx.load(tmp_path / "model.npz")
    x = draw(3, 4)
    np.testing.assert_array_equal(again(x), model(x))
    assert type(again.layers[0]) is nnx.LoRALinearGeneral and again.layers[0] is again.layers[2]
    assert repr(again) == repr(model) and "LoRALinearGeneral" in repr(model)
    nnx.save(tmp_path / "adapters.npz", model["lora"])
    other = nnx.apply_lora(nnx.merge_lora(nnx.clone(model)), 2, rngs=3)
    report = nnx.load_state(tmp_path / "adapters.npz", into=other, strict=False)
    assert len(report.loaded) == 4 and not report.unexpected
    assert jnp.array_equal(other.layers[1].lora.lora_a, model.layers[1].lora.lora_a)


def test_a_tied_kernel():
    layer = attention()
    layer.key.kernel = nnx.get_ref(layer.query, "kernel")
    nnx.apply_lora(layer, 2, nnx.PathContains("query"), rngs=1)
    with pytest.raises(ValueError, match=r"kernel of 'query' is tied to 'key'.*Untie"):
        nnx.merge_lora(layer)


@pytest.mark.parametrize("wrapper", [nnx.WeightNorm, nnx.SpectralNorm])
def test_merging_refuses_a_kernel_that_is_normalized(wrapper):
    with nnx.scope(0):
        model = wrapper(nnx.Linear(3, 4))
    x = draw(2, 3)
    y = nnx.apply_lora(model, 2, rngs=1)(x)
    model.layer_instance.lora.lora_b = jnp.ones((2, 4))
    assert not jnp.allclose(model(x), y)
    with pytest.raises(ValueError, match=f"'layer_instance' is normalized by {wrapper.__name__}"):
        nnx.merge_lora(model)
    assert type(model.layer_instance) is nnx.LoRALinear


def test_merging_below_a_norm_of_other_weights():
    with nnx.scope(0):
        model = nnx.WeightNorm(attention(), variable_filter=nnx.All(nnx.PathContains("out"),
                                                                    nnx.PathContains("kernel")))  # fmt: skip
    nnx.apply_lora(model, 2, nnx.PathContains("query"), b_initializer=cheap, rngs=1)
    x = draw(1, 3, 8)
    y = model(x)
    np.testing.assert_allclose(nnx.merge_lora(model)(x), y, atol=1e-5)


def stacked_elsewhere():
    model = nnx.Sequential(nnx.LinearGeneral.init(0)(4, (2, 3)))
    model.layers[0].kernel = jnp.ones((4, 5, 2, 3))
    return model


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: nnx.apply_lora(stacked_elsewhere(), 2),
         r"(?s)from \(4,\) to \(2, 3\) .* shape \(4, 2, 3\), .* \(4, 5, 2, 3\).*layer 'layers.0'"),
        (lambda: nnx.apply_lora(nnx.LinearGeneral(4, 4), 2),
         "a LinearGeneral alone cannot be the model.*nnx.LoRALinearGeneral and tie"),
        (lambda: nnx.apply_lora(attention(), 0), "(?s)must be at least 1, but is 0.*layer 'query'"),
        (lambda: nnx.apply_lora(nnx.Sequential(nnx.Conv(1, 1, (3,)), attention()), 2, "params"),
         r"(?s)Linear, LinearGeneral and Conv layers are: layers.0, layers.1.query, layers.1.key, .*out. Pass a filter"),
        (lambda: LoRALinearGeneral(4, 4, lora_rank=2)(jnp.ones((2, 5))),
         r"sizes \(4,\) along the axes \(-1,\), but got one of shape \(2, 5\)"),
    ],
)  # fmt: skip
def test_mistakes(make, message):
    with nnx.scope(0), pytest.raises(ValueError, match=message):
        make()
