"""The five architectures: experts token by token, decoding, shapes and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from tests.examples import example, softmax

architectures = example("architectures")


def test_experts_take_what_is_sent_to_them_and_pass_the_rest_on():
    layer = architectures.Experts.init(0)(6, 3, room=1.0)
    x = jax.random.normal(jax.random.key(1), (2, 6, 6))
    y, sown = nnx.capture(layer, None)(x)
    tokens = np.asarray(x).reshape(-1, 6)
    chances = softmax(np.asarray(layer.router(tokens)))
    taken, expected = [0, 0, 0], np.zeros((12, 6))
    for t, row in enumerate(chances):
        e = int(row.argmax())
        if taken[e] < 4:
            w = [np.asarray(p.kernel[e]) for p in layer.experts.layers]
            b = [np.asarray(p.bias[e]) for p in layer.experts.layers]
            h = np.maximum(tokens[t] @ w[0] + b[0], 0) @ w[1] + b[1]
            expected[t] = row[e] * h
        taken[e] += 1
    assert max(taken) > 4  # some come too late
    np.testing.assert_allclose(y.reshape(12, 6), expected, atol=1e-5)
    share = np.array(taken) / 12
    np.testing.assert_allclose(sown["balance"], 3 * (share * chances.mean(0)).sum(), rtol=1e-5)


def test_translating_with_a_cache_equals_the_whole_model():
    model = architectures.Seq2Seq.init(0)(7, features=8, heads=2)
    tokens = np.random.default_rng(0).integers(1, 7, (3, 5))
    written = architectures.translate(model, tokens, 5)
    logits = nnx.jit(lambda m, *x: m(*x))(model, tokens, written)
    np.testing.assert_array_equal(logits.argmax(-1), written)
    assert not any("cache" in path for path in nnx.refs(model))


@pytest.mark.parametrize("name", ["ResNet", "ViT", "MoE", "UNet"])
def test_images_go_in_and_every_parameter_has_a_gradient(name):
    model = getattr(architectures, name).init(0)()
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))

    def loss(model):
        y = model(x)
        return jnp.sin(y).sum(), y

    grads, y = nnx.jit(nnx.grad(loss, has_aux=True))(model.train())
    assert y.shape == ((4, 8, 8, 1) if name == "UNet" else (4, 10))
    without = [path for path, g in grads.items() if not g.any()]
    # Softmax ignores what is added to every key.
    assert all(path[-2:] == ("key", "bias") for path in without), without
