"""Layers against flax.nnx: the same weights, moved by path, give the same values and gradients."""

import flax.nnx as fnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx


def from_flax(ours, theirs):
    """Move every weight by path; both must have the same ones."""
    flat = {}
    for path, variable in fnx.state(theirs, (fnx.Param, fnx.BatchStat)).flat_state():
        flat[tuple(map(str, path))] = jnp.asarray(variable[...])
    assert set(flat) == set(nnx.refs(ours))
    nnx.update(ours, flat)
    return ours


def check(ours, theirs, x, **call):
    """Equal outputs, gradients by weight and by input, and equal state afterwards."""
    from_flax(ours, theirs)

    def our_loss(m, x):
        return jnp.sum(jnp.sin(m(x, **call).astype(jnp.float32)))

    @fnx.jit
    def of_flax(m, x):
        def loss(m, x):
            y = m(x, **call)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

        return fnx.grad(loss, argnums=(0, 1), has_aux=True)(m, x)

    tolerance = {"atol": 2e-2 if x.dtype == jnp.bfloat16 else 2e-5, "rtol": 1e-3}
    if jnp.bfloat16 in (getattr(ours, "dtype", None), getattr(ours, "param_dtype", None)):
        # There, flax adds up the gradient of a bias in bfloat16.
        tolerance = {"atol": 2e-2, "rtol": 5e-2}
    ga, gx = nnx.grad(our_loss, argnums=(0, 1))(ours, x)
    (fa, fx), _ = of_flax(theirs, x)
    np.testing.assert_allclose(gx.astype(jnp.float32), fx.astype(jnp.float32), **tolerance)
    for path, value in fa.flat_state():
        np.testing.assert_allclose(ga[tuple(map(str, path))], value[...], **tolerance)
    a, (_, b) = ours(x, **call), of_flax(theirs, x)
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), **tolerance)
    for path, variable in fnx.state(theirs, fnx.BatchStat).flat_state():
        np.testing.assert_allclose(
            ours["batch_stats"][tuple(map(str, path))], variable[...], **tolerance
        )


def draw(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_bias": False},
        {"dtype": jnp.bfloat16},
        {"param_dtype": jnp.bfloat16},
        {"precision": "highest"},
        {"preferred_element_type": jnp.float32, "dtype": jnp.bfloat16},
    ],
)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 3)])
def test_linear(options, shape):
    theirs = fnx.Linear(3, 5, rngs=fnx.Rngs(0), **options)
    ours = nnx.Linear.init(1)(3, 5, **options)
    check(ours, theirs, draw(*shape))


def test_linear_of_integers_and_of_numpy():
    layer = nnx.Linear.init(0)(3, 2)
    x = np.arange(6).reshape(2, 3)
    np.testing.assert_allclose(layer(x), x @ np.asarray(layer.kernel), rtol=1e-6)
    assert layer(x).dtype == jnp.float32


def test_linear_names_both_shapes():
    layer = nnx.Linear.init(0)(3, 2)
    with pytest.raises(ValueError, match=r"Linear expects .* \(\.\.\., 3\), but got \(4, 5\)"):
        layer(jnp.ones((4, 5)))
    with pytest.raises(ValueError, match=r"but got \(\)"):
        nnx.Linear.init(0)(3, 2, dtype=jnp.bfloat16)(jnp.ones(()))


def test_initial_values_and_metadata():
    a, b = (
        nnx.Linear.init(key)(64, 128, kernel_metadata={"axes": ("in", "out")}) for key in (0, 1)
    )
    assert abs(float(a.kernel.std()) - 64**-0.5) < 0.01 and (a.bias == 0).all()
    assert not jnp.allclose(a.kernel, b.kernel)
    assert nnx.get_ref(a, "kernel").metadata["axes"] == ("in", "out")
    assert jnp.array_equal(a.kernel, nnx.Linear.init(0)(64, 128).kernel)
    init = nnx.initializers.constant(3.0)
    assert (nnx.Linear.init(0)(2, 2, bias_init=init).bias == 3).all()


CONVS = [
    ((8, 8), {"kernel_size": (3, 3)}),
    ((8, 8), {"kernel_size": (3, 3), "padding": "VALID", "strides": 2}),
    ((8, 8), {"kernel_size": (3, 2), "padding": "CIRCULAR", "kernel_dilation": 2}),
    ((8, 8), {"kernel_size": (3, 3), "padding": "REFLECT"}),
    ((8,), {"kernel_size": 3, "padding": "CAUSAL", "kernel_dilation": 2}),
    ((8,), {"kernel_size": (4,), "padding": 1, "use_bias": False}),
    ((8, 8), {"kernel_size": (3, 3), "padding": ((1, 2), (0, 1)), "input_dilation": (1, 2)}),
    ((8, 8), {"kernel_size": (3, 3), "feature_group_count": 2, "strides": (1, 2)}),
    ((4, 4, 4), {"kernel_size": (2, 2, 2), "dtype": jnp.bfloat16}),
    (
        (8, 8),
        {
            "kernel_size": (3, 3),
            "mask": jnp.tril(jnp.ones((3, 3)))[..., None, None] * jnp.ones((4, 6)),
        },
    ),
]


@pytest.mark.parametrize("space, options", CONVS)
def test_conv(space, options):
    theirs = fnx.Conv(4, 6, rngs=fnx.Rngs(0), **options)
    check(nnx.Conv.init(1)(4, 6, **options), theirs, draw(2, *space, 4))


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_conv_with_other_batches(batch):
    theirs = fnx.Conv(4, 6, (3, 3), rngs=fnx.Rngs(0))
    x = draw(*batch, 5, 5, 4)
    ours = from_flax(nnx.Conv.init(1)(4, 6, (3, 3)), theirs)
    np.testing.assert_allclose(ours(x), theirs(x), atol=1e-5)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: nnx.Conv(4, 6, (3, 3))(jnp.ones((2, 8, 8, 3))),
            r"\*, \*, 4\), but got \(2, 8, 8, 3\)",
        ),
        (lambda: nnx.Conv(4, 6, (3, 3))(jnp.ones((8, 4))), r"but got \(8, 4\)"),
        (
            lambda: nnx.Conv(3, 6, 3, feature_group_count=2),
            "3 input and 6 output channels into 2 groups",
        ),
        (
            lambda: nnx.Conv(3, 6, 3, mask=jnp.ones((3, 6))),
            r"shape of the kernel, \(3, 3, 6\), but has",
        ),
        (
            lambda: nnx.Conv(3, 6, (3, 3), padding="CAUSAL"),
            "CAUSAL padding is for one spatial axis",
        ),
        (lambda: nnx.Conv(3, 6, (3, 3), padding="SAM"), "Conv has no padding 'SAM'"),
        (lambda: nnx.Conv(3, 6, (3, 3), strides=(1, 1, 1)), "2 spatial axes, but got 3 sizes"),
        (lambda: nnx.Conv(3, 6, (3, 3), padding=(1,)), "2 spatial axes, but got 1 paddings"),
        (lambda: nnx.BatchNorm(3)(jnp.ones((2, 4))), r"BatchNorm .* 3\) along axis -1.* \(2, 4\)"),
        (lambda: nnx.Dropout(1.5), "a probability, from 0 to 1, but got 1.5"),
        (lambda: nnx.Sequential([1]), r"number 0 is a list.*Sequential\(\*layers\)"),
        (lambda: nnx.Sequential(nnx.Linear), r"number 0 is the class Linear"),
    ],
)
def test_mistakes_raise_errors_that_say_what_is_wrong(make, message):
    with nnx.scope(0), pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.5, "epsilon": 1e-3, "use_fast_variance": False},
        {"use_bias": False},
        {"use_scale": False},
        {"axis": 1},
        {"dtype": jnp.bfloat16},
    ],
)
@pytest.mark.parametrize("running", [False, True])
def test_batch_norm(options, running):
    theirs = fnx.BatchNorm(4, rngs=fnx.Rngs(0), use_running_average=running, **options)
    ours = nnx.BatchNorm(4, use_running_average=running, **options)
    check(ours, theirs, draw(3, 4, 4) * 3 + 1)


def test_batch_norm_with_a_mask_and_the_flag():
    mask = jnp.array([True, True, False])[:, None]
    theirs = fnx.BatchNorm(4, rngs=fnx.Rngs(0))
    check(nnx.BatchNorm(4), theirs, draw(3, 4), mask=mask)
    norm = nnx.BatchNorm(4, use_running_average=None)
    with pytest.raises(nnx.MissingFlagError, match="'use_running_average'"):
        norm(draw(3, 4))
    norm(draw(3, 4), use_running_average=True)
    with nnx.scope(use_running_average=True):
        norm(draw(3, 4))
    assert (norm.mean == 0).all()


def test_batch_norm_over_a_mapped_axis_is_that_of_the_whole_batch():
    x = draw(4, 5, 3)
    whole, parts = nnx.BatchNorm(3), nnx.BatchNorm(3, axis_name="lanes")
    y = nnx.vmap(lambda m, x: m(x), in_axes=(None, 0), axis_name="lanes")(parts, x)
    np.testing.assert_allclose(y, whole(x.reshape(20, 3)).reshape(4, 5, 3), atol=1e-5)
    np.testing.assert_allclose(parts.var, whole.var, rtol=1e-5)


def test_dropout_drops_and_scales():
    x = jnp.ones((1000, 4))
    drop = nnx.Dropout(0.25, broadcast_dims=(1,))
    with nnx.scope(0):
        y, z = drop(x), drop(x)
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)} and not jnp.array_equal(y, z)
    assert (y == y[:, :1]).all() and abs(float((y == 0).mean()) - 0.25) < 0.05
    assert jnp.array_equal(drop(x, deterministic=True), x)
    assert jnp.array_equal(drop(x, rng=jax.random.key(3)), drop(x, rng=jax.random.key(3)))
    assert jnp.array_equal(nnx.Dropout(0.0)(x), x) and (nnx.Dropout(1.0)(x) == 0).all()
    with pytest.raises(nnx.MissingStreamError, match=r"'dropout'.*apply\(rngs="):
        drop(x)


def test_sequential_passes_tuples_and_dicts_on():
    model = nnx.Sequential(lambda x: (x, x + 1), lambda a, b: {"c": a * b}, lambda c: c * 2)
    assert model(3) == 24 and nnx.Sequential()(5) == 5
    assert len(model.layers) == 3


@pytest.mark.parametrize("options", [{}, {"remat": True}, {"unroll": 2}])
def test_stack_is_the_python_loop_with_gradients(options):
    def block():
        return nnx.Sequential(nnx.Linear(3, 3), nnx.tanh)

    stack = nnx.Stack.init(0)(block, 4, **options)
    kernels = stack.layers.layers[0].kernel
    assert kernels.shape == (4, 3, 3) and len(np.unique(kernels)) == 36
    x = draw(2, 3)

    def loop(kernels, x):
        for k in kernels:
            x = jnp.tanh(x @ k)
        return x.sum()

    value, grads = nnx.jit(nnx.value_and_grad(lambda m: m(x).sum()))(stack)
    expected, expected_grads = jax.value_and_grad(loop)(kernels, x)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(grads["layers.layers.0.kernel"], expected_grads, atol=1e-5)


def test_stack_with_statistics_randomness_and_arguments():
    class Block(nnx.Module):
        def __init__(self):
            self.norm, self.drop = nnx.BatchNorm(3), nnx.Dropout(0.5)

        def __call__(self, x, scale, *, shift=0.0):
            return self.drop(self.norm(x)) * scale + shift

    with nnx.scope(0):
        stack = nnx.Stack(Block, 3, remat=True)
        y = nnx.jit(lambda m, x: m(x, 2.0, shift=1.0))(stack, draw(8, 3))
    assert y.shape == (8, 3) and stack.layers.norm.mean.shape == (3, 3)
    assert not jnp.allclose(stack.layers.norm.mean[0], stack.layers.norm.mean[1])
    with pytest.raises(nnx.CarryError, match=r"float32\[8,3\] to float32\[8,5\]"):
        nnx.Stack.init(0)(lambda: nnx.Linear(3, 5), 2)(draw(8, 3))
    with pytest.raises(ValueError, match="at least one layer"):
        nnx.Stack(Block, 0)


LAYERS = {
    "Linear": (lambda: nnx.Linear(2, 3), (2,)),
    "LinearGeneral": (lambda: nnx.LinearGeneral(2, (3, 4)), (2,)),
    "Einsum": (lambda: nnx.Einsum("ta,ab->tb", (2, 3), (3,)), (1, 2)),
    "Conv": (lambda: nnx.Conv(2, 3, 1), (4, 2)),
    "ConvTranspose": (lambda: nnx.ConvTranspose(2, 3, 1), (4, 2)),
    "BatchNorm": (lambda: nnx.BatchNorm(2, use_running_average=True), (2,)),
    "LayerNorm": (lambda: nnx.LayerNorm(2), (2,)),
    "RMSNorm": (lambda: nnx.RMSNorm(2), (2,)),
    "GroupNorm": (lambda: nnx.GroupNorm(2, 2), (2,)),
    "InstanceNorm": (lambda: nnx.InstanceNorm(2), (1, 3, 2)),
    "Embed": (lambda: nnx.Embed(4, 3), ()),
    "Dropout": (lambda: nnx.Dropout(1.0), (2,)),
    "PReLU": (lambda: nnx.PReLU(), (2,)),
    "MultiHeadAttention": (lambda: nnx.MultiHeadAttention(2, 2), (3, 2)),
    "RNN": (lambda: nnx.RNN(nnx.GRUCell(2, 3)), (3, 2)),
    "RotaryEmbedding": (lambda: nnx.RotaryEmbedding(2), (3, 2, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_lists_are_arrays_and_anything_else_names_the_layer(name):
    make, shape = LAYERS[name]
    with nnx.scope(0):
        layer = make()
    x = np.ones(shape, np.int32 if name == "Embed" else np.float32)
    np.testing.assert_allclose(layer(x.tolist()), layer(x), rtol=1e-6)
    for wrong in ("text", None, {"x": x}, nnx.Ref(x)):
        kind = type(wrong).__name__
        with pytest.raises(TypeError, match=f"{name} takes an array, but got .* type '{kind}'"):
            layer(wrong)


@pytest.mark.parametrize(
    ("name", "parameter", "wrong", "message"),
    [
        ("Linear", "kernel", (5, 3), r"kernel of Linear has the shape \(5, 3\), .* \(2, 3\)"),
        ("Linear", "bias", (4,), r"bias of Linear has the shape \(4,\), .* \(3,\)"),
        ("LinearGeneral", "kernel", (5, 3, 4), r"LinearGeneral .* \(5, 3, 4\), .* \(2, 3, 4\)"),
        ("LinearGeneral", "bias", (4, 4), r"LinearGeneral .* \(4, 4\), .* \(3, 4\)"),
        ("Einsum", "kernel", (5, 3), r"Einsum .* \(5, 3\), .* \(2, 3\)"),
        ("Conv", "kernel", (1, 5, 3), r"Conv .* \(1, 5, 3\), .* \(1, 2, 3\)"),
        ("Conv", "bias", (5,), r"Conv .* \(5,\), .* \(3,\)"),
        ("ConvTranspose", "kernel", (1, 5, 3), r"ConvTranspose .* \(1, 5, 3\), .* \(1, 2, 3\)"),
        ("BatchNorm", "scale", (5,), r"scale of BatchNorm .* \(5,\), .* \(2,\)"),
        ("BatchNorm", "mean", (5,), r"mean of BatchNorm .* \(5,\), .* \(2,\)"),
        ("LayerNorm", "bias", (5,), r"bias of LayerNorm .* \(5,\), .* \(2,\)"),
    ],
)
def test_a_parameter_that_does_not_fit_is_named(name, parameter, wrong, message):
    make, shape = LAYERS[name]
    with nnx.scope(0):
        layer = make()
    setattr(layer, parameter, jnp.ones(wrong))
    for call in (layer, nnx.jit(layer)):
        with pytest.raises(ValueError, match=message):
            call(jnp.ones(shape))


def test_shape_errors_have_the_name_of_the_subclass():
    class Projection(nnx.LinearGeneral):
        pass

    with pytest.raises(ValueError, match=r"^Projection expects an input with sizes \(3,\)"):
        Projection.init(0)(3, 4)(jnp.ones((2, 5)))


def test_averages_of_batch_norm_keep_their_dtype():
    norm = nnx.BatchNorm(3)
    with jax.enable_x64(True):
        norm(jnp.ones((4, 3), jnp.float64))
        assert norm.mean.dtype == norm.var.dtype == jnp.float32
        nnx.scan(lambda c, x: (c, norm(x)), None, jnp.ones((2, 4, 3), jnp.float64))
    assert float(norm.mean[0]) > 0


def test_parameters_of_eight_bits_are_drawn_in_more():
    layer = nnx.Linear.init(0)(4, 5, param_dtype=jnp.float8_e4m3fn)
    kernel = layer.kernel.astype(jnp.float32)
    assert layer.kernel.dtype == jnp.float8_e4m3fn
    assert bool(jnp.isfinite(kernel).all()) and float(jnp.std(kernel)) > 0.1


def test_a_part_with_the_name_of_a_flag_is_not_a_flag():
    class Both(nnx.Module):
        def __init__(self):
            self.training = nnx.Linear(2, 2)

        def __call__(self):
            return self.get_flag("training", "default")

    model = Both.init(0)()
    assert model() == "default" and model.apply(training=True)() is True
