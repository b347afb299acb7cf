"""Weight and spectral normalization against flax.nnx and against the mathematics."""

import flax.nnx as fnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import nnx
from nnx.layers.weight_norm import SpectralNorm, WeightNorm
from tests.nnx.layers.test_layer_norm import cheap
from tests.nnx.layers.test_layers import draw

X = draw(5, 4)


def linear(theirs):
    """A Linear with the weights of a flax Linear."""
    ours = nnx.Linear.init(0)(theirs.in_features, theirs.out_features, kernel_init=cheap)
    nnx.update(ours, {"kernel": theirs.kernel[...], "bias": theirs.bias[...]})
    return ours


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"feature_axes": None},
        {"feature_axes": (0, 1), "epsilon": 0.1},
        {"use_scale": False},
        {"dtype": jnp.bfloat16},
    ],
)
def test_weight_norm(options):
    layer = fnx.Linear(4, 3, rngs=fnx.Rngs(0), kernel_init=cheap, bias_init=cheap)
    ours = WeightNorm(linear(layer), **options)
    kernel = ours.layer_instance.kernel

    def loss(m):
        return jnp.sum(jnp.sin(m(X)))

    y, grads = nnx.jit(nnx.value_and_grad(loss))(ours)
    theirs = fnx.WeightNorm(layer, rngs=fnx.Rngs(0), **options)
    expected, their_grads = fnx.jit(fnx.value_and_grad(loss))(theirs)
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    for name in ("kernel", "bias"):
        theirs_of = their_grads["layer_instance"][name][...]
        np.testing.assert_allclose(
            grads["layer_instance", name], theirs_of, atol=1e-2 if "dtype" in options else 1e-5
        )
    assert ours.layer_instance.kernel is kernel
    assert ("scales", "kernel") in grads or options == {"use_scale": False}


def test_weight_norm_trains_its_scale_and_leaves_the_layer_alone_under_jit():
    with nnx.scope(0):
        model = WeightNorm(nnx.Sequential(nnx.Linear(4, 3), nnx.BatchNorm(3)))
    kernel = model.layer_instance.layers[0].kernel

    @nnx.jit
    def step(model):
        grads = nnx.grad(lambda m: jnp.sum(m(X) ** 2), wrt=nnx.PathContains("scales"))(model)
        model["params"] = {p: model["params"][p] - 0.1 * g for p, g in grads.items()}

    step(model)
    assert jnp.array_equal(model.layer_instance.layers[0].kernel, kernel)
    assert not jnp.allclose(model["params"]["scales.layers.0.kernel"], 1)
    # The layer keeps its own writes.
    mean = X @ (kernel / jnp.linalg.norm(kernel, axis=0))
    np.testing.assert_allclose(model.layer_instance.layers[1].mean, 0.01 * mean.mean(0), rtol=1e-4)
    assert set(nnx.refs(nnx.clone(model))) == set(nnx.refs(model))


def test_weight_norm_in_a_scan_and_with_arguments():
    class Shifted(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(4, 4)

        def __call__(self, x, shift, *, factor=1.0):
            return self.linear(x) * factor + shift

    with nnx.scope(0):
        model = WeightNorm(Shifted(), scale_init=nnx.initializers.constant(2.0))
    looped, _ = nnx.scan(lambda x, _: (model(x, 1.0, factor=0.5), None), X, length=2)
    unrolled = model(model(X, 1.0, factor=0.5), 1.0, factor=0.5)
    np.testing.assert_allclose(looped, unrolled, atol=1e-5)


def test_spectral_norm():
    layer = fnx.Linear(4, 3, rngs=fnx.Rngs(0))
    ours = SpectralNorm.init(0)(linear(layer), n_steps=2)
    theirs = fnx.SpectralNorm(layer, n_steps=2, rngs=fnx.Rngs(0))
    theirs.batch_stats["kernel", "u"][...] = ours["batch_stats"]["batch_stats.kernel.u"]
    original = layer.kernel[...]

    def gradients(transforms, update):
        return transforms.jit(
            transforms.grad(lambda m: jnp.sum(jnp.sin(m(X, update_stats=update))))
        )

    steps = {update: (gradients(nnx, update), gradients(fnx, update)) for update in (True, False)}
    for update in (True, False, True):
        grads = steps[update][0](ours)
        layer.kernel[...] = original  # flax leaves the normalized kernel in the layer
        their_grads = steps[update][1](theirs)
        np.testing.assert_allclose(
            grads["layer_instance.kernel"], their_grads["layer_instance"]["kernel"][...], atol=1e-5
        )
        for name in ("u", "sigma"):
            value = theirs.batch_stats["kernel", name][...]
            np.testing.assert_allclose(
                ours["batch_stats"]["batch_stats", "kernel", name], value, rtol=1e-5
            )
    assert jnp.array_equal(ours.layer_instance.kernel, original)


def test_spectral_norm_of_a_convolution_finds_the_largest_singular_value():
    with nnx.scope(0):
        model = SpectralNorm(nnx.Conv(3, 4, (2, 2), padding="VALID", use_bias=False))
    x, kernel = draw(1, 2, 2, 3), model.layer_instance.kernel
    forward = nnx.jit(lambda m, x: m(x))
    y = [forward(model, x) for _ in range(30)][-1]
    largest = np.linalg.svd(np.asarray(kernel).reshape(-1, 4), compute_uv=False)[0]
    np.testing.assert_allclose(model["batch_stats"]["batch_stats.kernel.sigma"], largest, rtol=1e-3)
    np.testing.assert_allclose(y, model.layer_instance(x) / largest, atol=1e-3)
    assert jnp.array_equal(model.layer_instance.kernel, kernel)


def test_when_spectral_norm_keeps_its_statistics():
    model = SpectralNorm.init(0)(nnx.Linear.init(1)(4, 3))
    start = model["batch_stats"]

    def changes(call):
        model["batch_stats"] = start
        call()
        return not jnp.array_equal(
            model["batch_stats"]["batch_stats.kernel.u"], start["batch_stats.kernel.u"]
        )

    assert changes(lambda: model(X)) and not changes(lambda: model(X, update_stats=False))
    assert not changes(lambda: model.apply(use_running_average=True)(X))
    assert not changes(lambda: model.eval()(X)) and changes(lambda: model.train()(X))
    with nnx.scope(0):
        frozen = SpectralNorm(nnx.Linear(4, 3), update_stats=False, dtype=jnp.bfloat16)
    assert frozen.use_running_average and frozen(X).dtype == jnp.float32


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: WeightNorm(nnx.Linear(4, 3), variable_filter=nnx.PathContains("w")),
            "selects no parameter of Linear, which has kernel, bias",
        ),
        (
            lambda: WeightNorm(nnx.Linear(4, 3), variable_filter=..., feature_axes=(0, 1)),
            r"feature_axes \(0, 1\), but the parameter 'bias' has the shape \(3,\)",
        ),
        (lambda: SpectralNorm(nnx.Linear(4, 3), n_steps=0), "n_steps is 0"),
        (
            lambda: SpectralNorm(nnx.Conv(3, 4, 2), error_on_non_matrix=True),
            r"'kernel' of Conv has the shape \(2, 3, 4\)",
        ),
    ],
)
def test_mistakes_raise_errors_that_say_what_is_wrong(make, message):
    with nnx.scope(0), pytest.raises(ValueError, match=message):
        make()


def test_a_layer_that_changes_after_it_is_wrapped():
    with nnx.scope(0):
        model = nnx.Sequential(nnx.Linear(4, 4))
        wrapped = WeightNorm(model), SpectralNorm(model)
        model.layers.append(nnx.Linear(4, 4))
    for layer in wrapped:
        with pytest.raises(ValueError, match=r"for 'layers.1.kernel.*Wrap the layer when"):
            layer(X)


def test_a_write_of_a_normalized_parameter_is_not_lost_silently():
    class Decay(nnx.Module):
        kernel: jax.Array = nnx.param()

        def __init__(self):
            self.kernel = jnp.ones((4, 4))

        def __call__(self, x):
            self.kernel = self.kernel * 0.9
            return x @ self.kernel

    with pytest.raises(nnx.NotMutableError, match="Decay wrote to its parameter 'kernel'"):
        WeightNorm(Decay())(X)


@pytest.mark.parametrize("kind", ["buffer", "history", "calls"])
def test_a_change_that_would_be_lost_is_an_error(kind):
    class Layer(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(2, 2)
            self.buffer, self.history, self.calls = jnp.zeros(2), [], 0

        def __call__(self, x):
            if kind == "buffer":
                self.buffer += 1
            elif kind == "history":
                self.history.append(1)
            else:
                self.calls += 1
            return self.linear(x)

    with nnx.scope(0):
        wrapped = nnx.WeightNorm(Layer())
    with pytest.raises(nnx.StructureError, match="Layer changed an attribute that is not a Ref"):
        wrapped(jnp.ones(2))


PLACES = {
    "Linear": (lambda: nnx.Linear(8, 8), (4, 8), P("data", "model")),
    "Linear, rows": (lambda: nnx.Linear(8, 8), (4, 8), P("model")),
    "Conv": (lambda: nnx.Conv(8, 8, (3,)), (4, 4, 8), P(None, "data", "model")),
    "LinearGeneral": (lambda: nnx.LinearGeneral(8, (4, 2)), (4, 8), P("model", None, "data")),
}


@pytest.mark.parametrize("wrap", [WeightNorm, SpectralNorm])
@pytest.mark.parametrize("name", PLACES)
def test_a_kernel_that_is_sharded_along_explicit_axes(name, wrap):
    make, shape, of_kernel = PLACES[name]
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    with nnx.scope(0):
        alone = wrap(make()).train()
    placed = nnx.clone(alone, copy=True)
    x = jax.random.normal(jax.random.key(1), shape)

    @nnx.jit(static_argnums=2)
    def step(model, x, out_sharding):
        y = model(x, out_sharding=out_sharding)
        grads = nnx.grad(lambda m: jnp.mean(m(x, out_sharding=out_sharding) ** 2))(model)
        model["params"] = jax.tree.map(lambda w, g: w - 0.1 * g, model["params"], grads)
        return y

    def place(path, ref):
        if path[-2:] == ("layer_instance", "kernel"):
            return of_kernel
        return P("data") if path[0] == "scales" else P()

    expected = step(alone, x, None)
    rows = P("data", *[None] * (expected.ndim - 1))
    with jax.set_mesh(mesh):
        nnx.shard(placed, place)
        before = nnx.shardings(placed, place)
        y = step(placed, jax.device_put(x, P("data")), rows)
        placed(jax.device_put(x, P("data")), out_sharding=rows)
    alone(x)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for path, value in nnx.get_partition(placed).items():
        np.testing.assert_allclose(value, nnx.get_partition(alone)[path], atol=1e-5)
        assert value.sharding.is_equivalent_to(before[path], value.ndim)
