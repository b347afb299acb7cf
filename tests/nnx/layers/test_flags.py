"""The flags of layers: the call, then the scope's own flag, then `training`, then the attribute."""

import jax.numpy as jnp
import pytest

import nnx

X = jnp.linspace(-1.0, 2.0, 32).reshape(8, 4)
SEQUENCE = X.reshape(2, 4, 4)


def drops(layer, x, **call):
    """Whether a layer gives another result for another key."""
    with nnx.scope(0):
        a, b = layer(x, **call), layer(x, **call)
    return not jnp.allclose(a, b)


def writes(layer, x, **call):
    """Whether a layer writes its statistics."""
    before = nnx.clone(layer)["batch_stats"]
    layer(x, **call)
    after = layer["batch_stats"]
    return any(not jnp.array_equal(before[path], after[path]) for path in before)


class DropoutCell(nnx.RNNCellBase):
    num_feature_axes = 1

    def __init__(self):
        self.cell, self.dropout = nnx.SimpleCell(4, 3), nnx.Dropout(0.5)

    def initialize_carry(self, input_shape, carry_init=None):
        return self.cell.initialize_carry(input_shape)

    def __call__(self, carry, inputs):
        return self.cell(carry, self.dropout(inputs))


TRAINS = {
    "Dropout": (lambda: nnx.Dropout(0.5), X, drops, "deterministic"),
    "MultiHeadAttention": (
        lambda: nnx.MultiHeadAttention(2, 4, dropout_rate=0.5), SEQUENCE, drops, "deterministic",
    ),
    "BatchNorm": (lambda: nnx.BatchNorm(4), X, writes, "use_running_average"),
    "SpectralNorm": (
        lambda: nnx.SpectralNorm(nnx.Linear(4, 3)), X, writes, "use_running_average",
    ),
    "RNN": (lambda: nnx.RNN(DropoutCell()), SEQUENCE, drops, "deterministic"),
    "Stack": (
        lambda: nnx.Stack(lambda: nnx.Sequential(nnx.Linear(4, 4), nnx.Dropout(0.5)), 2),
        X, drops, "deterministic",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINS)
def test_the_scope_flag_training_is_heeded(name):
    make, x, trains, flag = TRAINS[name]
    with nnx.scope(0):
        layer = make()
    assert trains(layer, x), "layers train from the start"
    with nnx.scope(0, training=False):
        assert not trains(layer, x)
        # The flag with the specific name wins.
        with nnx.scope(**{flag: False}):
            assert trains(layer, x)
    layer.eval()
    assert not trains(layer, x)
    with nnx.scope(0, training=True):
        assert trains(layer, x)
        with nnx.scope(**{flag: True}):
            assert not trains(layer, x)
    # None is like no flag at all.
    with nnx.scope(training=None, **{flag: None}):
        assert not trains(layer, x) and trains(layer.train(), x)


def test_apply_takes_it_as_well_and_the_argument_of_the_call_wins():
    drop, norm = nnx.Dropout(0.5), nnx.BatchNorm(4)
    ones = jnp.ones(100)
    assert jnp.array_equal(drop.apply(rngs=0, training=False)(ones), ones)
    assert (drop.apply(rngs=0, training=True)(ones) == 0).any()
    norm.apply(training=False)(X)
    assert (norm.mean == 0).all()
    norm.apply(training=True)(X)
    assert (norm.mean != 0).all()
    with nnx.scope(training=False, deterministic=True, use_running_average=True):
        assert drops(drop, X, deterministic=False)
        assert writes(norm, X, use_running_average=False)
        attention = nnx.MultiHeadAttention.init(0)(2, 4, dropout_rate=0.5)
        assert drops(attention, SEQUENCE, deterministic=False)
        with nnx.scope(0):
            spectral = nnx.SpectralNorm(nnx.Linear(4, 3))
        assert writes(spectral, X, update_stats=True) and not writes(spectral, X)


def test_it_crosses_the_boundary_of_jit():
    norm = nnx.BatchNorm(4)
    step = nnx.jit(lambda m, x: m(x))
    with nnx.scope(training=False):
        step(norm, X)
    assert (norm.mean == 0).all()
    with nnx.scope(training=True):
        step(norm, X)
    assert (norm.mean != 0).all()


@pytest.mark.parametrize(
    ("make", "x", "flag"),
    [
        (lambda: nnx.Dropout(0.5, deterministic=None), X, "deterministic"),
        (lambda: nnx.BatchNorm(4, use_running_average=None), X, "use_running_average"),
        (
            lambda: nnx.MultiHeadAttention(2, 4, dropout_rate=0.5, deterministic=None),
            SEQUENCE,
            "deterministic",
        ),
    ],
)
def test_where_nothing_says_it_the_error_names_all_ways_to(make, x, flag):
    with nnx.scope(0):
        layer = make()
    name = type(layer).__name__
    message = rf"{name} does not know .*'{flag}' is None, .*model\.train\(\) or model\.eval\(\)"
    with pytest.raises(nnx.MissingFlagError, match=message + r".*nnx\.scope\(training=\.\.\.\)"):
        layer(x)
    layer.apply(rngs=0, training=True)(x)
    layer.eval()(x)
