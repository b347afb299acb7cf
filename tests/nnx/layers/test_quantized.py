"""Linear layers in 8 bits: their error, their size, and their use in a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import nnx
from nnx import QuantizedLinear
from tests.nnx.layers.test_layers import draw

DTYPES = {"int8": jnp.int8, "float8": jnp.float8_e4m3fn}
# The largest error of an element, relative to itself and to the largest element for the same output.
BOUNDS = {"int8": (0, 1 / 254), "float8": (1 / 16, 2.0**-18)}


def exact(x):
    return np.asarray(x, np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_the_error_is_as_stated_and_the_file_as_small(tmp_path, dtype, param_dtype):
    layer = nnx.Linear.init(0)(
        300, 64, param_dtype=param_dtype, kernel_init=nnx.initializers.normal()
    )
    # Outputs of very different size, and one that is zero.
    layer.kernel = layer.kernel * jnp.array([0, *10.0 ** np.linspace(-6, 3, 63)], param_dtype)
    small = QuantizedLinear.of(layer, DTYPES[dtype])
    w, largest = exact(layer.kernel), np.abs(exact(layer.kernel)).max(0)
    stored = exact(small.quantized) * exact(small.scale)
    own, of_largest = BOUNDS[dtype]
    assert (np.abs(stored - w) <= 1.001 * (own * np.abs(w) + of_largest * largest)).all()
    assert small.kernel.dtype == param_dtype and small.kernel.shape == (300, 64)
    x = draw(5, 300)
    y, expected = exact(small(x))[:, 1:], exact(layer(x))[:, 1:]
    relative = np.linalg.norm(y - expected, axis=0) / np.linalg.norm(expected, axis=0)
    assert np.mean(relative) < {"int8": 0.012, "float8": 0.035}[dtype]

    def size(model):
        return sum(x.nbytes for x in nnx.get_partition(model).values())

    assert size(layer) / size(small) > (3.8 if param_dtype == jnp.float32 else 1.9)
    nnx.save(tmp_path / "m.npz", small)
    again = nnx.load(tmp_path / "m.npz")
    assert again.quantized.dtype == DTYPES[dtype]
    np.testing.assert_array_equal(again(x), small(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes, options, shape",
    [
        ((6, 4), {}, (2, 3, 6)),
        ((6, 4), {"use_bias": False}, (6,)),
        ((6, (2, 3)), {}, (2, 5, 6)),
        (((2, 3), 4), {"axis": (-2, -1)}, (5, 2, 3)),
        (((2, 3), (2, 2)), {"axis": (-1, 0)}, (2, 5, 3)),
        ((3, 4), {"axis": 1}, (4, 3, 5)),
    ],
)
def test_it_computes_what_the_layer_would_with_the_stored_kernel(dtype, sizes, options, shape):
    plain = nnx.Linear if isinstance(sizes[0], int) and "axis" not in options and isinstance(sizes[1], int) else nnx.LinearGeneral  # fmt: skip
    layer = plain.init(0)(*sizes, bias_init=nnx.initializers.normal(), **options)
    small = QuantizedLinear.of(layer, DTYPES[dtype])
    assert (layer.bias is None) or nnx.get_ref(small, "bias") is nnx.get_ref(layer, "bias")
    layer.kernel = small.kernel
    x = draw(*shape)

    def results(layer, x):
        dx = jax.grad(lambda x: jnp.sin(layer(x)).sum())(x)
        grads = None
        if layer.bias is not None:  # otherwise there is nothing to train
            grads = nnx.grad(lambda m: jnp.sin(m(x)).sum())(layer)
        return layer(x), dx, grads

    y, dx, grads = nnx.jit(results)(small, x)
    expected, dx2, grads2 = nnx.jit(results)(layer, x)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(dx, dx2, atol=1e-5)
    if small.bias is not None:
        assert list(grads) == [("bias",)]
        np.testing.assert_allclose(grads["bias"], grads2["bias"], atol=1e-5)
    made = QuantizedLinear.init(0)(*sizes, quantized_dtype=DTYPES[dtype], **options)
    assert made(x).shape == y.shape and made.scale.shape == small.scale.shape


def test_dtypes_of_the_computation():
    for param_dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        for dtype in (None, jnp.bfloat16):
            layer = nnx.Linear.init(0)(8, 4, dtype=dtype, param_dtype=param_dtype)
            small = QuantizedLinear.of(layer)
            for x in (draw(2, 8), draw(2, 8).astype(jnp.bfloat16), jnp.ones((2, 8), int)):
                assert small(x).dtype == layer(x).dtype
                np.testing.assert_allclose(exact(small(x)), exact(layer(x)), atol=0.05)
    with jax.enable_x64(True):
        layer = nnx.Linear.init(0)(8, 4, param_dtype=jnp.float64)
        small = QuantizedLinear.of(layer)
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8)))
        expected = exact(x) @ (exact(small.quantized) * exact(small.scale))
        np.testing.assert_allclose(small(x), expected, rtol=1e-12)


class Model(nnx.Module):
    def __init__(self):
        self.stack = nnx.Stack(
            lambda: nnx.Sequential(
                nnx.MultiHeadAttention(2, 32, num_kv_heads=1), nnx.Linear(32, 32)
            ),
            2,
        )
        self.head = nnx.Linear(32, 5)
        self.again = self.head

    def __call__(self, x):
        return self.again(self.stack(x))


def test_a_whole_model(tmp_path):
    model, x = Model.init(0)(), draw(2, 6, 32)
    forward = nnx.jit(lambda m: m(x))
    y = forward(model)
    both = (nnx.Linear, nnx.LinearGeneral)
    assert nnx.replace(model, both, QuantizedLinear.of) is model
    assert model.again is model.head and type(model.head) is QuantizedLinear
    attention = model.stack.layers[0]
    assert attention.query.quantized.shape == (2, 32, 2, 16) and attention.out.scale.shape == (
        2,
        32,
    )
    assert jnp.linalg.norm(forward(model) - y) < 0.05 * jnp.linalg.norm(y)
    assert {path[-1] for path in model["params"]} == {"bias"}
    quantized = nnx.replace(model, QuantizedLinear, QuantizedLinear.of)  # nothing left to do
    np.testing.assert_array_equal(forward(quantized), forward(model))
    nnx.vmap(lambda layer: layer[0].init_cache((2, 6, 32)))(model.stack.layers)
    assert attention.cached_key.dtype == jnp.float32
    np.testing.assert_allclose(
        model.stack.apply(decode=True)(x),
        nnx.jit(lambda m: m.stack(x))(Causal.of(model)),
        atol=1e-4,
    )
    nnx.save(tmp_path / "m.npz", model)
    np.testing.assert_array_equal(forward(nnx.load(tmp_path / "m.npz")), forward(model))


class Causal:
    """The same model with a mask instead of a cache."""

    @staticmethod
    def of(model):
        other = nnx.clone(model)
        causal = functools.partial(nnx.dot_product_attention)

        def masked(*args, is_causal, **options):
            return causal(*args, is_causal=True, **options)

        other.stack.layers[0].attention_fn = masked
        return other


def test_an_adapter_beside_it_trains():
    small = QuantizedLinear.of(nnx.Linear.init(0)(6, 4))
    model = nnx.LoRA.init(1)(6, 2, 4, base_module=small)
    x = draw(3, 6)
    np.testing.assert_allclose(model(x), small(x), atol=1e-6)
    grads = nnx.jit(nnx.grad(lambda m: (m(x) ** 2).sum(), wrt="lora"))(model)
    assert grads["lora_b"].any()


def test_shapes_alone_under_jit_and_where_it_is_placed():
    shapes = nnx.replace(nnx.eval_shape(lambda: nnx.Sequential(nnx.Linear.init(0)(4, 3))), nnx.Linear, QuantizedLinear.of)  # fmt: skip
    assert shapes[0].quantized == jax.ShapeDtypeStruct((4, 3), jnp.int8) and shapes[
        0
    ].scale.shape == (3,)
    model = nnx.Sequential(nnx.Linear.init(0)(4, 3))
    expected = QuantizedLinear.of(model[0]).quantized
    nnx.jit(lambda m: nnx.replace(m, nnx.Linear, QuantizedLinear.of) and None)(model)
    np.testing.assert_array_equal(model[0].quantized, expected)
    for spec in (("embed", "mlp"), PartitionSpec("embed", "mlp")):
        small = QuantizedLinear.of(
            nnx.Linear.init(0)(4, 3, kernel_metadata={"sharding": spec, "x": 1})
        )
        assert nnx.get_ref(small, "quantized").metadata == {"sharding": spec, "x": 1}
        assert nnx.get_ref(small, "scale").metadata == {"sharding": ("mlp",), "x": 1}


def test_what_is_not_finite_stays_so_under_jit():
    layer = nnx.Linear.init(0)(4, 3)
    for bad in (jnp.nan, jnp.inf):
        layer.kernel = layer.kernel.at[1, 2].set(bad)
        y = nnx.jit(lambda m: QuantizedLinear.of(m)(jnp.ones(4)))(layer)
        assert jnp.isnan(y[2]) and jnp.isfinite(y[:2]).all()
        with pytest.raises(ValueError, match="cannot store a kernel that is not finite"):
            QuantizedLinear.of(layer)


def reshaped():
    layer = nnx.Linear.init(0)(4, 3)
    layer.kernel = jnp.ones((4, 5))
    return layer


@pytest.mark.parametrize(
    "make, kind, message",
    [
        (lambda: QuantizedLinear.of(nnx.Conv(2, 2, 3)), TypeError, "takes a Linear or a LinearGeneral, but got a Conv"),
        (lambda: QuantizedLinear.of(nnx.LoRALinear(2, 2, lora_rank=1)), TypeError, "LoRALinear. For a layer with an adapter, call nnx.merge_lora"),
        (lambda: QuantizedLinear.of(nnx.LinearGeneral(2, 2, batch_axis={0: 3})), ValueError, r"no batch axes, but the LinearGeneral has \{0: 3\}"),
        (lambda: QuantizedLinear.of(nnx.Linear(2, 2, preferred_element_type=jnp.float32)), ValueError, "its own dot_general or preferred_element_type"),
        (lambda: QuantizedLinear.of(nnx.Linear(2, 2, dot_general=lambda *a, **k: 0)), ValueError, "its own dot_general"),
        (lambda: QuantizedLinear.of(reshaped()), ValueError, r"shape \(4, 5\), but the layer was made for the shape \(4, 3\)"),
        (lambda: QuantizedLinear.of(nnx.Linear(2, 2), jnp.bfloat16), ValueError, "float8_e4m3fn, float8_e5m2, ...., but got bfloat16"),
        (lambda: QuantizedLinear((2, 3), 2), ValueError, r"a size for each axis, but got in_features \(2, 3\) for the axes \(-1,\)"),
        (lambda: QuantizedLinear(2, 3)(jnp.ones((4, 3))), ValueError, r"QuantizedLinear expects an input of shape \(..., 2\), but got \(4, 3\)"),
        (lambda: QuantizedLinear((2, 3), 3, axis=(0, 1))(jnp.ones((4, 3))), ValueError, r"sizes \(2, 3\) along the axes \(0, 1\), but got \(4, 3\)"),
    ],
)  # fmt: skip
def test_mistakes(make, kind, message):
    with nnx.scope(0), pytest.raises(kind, match=message):
        make()
