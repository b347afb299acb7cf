"""Low-rank adapters beside Conv, Embed and Einsum: equal to the layer with the summed kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx.layers.lora_surgery import _made_of
from tests.nnx.layers.test_layer_norm import cheap
from tests.nnx.layers.test_layers import draw

PLAIN = {nnx.LoRAConv: nnx.Conv, nnx.LoRAEmbed: nnx.Embed, nnx.LoRAEinsum: nnx.Einsum}


def conv(*sizes, **options):
    return nnx.LoRAConv.init(0)(*sizes, lora_rank=2, alpha=4.0, b_initializer=cheap, **options)


def einsum(*sizes, **options):
    return nnx.LoRAEinsum.init(0)(*sizes, lora_rank=2, alpha=4.0, b_initializer=cheap, **options)


def delta(layer):
    """The product of the adapter in the axes of the kernel, in float64, index by index."""
    a, b = np.asarray(layer.lora.lora_a, np.float64), np.asarray(layer.lora.lora_b, np.float64)
    product = layer.lora.scale * np.einsum("...ir,...ro->...io", a, b)
    if not isinstance(layer, nnx.Einsum):
        return product.reshape(nnx.get_ref(layer, weight(layer)).value.shape)
    left, right = layer.einsum_str.split("->")[0].split(",")
    result = layer.einsum_str.split("->")[1]
    groups = [
        [c for c in right if c in left and c in result],
        [c for c in right if c in left and c not in result],
        [c for c in right if c not in left],
    ]
    sizes = dict(zip(right, layer.kernel_shape))
    letters = "".join(c for group in groups for c in group)
    return np.einsum(f"{letters}->{right}", product.reshape([sizes[c] for c in letters]))


def weight(layer):
    return "embedding" if isinstance(layer, nnx.Embed) else "kernel"


def plain(layer):
    """The layer without an adapter, with the sum as its kernel."""
    kept = {k: v for k, v in layer.__getstate__().items() if k != "lora"}
    other = nnx.clone(_made_of(PLAIN[type(layer)], kept))
    total = np.asarray(getattr(layer, weight(layer)), np.float64) + delta(layer)
    setattr(other, weight(layer), jnp.asarray(total, jnp.float32))
    return other


CASES = {
    "conv": (lambda: conv(4, 6, (3, 3)), (2, 7, 8, 4)),
    "strides, groups": (lambda: conv(4, 6, (3, 2), 2, feature_group_count=2, use_bias=False), (2, 7, 8, 4)),
    "depthwise, dilated": (lambda: conv(4, 4, 3, kernel_dilation=2, feature_group_count=4), (5, 9, 4)),
    "causal": (lambda: conv(2, 3, (4,), padding="CAUSAL"), (6, 2)),
    "circular": (lambda: conv(2, 3, (3, 3), padding="CIRCULAR"), (3, 2, 6, 5, 2)),
    "einsum": (lambda: einsum("nta,hab->nthb", (8, 3, 4), (8, 4)), (2, 5, 3)),
    "two inputs": (lambda: einsum("...ij,oji->...o", (4, 3, 2)), (3, 5, 2, 3)),
    "experts": (lambda: einsum("bei,eoi->beo", (3, 4, 5), (3, 4)), (2, 3, 5)),
    "inner batch": (lambda: einsum("abh,hio->ahibo", (3, 2, 4)), (2, 5, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    make, shape = CASES[name]
    layer, x = make(), draw(*shape)

    def loss(layer, x):
        y = layer(x)
        return jnp.sum(jnp.sin(y)), y

    grad = nnx.jit(nnx.grad(loss, wrt=..., has_aux=True))
    grads, y = grad(layer, x)
    dense, expected = grad(plain(layer), x)
    np.testing.assert_allclose(y, expected, atol=2e-5)
    np.testing.assert_allclose(grads["kernel"], dense["kernel"], atol=2e-4)
    # The chain rule, by the derivative of the product with respect to each matrix.
    for part in ("lora_a", "lora_b"):
        old = getattr(layer.lora, part)
        step = np.asarray(cheap(jax.random.key(3), old.shape, old.dtype)) * 1e-2
        before = delta(layer)
        setattr(layer.lora, part, old + step)
        moved = np.sum((delta(layer) - before) * np.asarray(dense["kernel"], np.float64))
        setattr(layer.lora, part, old)
        along = np.sum(np.asarray(grads["lora", part], np.float64) * step)
        np.testing.assert_allclose(along, moved, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_merging_keeps_the_function(name):
    make, shape = CASES[name]
    model = nnx.Sequential(make())
    x = draw(*shape)
    y, cell = model(x), nnx.get_ref(model[0], "kernel")
    expected = np.asarray(cell.value) + delta(model[0])
    nnx.merge_lora(model)
    assert type(model[0]) in PLAIN.values() and nnx.get_ref(model[0], "kernel") is cell
    np.testing.assert_allclose(cell.value, expected, atol=1e-6)
    np.testing.assert_allclose(model(x), y, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 6])
def test_a_table(rows):
    layer = nnx.LoRAEmbed.init(0)(rows, 4, lora_rank=2, alpha=1.0, b_initializer=cheap)
    table = np.asarray(layer.embedding) + delta(layer)
    x = jnp.array([[0, rows - 1], [-1, 0]])
    np.testing.assert_allclose(layer(x), table[np.asarray(x)], atol=1e-6)
    query = draw(3, 4)
    np.testing.assert_allclose(layer.attend(query), query @ table.T, atol=1e-5)
    assert rows == 1 or jnp.isnan(layer(jnp.array([6]))).all()
    grads = nnx.grad(lambda m: m(x).sum() + m.attend(query).sum(), wrt="lora")(layer)
    assert all(g.any() for g in grads.values())
    model = nnx.merge_lora(nnx.Sequential(layer))
    assert type(model[0]) is nnx.Embed
    np.testing.assert_allclose(model[0].embedding, table, atol=1e-6)
    with pytest.raises(ValueError, match="looks up integers"):
        layer(draw(3))


def test_the_rows_of_a_table_begin_with_length_one():
    layer = nnx.LoRAEmbed.init(0)(5000, 4, lora_rank=8)
    assert abs(float((layer.lora.lora_a**2).sum(-1).mean()) - 1) < 0.05
    assert not layer.lora.lora_b.any()


def test_an_einsum_by_another_equation():
    layer = einsum("bi,io->bo", (3, 4))
    other = plain(layer)
    y = draw(5, 4)
    np.testing.assert_allclose(layer(y, "bo,io->bi"), other(y, "bo,io->bi"), atol=1e-5)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_dtypes(dtype):
    for layer, x in (
        (conv(4, 6, (3, 3), dtype=dtype), draw(1, 5, 5, 4)),
        (einsum("bi,io->bo", (3, 4), dtype=dtype), draw(2, 3)),
        (nnx.LoRAEmbed.init(0)(4, 3, lora_rank=1, dtype=dtype), jnp.arange(3)),
    ):
        assert layer(x).dtype == (dtype or jnp.float32)


class Model(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(7, 4)
        self.stack = nnx.Stack(
            lambda: nnx.Sequential(nnx.Conv(4, 4, 3), nnx.Einsum("ti,oi->to", (4, 4))), 2
        )
        self.head = nnx.Linear(4, 3)

    def __call__(self, tokens):
        return self.head(self.stack(self.embed(tokens)))


def test_in_a_model(tmp_path):
    model, tokens = Model.init(0)(), jnp.array([1, 5, 0, 2])
    forward = nnx.jit(lambda m: m(tokens))
    y = forward(model)
    plain = nnx.clone(model)
    nnx.apply_lora(model, 2, ..., rngs=1)
    assert [path[:-2] for path in model["lora"]][::2] == [
        ("embed",), ("stack", "layers", "layers", "0"), ("stack", "layers", "layers", "1"), ("head",)
    ]  # fmt: skip
    assert model.stack.layers[0].lora.lora_a.shape == (2, 12, 2)
    np.testing.assert_array_equal(forward(model), y)

    @nnx.jit
    def step(model):
        grads = nnx.grad(lambda m: (m(tokens) ** 2).mean(), wrt="lora")(model)
        model["lora"] = jax.tree.map(lambda w, g: w - 0.1 * g, model["lora"], grads)

    for _ in range(3):
        step(model)
    trained = forward(model)
    assert (trained**2).mean() < (y**2).mean()
    nnx.save(tmp_path / "m.npz", model)
    np.testing.assert_array_equal(forward(nnx.load(tmp_path / "m.npz")), trained)
    nnx.merge_lora(model)
    assert {path for path in nnx.refs(model)} == {path for path in nnx.refs(plain)}
    np.testing.assert_allclose(forward(model), trained, atol=2e-5)


@pytest.mark.parametrize(
    "filter, names",
    [
        (None, ["head"]),
        (nnx.Embed, ["embed"]),
        ((nnx.Conv, nnx.PathContains("head")), ["stack", "head"]),
        (lambda path, layer: type(layer) is not nnx.Linear, ["embed", "stack", "stack"]),
    ],
)
def test_what_is_selected(filter, names):
    options = {} if filter is None else {"filter": filter}
    model = nnx.apply_lora(Model.init(0)(), 2, rngs=1, **options)
    assert [path[0] for path in model["lora"]][::2] == names


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: conv(1, 1, (2,), mask=jnp.ones((2, 1, 1))), "LoRAConv with a mask cannot have a low-rank"),
        (lambda: nnx.apply_lora(nnx.Sequential(nnx.Einsum("bi,...i->b...i", (3, 2))), 2, ...),
         r"(?s)'bi,...i->b...i' is not a matrix: it has an ellipsis.*layer 'layers.0'"),
        (lambda: einsum("bi,iij->bj", (2, 2, 3)), "is not a matrix: it has a diagonal"),
        (lambda: einsum("bi,ijk->bj", (2, 3, 4)), "is not a matrix: it has an axis summed alone"),
        (lambda: nnx.apply_lora(nnx.Embed(3, 2), 2, ...), "an Embed alone cannot be the model.*make an nnx.LoRAEmbed and tie its embedding"),
        (lambda: nnx.apply_lora(nnx.Sequential(nnx.Conv(1, 1, 3)), 2),
         "(?s)Its Linear, LinearGeneral and Conv layers are: layers.0.*or a class, or a predicate"),
    ],
)  # fmt: skip
def test_mistakes(make, message):
    with nnx.scope(0), pytest.raises(ValueError, match=message):
        make()


def test_merging_names_a_tied_table():
    class Tied(nnx.Module):
        def __init__(self):
            self.embed, self.head = nnx.Embed(3, 3), nnx.Linear(3, 3)
            self.head.kernel = nnx.get_ref(self.embed, "embedding")

    model = nnx.apply_lora(Tied.init(0)(), 1, nnx.Embed, rngs=1)
    with pytest.raises(
        ValueError, match=r"embedding of 'embed' is tied to 'head'.*layer.embedding ="
    ):
        nnx.merge_lora(model)
