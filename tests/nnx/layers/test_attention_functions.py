"""Attention functions against NumPy in float64 and against flax.nnx; masks against flax.nnx."""

import flax.nnx as fnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnx.layers.attention_functions import dot_product_attention, dot_product_attention_weights
from nnx.layers.masks import (
    combine_masks,
    make_attention_mask,
    make_causal_mask,
    make_padding_mask,
    make_window_mask,
)
from tests.nnx.layers.test_layers import draw
from tests.nnx.layers.test_linear_general import close


def attention_of_numpy(q, k, v, mask=None, bias=0.0):
    """The definition, head by head, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[-2] // k.shape[-2]
    heads = []
    for h in range(q.shape[-2]):
        logits = q[..., h, :] @ np.swapaxes(k[..., h // group, :], -1, -2) / np.sqrt(q.shape[-1])
        logits = logits + (bias if np.isscalar(bias) else bias[..., h, :, :])
        if mask is not None:
            full = np.broadcast_to(mask, (*q.shape[:-3], q.shape[-2], *logits.shape[-2:]))
            logits = np.where(full[..., h, :, :], logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        heads.append(weights @ v[..., h // group, :])
    return np.stack(heads, -2)


@pytest.mark.parametrize(
    "batch, mask_shape, key_heads",
    [
        ((), (1, 5, 6), 2),
        ((2,), (2, 1, 1, 6), 4),
        ((2, 3), (5, 6), 1),
        ((2, 3), (2, 1, 4, 1, 6), 2),
    ],
)
def test_dot_product_attention_is_the_definition(batch, mask_shape, key_heads):
    q, k = draw(*batch, 5, 4, 8), draw(*batch, 6, key_heads, 8)
    v = jnp.asarray(np.cos(3 * np.asarray(k)))
    mask = np.random.default_rng(1).random(mask_shape) < 0.7
    mask[..., 0] = True
    bias = draw(*batch, 4, 5, 6)
    causal = np.tril(np.ones((5, 6), bool))

    @jax.jit
    def results(q, k, v, bias, mask):
        return (
            dot_product_attention(q, k, v, bias, mask),
            # The other code path, for dropout, a precision, or values of another size.
            dot_product_attention(q, k, v, bias, mask, precision="highest"),
            dot_product_attention(q, k, v, is_causal=True),
            dot_product_attention(q, k, v[..., :3], None, mask, is_causal=True),
            dot_product_attention_weights(q, k, bias, mask),
        )

    plain, other, first, both, weights = results(q, k, v, bias, mask)
    close(plain, attention_of_numpy(q, k, v, mask, np.float64(bias)))
    close(other, plain)
    close(first, attention_of_numpy(q, k, v, causal))
    close(both, attention_of_numpy(q, k, v[..., :3], mask & causal))
    assert weights.shape == (*batch, 4, 5, 6)
    close(np.asarray(weights).sum(-1), 1.0)


@pytest.mark.parametrize("broadcast", [True, False])
def test_dropout_of_weights_is_that_of_flax_and_scales(broadcast):
    q, k, v = draw(3, 2, 5, 4, 8)
    key = jax.random.key(3)
    options = {"dropout_rng": key, "dropout_rate": 0.4, "broadcast_dropout": broadcast}

    @jax.jit
    def results(q, k, v):
        return (
            dot_product_attention(q, k, v, **options),
            fnx.dot_product_attention(q, k, v, **options),
            dot_product_attention_weights(q, k, **options),
            dot_product_attention_weights(q, k),
            dot_product_attention(q, k, v, dropout_rate=0.4, deterministic=True),
            dot_product_attention(q, k, v),
            dot_product_attention(q, k, v, dropout_rate=1.0, dropout_rng=key),
        )

    ours, theirs, dropped, full, kept, plain, none = map(np.asarray, results(q, k, v))
    close(ours, theirs)
    where = dropped != 0
    close(dropped[where], full[where] / 0.6)
    assert (where == where[:1, :1]).all() == broadcast and 0.3 < where.mean() < 0.9
    close(kept, plain)
    assert (none == 0).all()


@pytest.mark.parametrize("precision", [None, "highest"])
def test_a_query_that_sees_no_key_gets_the_mean(precision):
    q, k, v = draw(3, 2, 5, 4, 8)
    y = jax.jit(lambda *a: dot_product_attention(*a, mask=jnp.zeros((5, 5)), precision=precision))(
        q, k, v
    )
    close(y, np.broadcast_to(np.asarray(v).mean(1, keepdims=True), y.shape))


def test_half_precision_has_a_softmax_in_single():
    q, k, v = draw(3, 2, 5, 4, 8).astype(jnp.bfloat16)

    @jax.jit
    def results(q, k, v):
        return dot_product_attention(q, k, v), dot_product_attention(q, k, v, precision="default")

    a, b = results(q, k, v)
    assert a.dtype == b.dtype == jnp.bfloat16
    close(a, b, atol=1e-2)
    close(a, attention_of_numpy(q, k, v), atol=2e-2)
    wide = jax.eval_shape(lambda q: dot_product_attention(q, q, q, dtype=jnp.float32), q)
    assert wide.dtype == jnp.float32


def test_masks_are_those_of_flax():
    x, y = draw(2, 4) > 0, draw(2, 6) > 0
    for extra in (0, 2):
        for dtype in (jnp.float32, jnp.bool_):
            options = {"extra_batch_dims": extra, "dtype": dtype}
            pairs = [
                (make_attention_mask(x, y, **options), fnx.make_attention_mask(x, y, **options)),
                (make_causal_mask(x, **options), fnx.make_causal_mask(x, **options)),
            ]
            for ours, theirs in pairs:
                assert ours.dtype == theirs.dtype
                np.testing.assert_array_equal(ours, theirs)
    a, b = make_causal_mask(x), make_attention_mask(x, x, jnp.logical_or)
    np.testing.assert_array_equal(combine_masks(a, None, b), fnx.combine_masks(a, None, b))
    assert combine_masks(None) is None and combine_masks(a, dtype=bool).dtype == bool
    np.testing.assert_array_equal(make_window_mask(x, 100), make_causal_mask(x))
    window = make_window_mask(jnp.ones(6), 2, 1, dtype=bool)[0]
    i, j = np.indices((6, 6))
    np.testing.assert_array_equal(window, (i - j <= 2) & (j - i <= 1))
    padding = make_padding_mask(jnp.array([[2, 0], [3, 9]]), 4, extra_batch_dims=1)
    assert padding.shape == (1, 2, 2, 1, 1, 4)
    assert padding[0, :, :, 0, 0].sum(-1).tolist() == [[2, 0], [3, 4]]
