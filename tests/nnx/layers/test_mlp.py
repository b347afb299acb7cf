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
    with pytest.raises(ValueError, match="but axis 1, the channels, must be one of them"):
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
