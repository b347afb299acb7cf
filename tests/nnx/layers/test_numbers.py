"""Every layer against NumPy in float64: values and gradients, in each dtype, for all kinds of inputs."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import nnx
from tests.nnx.layers import reference as ref
from tests.nnx.layers.tape import Var

# The dtypes of input and parameters, and the dtype that the layer is told to compute in.
CONFIGS = {
    "float32": ("float32", "float32", None),
    "float64": ("float64", "float64", None),
    "bfloat16": ("bfloat16", "bfloat16", None),
    "float16": ("float16", "float16", None),
    "bfloat16 input": ("bfloat16", "float32", None),
    "float16 computation": ("float32", "float32", "float16"),
}
KINDS = {
    "plain": lambda x: x,
    "small": lambda x: 1e-4 * x,
    "large": lambda x: 1e4 * x,
    "offset": lambda x: x + 1e3,
}
UNITS = {"float64": 64, "float32": 32, "bfloat16": 4, "float16": 6}


class Case:
    """A layer, an input and the reference.

    Args:
      make: makes the layer, given `dtype` and `param_dtype`.
      shape: shape of the input.
      expected: `(p, x, layer) -> Var`.
      call: `(layer, x) -> y`; by default the layer itself.
      shapes: other shapes of the input.
      kinds: names of changes to the input.
    """

    function = False

    def __init__(self, make, shape, expected, call=None, shapes=(), kinds=tuple(KINDS)):
        self.make, self.shape, self.expected = make, shape, expected
        self.call = call or (lambda m, x: m(x))
        self.shapes, self.kinds = shapes, kinds


class Function(nnx.Module):
    """A function of the input, with a parameter that it does not use."""

    unused: jax.Array = nnx.param()

    def __init__(self):
        self.unused = jnp.zeros(())


def of(function, expected, shape, **options):
    call = lambda m, x: function(x)  # noqa: E731
    case = Case(lambda **_: Function(), shape, lambda p, x, m: expected(x), call, **options)
    case.function = True
    return case


def rows(n):
    return [(n,), (0, n), (1, n), (2, 1, 3, n)]


def layer(cls, *args, **options):
    return lambda dtype, param_dtype: cls(*args, dtype=dtype, param_dtype=param_dtype, **options)


def wrapped(cls, **options):
    def make(dtype, param_dtype):
        inner = nnx.Linear(3, 4, dtype=dtype, param_dtype=param_dtype)
        return cls(inner, param_dtype=param_dtype, dtype=dtype, **options)

    return make


def lora(dtype, param_dtype):
    own = {"lora_dtype": dtype, "lora_param_dtype": param_dtype}
    return nnx.LoRALinear(3, 5, lora_rank=2, alpha=3.0, dtype=dtype, param_dtype=param_dtype, **own)


MASK = np.random.default_rng(3).random((4, 3, 6)) < 0.6
MASK[..., 0], MASK[1] = False, False
CHANNELS = np.random.default_rng(4).random((3, 3, 2, 4)) < 0.5
MODERATE = ("plain", "small")
BIAS = np.array([-1.0, 0.5, 0.25])
SEEN = np.array([[True, True, False], [False, True, True], [True, True, True]])

CASES = {
    "Linear": Case(layer(nnx.Linear, 3, 5), (7, 3), ref.linear, shapes=rows(3)),
    "Linear, no bias": Case(layer(nnx.Linear, 3, 1, use_bias=False), (7, 3), ref.linear),
    "Linear, one": Case(layer(nnx.Linear, 1, 1), (2, 3, 1), ref.linear, shapes=rows(1)),
    "LinearGeneral": Case(
        layer(nnx.LinearGeneral, (3, 2), (4, 1), axis=(1, -1), batch_axis={0: 2}),
        (2, 3, 5, 2),
        ref.linear_general,
        shapes=[(2, 3, 0, 2), (2, 3, 1, 2)],
    ),
    "Einsum": Case(
        layer(nnx.Einsum, "nta,hab->nthb", (4, 2, 3), (4, 3)),
        (2, 5, 2),
        ref.einsum_layer,
        shapes=[(0, 5, 2), (1, 1, 2)],
    ),
    "Einsum, summed": Case(
        layer(nnx.Einsum, "nta,ab->nb", (2, 3), (3,)), (2, 5, 2), ref.einsum_layer
    ),
    "Einsum, rows": Case(
        layer(nnx.Einsum, "...a,ab->...b", (2, 3), (3,)), (5, 2), ref.einsum_layer, shapes=rows(2)
    ),
    "Conv": Case(
        layer(nnx.Conv, 2, 3, (3, 2), (2, 1)),
        (2, 5, 4, 2),
        lambda p, x, m: ref.conv(p, x, m, 2),
        shapes=[(5, 4, 2), (0, 5, 4, 2), (2, 1, 5, 4, 2), (1, 1, 1, 2)],
    ),
    "Conv, groups": Case(
        layer(nnx.Conv, 4, 6, (2,), padding="CAUSAL", feature_group_count=2, kernel_dilation=2),
        (2, 6, 4),
        lambda p, x, m: ref.conv(p, x, m, 1),
    ),
    "Conv, around": Case(
        layer(nnx.Conv, 1, 2, (3, 3), padding="CIRCULAR"),
        (2, 4, 3, 1),
        lambda p, x, m: ref.conv(p, x, m, 2),
    ),
    "Conv, reflected": Case(
        layer(nnx.Conv, 2, 4, (3, 3), padding="REFLECT", mask=CHANNELS),
        (1, 4, 3, 2),
        lambda p, x, m: ref.conv(p, x, m, 2),
    ),
    "Conv, dilated": Case(
        layer(nnx.Conv, 2, 3, (3,), padding=((2, 1),), input_dilation=2),
        (2, 4, 2),
        lambda p, x, m: ref.conv(p, x, m, 1),
    ),
    "ConvTranspose": Case(
        layer(nnx.ConvTranspose, 2, 3, (3, 2), (2, 1)),
        (2, 3, 4, 2),
        lambda p, x, m: ref.conv_transpose(p, x, m, 2),
        shapes=[(3, 4, 2), (0, 3, 4, 2), (2, 1, 3, 4, 2), (1, 1, 1, 2)],
    ),
    "ConvTranspose, transposed": Case(
        layer(nnx.ConvTranspose, 2, 3, (3,), (2,), padding="VALID", transpose_kernel=True),
        (2, 4, 2),
        lambda p, x, m: ref.conv_transpose(p, x, m, 1),
    ),
    "Embed, attend": Case(
        layer(nnx.Embed, 5, 3), (4, 3), ref.attend, lambda m, x: m.attend(x), shapes=rows(3)
    ),
    "LayerNorm": Case(layer(nnx.LayerNorm, 6), (5, 6), ref.layer_norm, shapes=rows(6)),
    "LayerNorm, two passes": Case(
        layer(nnx.LayerNorm, 6, use_fast_variance=False), (5, 6), ref.layer_norm
    ),
    "LayerNorm, two axes": Case(
        layer(nnx.LayerNorm, 6, reduction_axes=(-2, -1), feature_axes=(-2, -1)),
        (4, 2, 3),
        ref.layer_norm,
    ),
    "LayerNorm, one": Case(layer(nnx.LayerNorm, 1), (5, 1), ref.layer_norm),
    "LayerNorm, mask": Case(
        layer(nnx.LayerNorm, 6),
        (4, 3, 6),
        functools.partial(ref.layer_norm, mask=MASK),
        lambda m, x: m(x, mask=MASK),
    ),
    "RMSNorm": Case(
        layer(nnx.RMSNorm, 6),
        (5, 6),
        functools.partial(ref.layer_norm, center=False),
        shapes=rows(6),
    ),
    "GroupNorm": Case(
        layer(nnx.GroupNorm, 6, 3), (2, 4, 6), ref.group_norm, shapes=[(0, 4, 6), (1, 1, 6)]
    ),
    "GroupNorm, mask": Case(
        layer(nnx.GroupNorm, 6, 2),
        (4, 3, 6),
        functools.partial(ref.group_norm, mask=MASK),
        lambda m, x: m(x, mask=MASK),
    ),
    "InstanceNorm": Case(
        layer(nnx.InstanceNorm, 3), (2, 4, 3), ref.instance_norm, shapes=[(0, 4, 3), (1, 2, 2, 3)]
    ),
    "BatchNorm": Case(
        layer(nnx.BatchNorm, 3), (7, 3), ref.batch_norm, shapes=[(1, 3), (2, 1, 2, 3), (3,)]
    ),
    "BatchNorm, mask": Case(
        layer(nnx.BatchNorm, 6),
        (4, 3, 6),
        lambda p, x, m: masked_batch_norm(p, x, m),
        lambda m, x: m(x, mask=MASK),
    ),
    "BatchNorm, evaluation": Case(
        layer(nnx.BatchNorm, 3),
        (7, 3),
        functools.partial(ref.batch_norm, training=False),
        lambda m, x: m(x, use_running_average=True),
        shapes=rows(3),
    ),
    "WeightNorm": Case(wrapped(nnx.WeightNorm), (5, 3), ref.weight_norm),
    "SpectralNorm": Case(wrapped(nnx.SpectralNorm, n_steps=30), (5, 3), ref.spectral_norm),
    "LoRALinear": Case(lora, (5, 3), ref.lora, shapes=rows(3)),
    "MultiHeadAttention": Case(
        layer(nnx.MultiHeadAttention, 2, 4, 8),
        (2, 5, 4),
        ref.multi_head_attention,
        shapes=[(5, 4), (0, 1, 4)],
        kinds=("plain",),
    ),
    "MultiHeadAttention, causal": Case(
        layer(nnx.MultiHeadAttention, 2, 4, v_features=6),
        (2, 5, 4),
        functools.partial(ref.multi_head_attention, causal=True),
        lambda m, x: m(x, is_causal=True),
        kinds=("plain",),
    ),
    "dot_product_attention": of(
        lambda x: nnx.dot_product_attention(x, x[..., :2, :], x[..., 2:, :], BIAS, SEEN),
        lambda x: ref.attention(x, x[..., :2, :], x[..., 2:, :], BIAS, SEEN),
        (2, 3, 4, 2),
        shapes=[(3, 4, 2), (0, 3, 4, 2), (2, 1, 3, 4, 2)],
        kinds=MODERATE,
    ),
    "dot_product_attention, causal": of(
        lambda x: nnx.dot_product_attention(x, x, x[..., :1], is_causal=True, precision="highest"),
        lambda x: ref.attention(x, x, x[..., :1], causal=True),
        (2, 5, 1, 3),
        kinds=MODERATE,
    ),
    "PReLU": Case(
        lambda dtype, param_dtype: nnx.PReLU(0.25, dtype=dtype, param_dtype=param_dtype),
        (5, 3),
        ref.prelu,
        shapes=[(), (0,), (2, 1, 3)],
    ),
    "avg_pool": of(
        lambda x: nnx.avg_pool(x, (2, 3), (1, 2), "VALID"),
        lambda x: ref.pooling("avg", x, (2, 3), (1, 2), [(0, 0)] * 2),
        (2, 3, 5, 2),
        shapes=[(3, 5, 2), (0, 3, 5, 2), (2, 1, 3, 5, 1)],
    ),
    "avg_pool, padded": of(
        lambda x: nnx.avg_pool(x, (3,), None, [(1, 1)], False),
        lambda x: ref.pooling("avg", x, (3,), (1,), [(1, 1)], inside=False),
        (2, 5, 2),
    ),
    "max_pool": of(
        lambda x: nnx.max_pool(x, (2, 2), None, [(1, 0), (0, 1)]),
        lambda x: ref.pooling("max", x, (2, 2), (1, 1), [(1, 0), (0, 1)]),
        (2, 3, 5, 2),
        # In half precision, neighbours with an offset are often equal, and share a gradient.
        kinds=("plain", "small", "large"),
    ),
    "min_pool": of(
        lambda x: nnx.min_pool(x, (3,), (2,)),
        lambda x: ref.pooling("min", x, (3,), (2,), [(0, 0)]),
        (2, 7, 1),
        kinds=("plain", "small", "large"),
    ),
    "apply_rotary": of(
        lambda x: nnx.apply_rotary(x, np.array([0, 3, 2047, 131071]), rotary_features=4),
        lambda x: ref.rotary(x, [0, 3, 2047, 131071], 10000.0, 4, False),
        (2, 4, 3, 6),
    ),
    "RotaryEmbedding": of(
        lambda x: nnx.RotaryEmbedding(4, interleaved=True)(x),
        lambda x: ref.rotary(x, np.arange(x.shape[-3]), 10000.0, 4, True),
        (2, 5, 1, 4),
        shapes=[(5, 1, 4), (0, 5, 1, 4)],
    ),
    "RNN of LSTMCell": Case(
        lambda **o: nnx.RNN(nnx.LSTMCell(2, 3, **o)), (2, 4, 2), ref.rnn, shapes=[(4, 2), (0, 4, 2)]
    ),
    "RNN of OptimizedLSTMCell": Case(
        lambda **o: nnx.RNN(nnx.OptimizedLSTMCell(2, 3, **o)), (2, 4, 2), ref.rnn, kinds=MODERATE
    ),
    "RNN of GRUCell": Case(
        lambda **o: nnx.RNN(nnx.GRUCell(2, 3, **o)), (2, 4, 2), ref.rnn, kinds=MODERATE
    ),
    "SimpleCell": Case(
        layer(nnx.SimpleCell, 3, 3, residual=True),
        (5, 3),
        lambda p, x, m: ref.simple_cell(p, x * 0.5, x, m),
        lambda m, x: m(x * 0.5, x)[1],
        shapes=rows(3),
        kinds=MODERATE,
    ),
}


def masked_batch_norm(p, x, m):
    """A channel that is completely hidden is normalized by the running averages."""
    seen = MASK.any((0, 1))
    y, z = ref.batch_norm(p, x, m, MASK), ref.batch_norm(p, x, m, training=False)
    return ref.where(np.broadcast_to(seen, x.shape), y, z)


def drawn(seed, shape):
    return np.random.default_rng(seed).normal(size=shape)


def rounded(x, dtype):
    return np.asarray(x).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))


@functools.cache
def built(name, param_dtype, dtype):
    """The layer with random parameters, because the initial ones are often zeros and ones."""
    with nnx.scope(jax.random.key(0)):
        m = nnx.eval_shape(lambda: CASES[name].make(dtype=dtype, param_dtype=param_dtype))
    if getattr(m, "mask", None) is not None:
        m.mask = CHANNELS
    for i, (path, cell) in enumerate(nnx.refs(m).items()):
        value = drawn(i, cell.value.shape) * 0.5
        if path[-1] in ("scale", "var") or "scales" in path:
            value = 1 + 0.2 * np.abs(value)
        elif path[-1] == "sigma":
            value = np.ones(cell.value.shape)
        cell.value = jnp.asarray(rounded(value, str(cell.value.dtype)))
    return m


@functools.cache
def compiled(name):
    call = CASES[name].call

    def run(m, x, cotangent):
        def loss(m, x):
            y = call(m, x)
            return jnp.sum(y.astype(cotangent.dtype) * cotangent), y

        differentiated = ("params", "lora")
        return nnx.grad(loss, wrt=differentiated, argnums=(0, 1), has_aux=True)(m, x)

    return nnx.jit(run)


def close(got, expected, dtype, units, what, terms=0.0):
    """Equal within some units in the last place of the largest element; overflow gives infinity."""
    info = jnp.finfo(dtype)
    got, expected = np.asarray(got, np.float64), np.asarray(expected)
    assert got.shape == expected.shape, what
    if not expected.size:
        return
    over = np.abs(expected) > float(info.max) * (1 - 2 * units * float(info.eps))
    assert not np.isfinite(got[over]).any() or np.abs(got[over]).min() > float(info.max) / 2
    got, expected = got[~over], expected[~over]
    scale = max(np.abs(expected).max(initial=0.0), terms)
    # Values smaller than the dtype's own steps are lost.
    allowed = units * (float(info.eps) * scale + float(info.smallest_subnormal)) + 1e-30
    worst = np.abs(got - expected).max(initial=0.0)
    assert worst <= allowed, (
        f"{what}: off by {worst / (float(info.eps) * scale + 1e-300):.1f} units"
    )


def check(name, config, shape, kinds):
    case, (x_dtype, param_dtype, dtype) = CASES[name], CONFIGS[config]
    m = built(name, param_dtype, dtype)
    result = jnp.result_type(dtype) if dtype else jnp.result_type(x_dtype, param_dtype)
    if isinstance(m, Function) or (name == "PReLU" and not dtype):
        result = jnp.dtype(x_dtype)
    elif name == "Embed, attend" and not dtype:
        result = jnp.dtype(param_dtype)
    coarse = min(
        (x_dtype, param_dtype, str(result)),
        key=lambda d: jnp.finfo(d).bits * 100 + jnp.finfo(d).nmant,
    )
    for i, kind in enumerate(kinds):
        x = rounded(KINDS[kind](drawn(7 + i, shape)), x_dtype)
        values = {".".join(path): Var(cell.value) for path, cell in nnx.refs(m).items()}
        start = Var(x)
        y = case.expected(values, start, m)
        cotangent = np.round(drawn(100, y.shape) * 8) / 16
        wide = "float64" if x_dtype == "float64" else "float32"
        state = nnx.get_partition(m, "batch_stats")
        (of_m, of_x), got = compiled(name)(m, jnp.asarray(x), jnp.asarray(cotangent, wide))
        nnx.update(m, state)
        what = f"{name}, {config}, {kind}, {shape}"
        assert got.dtype == result, what
        close(got, y.value, str(result), UNITS[coarse], f"{what}: the result")
        paths = list(of_m)
        gradients = y.grad(cotangent, start, *(values[".".join(path)] for path in paths))
        close(of_x, gradients[0], coarse, UNITS[coarse], f"{what}: by the input")
        for path, expected in zip(paths, gradients[1:], strict=True):
            # The bias of the keys adds the same to all logits of a query, which changes nothing.
            terms = np.abs(gradients[2]).max() if path == ("key", "bias") else 0.0
            close(of_m[path], expected, coarse, UNITS[coarse], f"{what}: by {path}", terms)


def configs(name, case):
    """All dtypes, or some of them for variants of a layer and for slow layers."""
    if ", " in name:
        return ("float32", "bfloat16")
    slow = case.function or name.startswith(("RNN", "Multi"))
    return list(CONFIGS)[:4] if slow else CONFIGS


ALL = [(name, config) for name, case in CASES.items() for config in configs(name, case)]


@pytest.mark.parametrize("name, config", ALL)
def test_values_and_gradients(name, config):
    with jax.enable_x64(config == "float64"):
        check(name, config, CASES[name].shape, CASES[name].kinds)


# Each layer with each of its shapes, and each dtype with some of them.
ODD = [
    (name, shape, list(CONFIGS)[(i + j) % 4])
    for i, (name, case) in enumerate(CASES.items())
    for j, shape in enumerate(case.shapes)
]


@pytest.mark.parametrize("name, shape, config", ODD, ids=str)
def test_odd_shapes(name, shape, config):
    with jax.enable_x64(config == "float64"):
        check(name, config, shape, ("plain",))
