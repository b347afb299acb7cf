"""Embed against flax.nnx; rotary embedding and sinusoids against float64."""

import flax.nnx as fnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx.layers.embedding import Embed
from nnx.layers.positions import RotaryEmbedding, apply_rotary, sinusoidal_positions
from tests.nnx.layers.test_layers import draw, from_flax
from tests.nnx.layers.test_linear_general import same_arguments


def pair(*args, **options):
    theirs = fnx.Embed(*args, rngs=fnx.Rngs(0), **options)
    return from_flax(Embed.init(1)(*args, **options), theirs), theirs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": jnp.bfloat16},
        {"param_dtype": jnp.bfloat16},
        {"dtype": jnp.float32, "param_dtype": jnp.float16},
    ],
)
def test_embed(options):
    index = jnp.array([[0, 1, 1], [-1, 4, -5]])
    ours, theirs = pair(5, 3, **options)
    assert ours.embedding.dtype == options.get("param_dtype", jnp.float32)
    assert ours(index).dtype == theirs(index).dtype == ours.dtype
    np.testing.assert_array_equal(ours(index), theirs(index))

    query = draw(2, 4, 3)

    def loss(m):
        x = m(index)
        logits, own = m.attend(query), m.attend(x + 1)
        return sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in (x, own, logits)), logits

    grads, a = nnx.jit(nnx.grad(loss, has_aux=True))(ours)
    expected, b = fnx.jit(fnx.grad(loss, has_aux=True))(theirs)
    assert a.dtype == b.dtype
    tolerance = 1e-5 if a.dtype == ours.embedding.dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(np.float32(a), np.float32(b), atol=tolerance)
    np.testing.assert_allclose(
        np.float32(grads["embedding"]), np.float32(expected["embedding"][...]), atol=tolerance * 4
    )


def test_the_arguments_are_those_of_flax():
    same_arguments(fnx.Embed, Embed)


def test_an_index_out_of_range_is_nan_and_trains_nothing():
    ours, theirs = pair(5, 3)
    index = jnp.array([0, 5, -6, 100])
    y = nnx.jit(ours)(index)
    np.testing.assert_array_equal(y, theirs(index))
    assert jnp.isnan(y[1:]).all() and jnp.isfinite(y[0]).all()
    grads = nnx.grad(lambda m: jnp.nansum(m(index)))(ours)["embedding"]
    np.testing.assert_array_equal(grads[1:], jnp.zeros((4, 3)))


def test_one_row_serves_every_index():
    ours, theirs = pair(1, 3)
    index = jnp.array([[0, 7]])
    np.testing.assert_array_equal(ours(index), theirs(index))
    assert (ours(index) == ours.embedding).all()


def test_embed_tied_to_another_layer_initial_values_and_metadata():
    embed = Embed.init(0)(1000, 64, embedding_metadata={"axes": ("vocab", None)})
    assert nnx.get_ref(embed, "embedding").metadata["axes"] == ("vocab", None)
    assert abs(float(embed.embedding.std()) - 64**-0.5) < 0.003
    other = Embed.init(1)(1000, 64)
    other.embedding = nnx.get_ref(embed, "embedding")
    model = nnx.Sequential(embed, other.attend)
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.array([3])) ** 2))(model)
    assert len(grads) == 1
    const = Embed.init(0)(4, 2, embedding_init=nnx.initializers.ones)
    assert (const(np.array([1, 2], np.uint8)) == 1).all() and const(2).shape == (2,)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: Embed(5, 3)(jnp.ones((2, 4))),
            r"Embed\(5, 3\) looks up integers, .* float32 and shape \(2, 4\)\. Cast it",
        ),
        (lambda: Embed(5, 3)(jnp.array([True])), "of dtype bool"),
        (
            lambda: Embed(5, 3).attend(jnp.ones((2, 4))),
            r"Embed expects a query of shape \(\.\.\., 3\), but got \(2, 4\)",
        ),
        (lambda: sinusoidal_positions(4, 3), "even number of features, but got 3"),
        (lambda: RotaryEmbedding(5), "from 2 to all 5, but got 5. Set rotary_features"),
        (lambda: RotaryEmbedding(4, rotary_features=6), "from 2 to all 4, but got 6"),
        (
            lambda: RotaryEmbedding(4)(jnp.ones((2, 3, 6))),
            r"RotaryEmbedding expects queries or keys of shape \(\.\.\., length, heads, 4\), but "
            r"got \(2, 3, 6\)",
        ),
        (
            lambda: RotaryEmbedding(4)(jnp.ones((7, 5, 3, 4)), jnp.arange(6)),
            r"broadcast to \(7, 5\), .* \(7, 5, 3, 4\), but they have shape \(6,\)",
        ),
        (
            lambda: apply_rotary(jnp.ones((5, 3, 4)), jnp.ones((2, 5))),
            r"broadcast to \(5,\), .* but they have shape \(2, 5\)",
        ),
    ],
)
def test_mistakes_raise_errors_that_say_what_is_wrong(make, message):
    with nnx.scope(0), pytest.raises(ValueError, match=message):
        make()


def test_sinusoids_are_those_of_the_paper():
    table = np.asarray(sinusoidal_positions(50, 8))
    for p in (0, 1, 49):
        for i in range(4):
            angle = p / 10000 ** (2 * i / 8)
            np.testing.assert_allclose(
                table[p, 2 * i : 2 * i + 2], [np.sin(angle), np.cos(angle)], atol=1e-6
            )
    halves = sinusoidal_positions(50, 8, interleaved=False)
    np.testing.assert_array_equal(halves, np.hstack([table[:, 0::2], table[:, 1::2]]))
    other = sinusoidal_positions(3, 4, base=100.0, dtype=jnp.bfloat16)
    assert other.dtype == jnp.bfloat16 and abs(float(other[1, 2]) - np.sin(0.1)) < 1e-3


def rotated(x, positions, base, features, interleaved):
    """Each pair as a complex number, times e^(i angle), in float64."""
    x = np.array(x, np.float64)
    part = x[..., :features]
    half = features // 2
    a, b = (
        (part[..., ::2], part[..., 1::2]) if interleaved else (part[..., :half], part[..., half:])
    )
    frequencies = base ** (-2 * np.arange(half) / features)
    turned = (a + 1j * b) * np.exp(1j * np.asarray(positions)[..., None, None] * frequencies)
    if interleaved:
        part[..., ::2], part[..., 1::2] = turned.real, turned.imag
    else:
        part[..., :half], part[..., half:] = turned.real, turned.imag
    return x


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "features, base, positions",
    [
        (8, 10000.0, np.arange(6)),
        (4, 500000.0, np.arange(12).reshape(2, 6) * 100),
        (2, 100.0, np.array([7])),
    ],
)
def test_rotary_is_a_product_of_complex_numbers(interleaved, features, base, positions):
    x = draw(2, 6, 3, 8)
    options = {"base": base, "rotary_features": features, "interleaved": interleaved}
    y, grad = jax.jit(
        lambda x: (
            apply_rotary(x, positions, **options),
            jax.grad(lambda x: jnp.sum(apply_rotary(x, positions, **options) ** 2))(x),
        )
    )(x)
    expected = rotated(x, positions, base, features, interleaved)
    np.testing.assert_allclose(y, expected, atol=2e-4)
    np.testing.assert_array_equal(np.asarray(y)[..., features:], np.asarray(x)[..., features:])
    module = RotaryEmbedding(8, **options)
    np.testing.assert_allclose(nnx.jit(module)(x, positions), y, atol=1e-5)
    # Rotations keep the length, so the gradient of the length is that of the input's length.
    np.testing.assert_allclose(grad, 2 * x, atol=1e-4)


def test_rotary_depends_on_distances_only():
    q, k = draw(2, 1, 1, 16)
    rotary = RotaryEmbedding(16)

    def product(i, j):
        return jnp.sum(rotary(q[None], jnp.array([i])) * rotary(k[None], jnp.array([j])))

    np.testing.assert_allclose(product(3, 1), product(103, 101), atol=1e-4)
    assert abs(float(product(3, 1) - product(3, 2))) > 1e-3


def test_rotary_in_half_precision_rotates_in_single():
    x = draw(4, 2, 8, dtype=jnp.bfloat16)
    positions = jnp.array([0, 1, 257, 1025])  # bfloat16 has no such integers
    y = RotaryEmbedding(8)(x, positions)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.float64(y), rotated(x, positions, 10000.0, 8, False), atol=1e-2, rtol=1e-2
    )
    assert (RotaryEmbedding(8)(x)[0] == x[0]).all() and nnx.refs(RotaryEmbedding(8)) == {}
