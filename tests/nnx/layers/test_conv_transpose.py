"""Transposed convolutions against flax.nnx, and against the transpose of a convolution."""

import flax.nnx as fnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx.layers.conv_transpose import ConvTranspose
from tests.nnx.layers.test_layer_norm import cheap, compare
from tests.nnx.layers.test_layers import draw

CASES = [
    ((5,), {"kernel_size": 3}),
    ((5, 4), {"kernel_size": (4, 3), "padding": "CIRCULAR", "strides": (1, 2)}),
    ((5, 4), {"kernel_size": (4, 4), "padding": "CIRCULAR", "transpose_kernel": True}),
    ((5,), {"kernel_size": 12, "padding": "CIRCULAR", "strides": 2}),
    ((5,), {"kernel_size": 3, "padding": 1, "strides": 2, "dtype": jnp.bfloat16}),
    ((5, 4), {"kernel_size": (2, 3), "padding": ((1, 2), 1), "transpose_kernel": True}),
    ((5,), {"kernel_size": 4, "kernel_dilation": 2, "strides": 2, "use_bias": False}),
    ((5,), {"kernel_size": 3, "mask": jnp.tril(jnp.ones((3, 2, 3)))}),
]


@pytest.mark.parametrize("space, options", CASES)
def test_conv_transpose(space, options):
    theirs = fnx.ConvTranspose(2, 3, rngs=fnx.Rngs(0), kernel_init=cheap, **options)
    ours = ConvTranspose(2, 3, kernel_init=nnx.initializers.zeros, **options)
    compare(ours, theirs, draw(2, *space, 2))


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_other_batches(batch):
    layer = ConvTranspose.init(0)(2, 3, 3, strides=2, kernel_init=cheap)
    x = draw(*batch, 5, 2)
    expected = layer(x.reshape(-1, 5, 2)).reshape(*batch, 10, 3)
    np.testing.assert_allclose(nnx.jit(layer)(x), expected, atol=1e-5)


@pytest.mark.parametrize("size, strides, padding", [((3, 3), 2, "VALID"), ((3, 5), 1, "CIRCULAR")])
def test_it_is_the_transpose_of_a_convolution(size, strides, padding):
    options = {"strides": strides, "padding": padding, "use_bias": False, "kernel_init": cheap}
    conv = nnx.Conv.init(0)(3, 2, size, **options)
    layer = ConvTranspose.init(0)(2, 3, size, transpose_kernel=True, **options)
    layer.kernel = nnx.get_ref(conv, "kernel")
    x = draw(1, 5, 7, 3)

    def both(conv, layer, x):
        y, pull = jax.vjp(lambda x: conv(x), x)
        return layer(y), pull(y)[0]

    y, z = nnx.jit(both)(conv, layer, x)
    np.testing.assert_allclose(y, z, atol=1e-5)


def test_causal_padding_looks_only_back():
    layer = ConvTranspose.init(0)(
        1, 1, 3, strides=2, padding="CAUSAL", kernel_dilation=2, kernel_init=cheap
    )
    x = draw(4, 1)
    jacobian = nnx.jit(jax.jacobian(lambda x: layer(x)))(x)[:, 0, :, 0]
    assert jacobian.shape == (8, 4)
    for t in range(8):
        for s in range(4):
            step, rest = divmod(t - 2 * s, 2)
            expected = layer.kernel[2 - step, 0, 0] if rest == 0 and 0 <= step < 3 else 0.0
            np.testing.assert_allclose(jacobian[t, s], expected, atol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: ConvTranspose(4, 6, (3, 3), kernel_init=nnx.initializers.zeros)(
                jnp.ones((2, 8, 8, 3))
            ),
            r"ConvTranspose expects .*\*, \*, 4\), but got \(2, 8, 8, 3\)",
        ),
        (
            lambda: ConvTranspose(4, 6, (3, 3), kernel_init=nnx.initializers.zeros)(
                jnp.ones((8, 4))
            ),
            r"but got \(8, 4\)",
        ),
        (
            lambda: ConvTranspose(3, 6, 3, mask=jnp.ones((3, 6))),
            r"shape of the kernel, \(3, 3, 6\), but has \(3, 6\)",
        ),
        (
            lambda: ConvTranspose(3, 6, (3, 3), padding="CAUSAL"),
            "one spatial axis.*ConvTranspose has 2",
        ),
        (
            lambda: ConvTranspose(3, 6, 3, padding="REFLECT"),
            "ConvTranspose has no padding 'REFLECT'",
        ),
        (
            lambda: ConvTranspose(3, 6, (3, 3), strides=(1, 1, 1)),
            r"ConvTranspose has a kernel of 2 .* 3 sizes for strides: \(1, 1, 1\)",
        ),
        (
            lambda: ConvTranspose(3, 6, (3, 3), kernel_dilation=(2,)),
            "2 spatial axes, but got 1 sizes for kernel_dilation",
        ),
        (lambda: ConvTranspose(3, 6, (3, 3), padding=(1,)), "2 spatial axes, but got 1 paddings"),
    ],
)
def test_mistakes_raise_errors_that_say_what_is_wrong(make, message):
    with nnx.scope(0), pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CAUSAL", 1])
def test_convolutions_of_empty_axes(padding):
    conv = nnx.Conv.init(0)(3, 4, (3,), padding=padding)
    assert conv(jnp.ones((2, 0, 3))).shape == (2, 0, 4)
    assert conv(jnp.ones((0, 3))).shape == (0, 4)
    for layer in (conv, ConvTranspose.init(0)(3, 4, (3,), padding=padding)):
        assert layer(jnp.ones((0, 2, 5, 3))).shape[:2] == (0, 2)


def test_empty_axes_without_a_result_are_an_error():
    message = r"(\(\*batch, \*spatial, 3\)) with no empty spatial axis.*, but got \(2, 4, 0, 3\)\.$"
    for layer in (
        nnx.Conv.init(0)(3, 4, (3, 3), padding="CIRCULAR"),
        nnx.Conv.init(0)(3, 4, (3, 3), padding="REFLECT"),
        ConvTranspose.init(0)(3, 4, (3, 3), strides=2),
    ):
        with pytest.raises(ValueError, match=f"{type(layer).__name__} expects .*{message}"):
            layer(jnp.ones((2, 4, 0, 3)))
