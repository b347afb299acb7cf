"""MLP, GroupNorm with the channels anywhere, and Bidirectional from the end, against NumPy and flips."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx


@pytest.mark.parametrize("hidden, sizes", [(5, [3, 5, 2]), ([5, 4], [3, 5, 4, 2]), ([], [3, 2])])
def test_an_mlp_is_products_and_activations(hidden, sizes):
    mlp = nnx.MLP.init(jax.random.key(0))(
        3,
        hidden,
        2,
        activation=jnp.tanh,
        final_activation=jnp.abs,
        bias_init=jax.nn.initializers.normal(),
    )
    y = x = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    assert [layer.kernel.shape for layer in mlp.layers] == list(
        zip(sizes[:-1], sizes[1:], strict=True)
    )
    for layer in mlp.layers[:-1]:
        y = np.tanh(y @ np.asarray(layer.kernel) + np.asarray(layer.bias))
    y = np.abs(y @ np.asarray(mlp.layers[-1].kernel) + np.asarray(mlp.layers[-1].bias))
    np.testing.assert_allclose(mlp(x), y, atol=1e-5)


def test_the_defaults_of_an_mlp():
    mlp = nnx.MLP.init(jax.random.key(0))(3, 4)
    x = jnp.ones((2, 3))
    y = np.maximum(np.ones((2, 3)) @ np.asarray(mlp.layers[0].kernel), 0) @ np.asarray(
        mlp.layers[1].kernel
    )
    np.testing.assert_allclose(mlp(x), y, atol=1e-5)


@pytest.mark.parametrize("axis", [1, 2, -1])
@pytest.mark.parametrize("masked", [False, True])
def test_group_norm_has_its_channels_anywhere(axis, masked):
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 6)).astype("float32")
    mask = np.random.default_rng(1).random((6, 6, 6)) < 0.7 if masked else None
    norm = nnx.GroupNorm.init(jax.random.key(0))(
        6,
        3,
        feature_axis=axis,
        scale_init=jax.nn.initializers.normal(),
        bias_init=jax.nn.initializers.normal(),
    )
    ours = norm(x, mask=mask)
    params = {"scale": np.asarray(norm.scale), "bias": np.asarray(norm.bias)}
    if masked:
        mask = np.moveaxis(np.broadcast_to(mask, x.shape), axis, -1)
    flax = nn.GroupNorm(3, epsilon=norm.epsilon).apply(
        {"params": params}, np.moveaxis(x, axis, -1), mask=mask
    )
    np.testing.assert_allclose(np.moveaxis(np.asarray(ours), axis, -1), flax, atol=1e-5)


def test_group_norm_says_which_axis_must_be_reduced():
    norm = nnx.GroupNorm.init(jax.random.key(0))(6, 3, feature_axis=1, reduction_axes=(2,))
    with pytest.raises(ValueError, match="but they must include axis 1, which has the channels"):
        norm(jnp.ones((2, 6, 4)))


@pytest.mark.parametrize("lengths", [None, (4, 2)])
def test_bidirectional_from_the_end(lengths):
    with nnx.scope(jax.random.key(0)):
        both = nnx.Bidirectional(nnx.RNN(nnx.SimpleCell(3, 2)), nnx.RNN(nnx.SimpleCell(3, 2)))
    x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype("float32")
    given = None if lengths is None else jnp.array(lengths)

    def flipped(a):
        a = np.array(a)
        for row, n in zip(a, lengths or (4, 4), strict=True):
            row[:n] = row[:n][::-1].copy()
        return a

    valid = np.arange(4) < np.array(lengths or (4, 4))[:, None]
    expected = np.asarray(both(flipped(x), seq_lengths=given))
    ours = np.asarray(both(x, seq_lengths=given, reverse=True))
    kept = np.asarray(both(x, seq_lengths=given, reverse=True, keep_order=True))
    np.testing.assert_allclose(ours[valid], expected[valid], atol=1e-6)
    np.testing.assert_allclose(kept[valid], flipped(expected)[valid], atol=1e-6)
    assert not np.allclose(kept, ours)


@pytest.mark.parametrize("lengths", [None, (4, 2)])
def test_bidirectional_from_the_end_with_time_first(lengths):
    with nnx.scope(jax.random.key(0)):
        both = nnx.Bidirectional(nnx.RNN(nnx.GRUCell(3, 2)), nnx.RNN(nnx.GRUCell(3, 2)))
    first = nnx.Bidirectional(both.forward_rnn, both.backward_rnn, time_major=True, reverse=True)
    x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype("float32")
    given = None if lengths is None else jnp.array(lengths)
    valid = (np.arange(4) < np.array(lengths or (4, 4))[:, None]).T
    for keep in (False, True):
        options = {"seq_lengths": given, "keep_order": keep, "return_carry": True}
        carry, y = both(x, reverse=True, **options)
        carry_first, z = first(x.swapaxes(0, 1), **options)
        assert z.shape == (4, 2, 4)
        np.testing.assert_allclose(z[valid], y.swapaxes(0, 1)[valid], atol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), carry_first, carry)
        # The call overrides the attribute.
        again = first(x, time_major=False, reverse=True, **options)[1]
        np.testing.assert_allclose(again, y, atol=1e-6)


def test_dropout_between_the_layers_of_an_mlp():
    mlp = nnx.MLP.init(0)(64, [256, 128], 8, dropout_rate=0.25)
    x = jnp.ones((16, 64))
    plain = nnx.MLP.init(0)(64, [256, 128], 8)
    mlp.eval()
    np.testing.assert_array_equal(mlp(x), plain(x))
    mlp.train()
    with nnx.scope(1):
        y, captured = nnx.capture(mlp, "dropout")(x)
        assert not np.array_equal(y, mlp(x))  # each call draws new numbers
    with nnx.scope(1):
        np.testing.assert_array_equal(mlp(x), y)  # and the same key draws the same
    # A hidden unit in four is dropped, after each hidden layer and nowhere else; the rest is scaled.
    hidden = np.maximum(np.asarray(mlp.layers[0](x)), 0)
    outputs = jax.tree.leaves(captured)
    assert len(outputs) == 2
    first = np.asarray(outputs[0])
    positive = hidden > 0
    dropped = (first == 0)[positive].mean()
    assert 0.2 < dropped < 0.3
    np.testing.assert_allclose(
        first[positive & (first != 0)], hidden[positive & (first != 0)] / 0.75, rtol=1e-6
    )
    second = np.maximum(np.asarray(mlp.layers[1](first)), 0)
    kept = np.asarray(outputs[1])
    np.testing.assert_allclose(kept[kept != 0], second[kept != 0] / 0.75, rtol=1e-4)
    np.testing.assert_allclose(mlp.layers[2](kept), y, rtol=1e-5, atol=1e-6)
    with pytest.raises(nnx.MissingStreamError, match="'dropout'"):
        mlp(x)
