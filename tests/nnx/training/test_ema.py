"""The moving average against NumPy in float64 and against optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnx
from nnx.training.ema import EMA, EMAError
from tests.models import Dense, Net


def walk(model, n=5):
    """Values of a model over time."""
    rng = np.random.default_rng(0)
    for _ in range(n):
        yield jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), model["params"]
        )


@pytest.mark.parametrize("jitted", [True, False])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("decay", [0.9, lambda step: jnp.minimum(0.9, (1 + step) / (10 + step))])
def test_values(jitted, debias, decay):
    model = Net()
    ema = EMA(model, decay, debias=debias)
    expected = {p: np.asarray(v, np.float64) for p, v in model["params"].items()}
    for path, value in ema.values.items():
        np.testing.assert_array_equal(value, model["params"][path])
    weight = 0.0 if debias else 1.0
    if debias:
        expected = {p: 0 * v for p, v in expected.items()}
    update = nnx.jit(lambda ema, model: ema.update(model)) if jitted else EMA.update
    for i, values in enumerate(walk(model)):
        model["params"] = values
        update(ema, model)
        d = float(decay(i)) if callable(decay) else decay
        expected = {p: d * e + (1 - d) * np.asarray(values[p]) for p, e in expected.items()}
        weight = d * weight + (1 - d)
    assert list(ema.values) == list(model["params"]) and int(ema.step) == 5
    for path, value in ema.values.items():
        np.testing.assert_allclose(value, expected[path] / weight, rtol=1e-5, atol=1e-6)
    if jitted:
        assert update._compiled._cache_size() == 1


def test_debiased_values_are_those_of_optax():
    model = Net()
    ema, tx = EMA(model, 0.95, debias=True), optax.ema(0.95)
    state = tx.init(model["params"])
    for values in walk(model, 3):
        model["params"] = values
        ema.update(model)
        average, state = tx.update(values, state)
    for path, value in ema.values.items():
        np.testing.assert_allclose(value, average[path], rtol=1e-5, atol=1e-6)


def test_half_precision_is_averaged_in_float32():
    model = nnx.Linear.init(0)(2, 2, param_dtype=jnp.bfloat16)
    ema = EMA(model, 0.999)
    for _ in range(10):
        model["params"] = jax.tree.map(jnp.ones_like, model["params"])
        ema.update(model)
    assert ema.values["bias"].dtype == jnp.float32
    np.testing.assert_allclose(ema.values["bias"], 1 - 0.999**10, rtol=1e-3)
    ema.apply_to(model)
    assert model.bias.dtype == jnp.bfloat16


def test_values_other_than_floats_are_the_latest():
    class Both(nnx.Module):
        def __init__(self):
            self.w = nnx.Ref(jnp.zeros(2), "params")
            self.n = nnx.Ref(jnp.array(0), "counters")
            self.z = nnx.Ref(jnp.zeros(2, jnp.complex64), "params")
            self.key = nnx.Ref(jax.random.key(0), "rngs")

    model = Both()
    ema = EMA(model, 0.5, filter=...)
    model.w.value, model.n.value, model.z.value = jnp.ones(2), jnp.array(7), jnp.full(2, 2j)
    model.key.value = jax.random.key(3)
    nnx.jit(lambda e, m: e.update(m))(ema, model)
    assert ema.values["w"].tolist() == [0.5, 0.5] and int(ema.values["n"]) == 7
    assert ema.values["z"].tolist() == [1j, 1j]
    assert ema.values["key"] == jax.random.key(3)


def test_swapped_gives_the_model_its_values_back():
    model = Net()
    ema = EMA(model, 0.5)
    model["params"] = jax.tree.map(lambda x: x + 1, model["params"])
    own = model["params"]
    ema.update(model)
    x = jnp.ones((1, 2))
    y = model(x)
    with ema.swapped(model) as same:
        assert same is model
        for path, value in model["params"].items():
            np.testing.assert_array_equal(value, ema.values[path])
        assert not jnp.allclose(model(x), y)
    with pytest.raises(ZeroDivisionError), ema.swapped(model):
        raise ZeroDivisionError
    assert all(model["params"][path] is value for path, value in own.items())

    @nnx.jit
    def evaluate(model, ema):
        with ema.swapped(model):
            return model(x)

    other = nnx.clone(model)
    ema.apply_to(other)
    np.testing.assert_allclose(evaluate(model, ema), other(x), rtol=1e-6)
    assert all((model["params"][path] == value).all() for path, value in own.items())


def test_donation_does_not_delete_the_average():
    model = Net()
    ema = EMA(model, 0.5)
    step = nnx.jit(lambda m: m.__setitem__("params", jax.tree.map(lambda x: x + 1, m["params"])),
                   donate=True)  # fmt: skip
    step(model)
    ema.update(model)
    ema.apply_to(model)
    step(model)
    with ema.swapped(model):
        step(model)
    assert np.isfinite(ema.values["blocks.0.w"]).all()


def test_by_filter_with_paths_metadata_and_sharing():
    model = nnx.Linear.init(0)(2, 2, kernel_metadata={"sharding": ("a", "b")})
    ema = EMA(model, 0.5, filter=nnx.PathContains("kernel"))
    assert list(nnx.refs(ema)) == [("step",), ("weight",), ("average", "kernel")]
    assert nnx.refs(ema)["average", "kernel"].metadata["sharding"] == ("a", "b")
    assert {ref.collection for ref in nnx.refs(ema).values()} == {"ema"}
    assert len(EMA(Net(), 0.5).values) == 4
    bare = nnx.Ref(jnp.array(2.0), "params")
    assert float(EMA(bare, 0.5).values[()]) == 2


def test_mistakes():
    model = Net()
    ema = EMA(model, 0.5)
    with pytest.raises(ValueError, match="between 0 and 1, but got 1.5"):
        EMA(model, 1.5)
    with pytest.raises(EMAError, match="nothing to average: the filter 'ema' selects no Ref"):
        EMA(model, 0.5, filter="ema")
    other = Dense()
    for call in (ema.update, ema.apply_to, lambda m: ema.swapped(m).__enter__()):
        with pytest.raises(EMAError, match="its values lack 'blocks.0.w'.*they have 'w', 'b'"):
            call(other)
    before = {**ema["ema"]}
    model.blocks[1] = Dense(2, 3)
    with pytest.raises(EMAError, match=r"at 'blocks.1.w' has shape \(2, 3\), not \(2, 2\)"):
        ema.update(model)
    assert all(ema["ema"][path] is value for path, value in before.items())
    half = nnx.Linear.init(0)(2, 2, param_dtype=jnp.float16)
    ema = EMA(half, 0.5)
    ema.update(half)
    half.bias = nnx.Ref(jnp.zeros(2, int), "params")
    with pytest.raises(EMAError, match="at 'bias' has dtype int32, not float32"):
        ema.update(half)


def test_keys_and_python_numbers():
    class Model(nnx.Module):
        scale: float = nnx.param(default=2.0)

        def __init__(self):
            self.key = nnx.Ref(jax.random.key(0), "rngs")
            self.count = nnx.Ref(3, "counters")

    model = Model()
    ema = nnx.EMA(model, 0.5, filter=...)
    ema.update(model)
    ema.apply_to(model)
    assert model.scale == 2 and model.count.value == 3
    assert (jax.random.key_data(model.key.value) == jax.random.key_data(jax.random.key(0))).all()


def test_values_of_numpy_in_double_precision():
    class Model(nnx.Module):
        w: jax.Array = nnx.param()

    model = Model()
    model.w = np.ones(2)  # pyright: ignore[reportAttributeAccessIssue]
    ema = EMA(model, 0.5)
    ema.update(model)
    model.w = jnp.full(2, 3.0)
    ema.update(model)
    assert ema.values["w"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("left", [1e-6, 1e-3, 0.3, 1.0, 0.0])
def test_a_decay_near_one_is_not_rounded(left):
    """`1 - decay` in float32 would be off by 1.3 %, and the sum of both would not be 1."""
    model = Dense()
    model["params"] = jax.tree.map(jnp.zeros_like, model["params"])
    for debias in (False, True):
        ema = EMA(model, 1 - left, debias=debias)
        update = nnx.jit(lambda ema, m: ema.update(m))
        ones = nnx.clone(model)
        ones["params"] = jax.tree.map(jnp.ones_like, model["params"])
        expected = 0.0
        for _ in range(5):
            update(ema, ones)
            expected += (1 - expected) * left
        found = ema.values["b"] if not debias or not left else ema.values["b"] * ema.weight
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    # A value that does not change stays as it is.
    still = EMA(ones, 1 - left)
    nnx.fori_loop(0, 1000, lambda i, c: (still.update(ones), c)[1], 0)
    assert (still.values["b"] == 1).all()


def test_a_jump_of_many_orders_is_taken_exactly():
    model = Dense()
    model["params"] = jax.tree.map(lambda w: jnp.full_like(w, 1e8), model["params"])
    ema = EMA(model, 0.0)
    model["params"] = jax.tree.map(jnp.ones_like, model["params"])
    ema.update(model)
    assert (ema.values["b"] == 1).all()
