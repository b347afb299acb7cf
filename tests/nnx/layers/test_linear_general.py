"""LinearGeneral and Einsum against flax.nnx and NumPy."""

import inspect

import flax.nnx as fnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx.layers.linear_general import Einsum, LinearGeneral
from tests.nnx.layers.test_layers import draw, from_flax

GENERAL = [
    ((2, 3), 3, 5, {}),
    ((3,), 3, 5, {}),
    ((2, 3), 3, (4, 5), {"use_bias": False}),
    ((2, 4, 3), (4, 3), 5, {"axis": (-2, -1)}),
    ((4, 2, 3), (4, 3), (5, 2), {"axis": (0, -1)}),
    ((4, 2, 3), (4, 2), 5, {"axis": (1, 0)}),
    ((4, 2, 3), 3, 5, {"batch_axis": {0: 4}}),
    ((4, 2, 3, 5), (3, 5), (2, 2), {"axis": (-2, -1), "batch_axis": {0: 4, 1: 2}}),
    ((4, 2, 3, 5), 3, 2, {"axis": 2, "batch_axis": {0: 4}}),
    ((2, 3), 3, (2, 2), {"dtype": jnp.bfloat16}),
    ((2, 3), 3, (2, 2), {"param_dtype": jnp.bfloat16, "precision": "highest"}),
    ((2, 3), 3, 4, {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32}),
]


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(
        np.asarray(a, np.float64), np.asarray(b, np.float64), atol=atol, rtol=1e-4
    )


def drawn(key, shape, dtype=jnp.float32):
    """An initializer that compiles nothing."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    return jnp.asarray(rng.normal(scale=0.4, size=shape), dtype)


def compare(ours, theirs, *inputs, tolerance=2e-5, **call):
    """With flax's weights: equal outputs, and equal gradients by weight and by input.

    Each in one program, which compiles faster than operation by operation.
    """
    from_flax(ours, theirs)

    def loss(m, *inputs):
        y = m(*inputs, **call)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    which = tuple(range(len(inputs) + 1))
    (ga, *gx), a = nnx.jit(nnx.grad(loss, argnums=which, has_aux=True))(ours, *inputs)
    (fa, *fx), b = fnx.jit(fnx.grad(loss, argnums=which, has_aux=True))(theirs, *inputs)
    assert a.dtype == b.dtype
    close(a, b, tolerance)
    for x, y in zip(gx, fx, strict=True):
        close(x, y, tolerance * 10)
    for path, value in fa.flat_state():
        close(ga[tuple(map(str, path))], value[...], tolerance * 10)


def tolerance(options):
    return 2e-3 if jnp.bfloat16 in options.values() else 2e-5


@pytest.mark.parametrize("shape, inputs, outputs, options", GENERAL)
def test_linear_general(shape, inputs, outputs, options):
    init = {"kernel_init": drawn, "bias_init": drawn}
    theirs = fnx.LinearGeneral(inputs, outputs, rngs=fnx.Rngs(0), **options, **init)
    ours = LinearGeneral.init(1)(inputs, outputs, **options, **init)
    assert ours.kernel.shape == theirs.kernel.shape
    compare(ours, theirs, draw(*shape), tolerance=tolerance(options))


def test_linear_general_is_a_tensor_product():
    layer = LinearGeneral.init(0)((2, 3), (4, 5), axis=(1, -1))
    x = draw(6, 2, 7, 3)
    expected = np.einsum("bicj,ijkl->bckl", np.float64(x), np.float64(layer.kernel))
    close(layer(x), expected)
    close(layer(np.asarray(x)), expected)
    close(nnx.jit(layer)(x), expected)
    integers = LinearGeneral.init(0)(3, 2)(jnp.arange(3))
    assert integers.dtype == jnp.float32


def test_linear_general_takes_other_products_and_metadata():
    calls = []

    def product(x, kernel, dims, precision=None):
        calls.append(dims)
        return jax.lax.dot_general(x, kernel, dims, precision=precision)

    layer = LinearGeneral.init(0)(
        3, 2, dot_general=product, kernel_metadata={"axes": "a"}, bias_metadata={"axes": "b"}
    )
    other = LinearGeneral.init(0)(3, 2, dot_general_cls=lambda: product)
    x = draw(4, 3)
    close(layer(x), x @ layer.kernel)
    close(other(x), x @ layer.kernel)
    assert len(calls) == 2
    assert nnx.get_ref(layer, "kernel").metadata["axes"] == "a"
    assert nnx.get_ref(layer, "bias").metadata["axes"] == "b"


def test_initial_values_have_the_variance_of_the_flattened_layer():
    layer = LinearGeneral.init(0)((16, 8), (8, 16), axis=(-2, -1))
    assert abs(float(layer.kernel.std()) - 128**-0.5) < 0.003 and (layer.bias == 0).all()
    theirs = fnx.LinearGeneral(8, (8, 16), batch_axis={0: 16}, rngs=fnx.Rngs(0))
    ours = LinearGeneral.init(0)(8, (8, 16), batch_axis={0: 16})
    assert abs(float(ours.kernel.std() - theirs.kernel[...].std())) < 0.003
    orthogonal = LinearGeneral.init(0)(6, (2, 3), kernel_init=nnx.initializers.orthogonal())
    close(orthogonal.kernel.reshape(6, 6) @ orthogonal.kernel.reshape(6, 6).T, np.eye(6))


def test_linear_general_through_transformations():
    layer = LinearGeneral.init(0)(3, (2, 2), batch_axis={0: 4})
    dagdef, params = nnx.split(layer)
    x = draw(4, 5, 3)
    close(nnx.merge(dagdef, params)(x), layer(x))
    close(jax.jit(lambda m, x: m(x))(layer, x), layer(x))
    assert hash(dagdef) == hash(nnx.split(nnx.clone(layer))[0])


EINSUMS = [
    ((16, 11, 2), "nta,hab->nthb", (8, 2, 4), (8, 4), {}),
    ((16, 11, 2), "nta, hab -> nthb", (8, 2, 4), None, {}),
    ((3, 5, 2), "...a,ab->...b", (2, 4), (4,), {}),
    ((2,), "...a,ab->...b", (2, 4), (4,), {}),
    ((3, 2), "ab,hbc->ach", (5, 2, 4), (4, 5), {}),
    ((3, 2), "ab,bc->ca", (2, 4), (4,), {}),
    ((3, 2), "ab,bc->ac", (2, 4), (4,), {"dtype": jnp.bfloat16}),
    ((3, 2), "ab,bc->ac", (2, 4), (4,), {"param_dtype": jnp.bfloat16, "precision": "highest"}),
    ((6, 3, 2), "...b,...bc->...c", (3, 2, 4), (3, 4), {}),
]


@pytest.mark.parametrize("shape, equation, kernel, bias, options", EINSUMS)
def test_einsum(shape, equation, kernel, bias, options):
    init = {"kernel_init": drawn, "bias_init": drawn}
    theirs = fnx.Einsum(equation, kernel, bias, rngs=fnx.Rngs(0), **options, **init)
    ours = Einsum.init(1)(equation, kernel, bias, **options, **init)
    compare(ours, theirs, draw(*shape), tolerance=tolerance(options))


def test_einsum_with_the_equation_of_the_call():
    layer = Einsum.init(0)("ab,bc->ac", (3, 4), bias_init=nnx.initializers.ones, bias_shape=(4,))
    x = draw(2, 3)
    close(layer(x, "ab, bc -> ca"), layer(x).T)
    expected = np.float64(x) @ np.float64(layer.kernel) + 1
    close(layer(x), expected)
    half = Einsum.init(0)(
        "ab,bc->ac", (3, 4), dtype=jnp.bfloat16, preferred_element_type=jnp.float32
    )
    assert half(x).dtype == jnp.float32
    called = []
    own = Einsum.init(0)("ab,bc->ac", (3, 4), einsum_op=lambda *a, **k: called.append(a) or a[1])
    assert own(x).shape == (2, 3) and called[0][0] == "ab,bc->ac"


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: LinearGeneral((2, 3), 4)(jnp.ones(3)),
            r"size for each axis, but got in_features \(2, 3\) for the axes \(-1,\)",
        ),
        (lambda: LinearGeneral(3, 4, batch_axis={1: 2}), r"leading ones, 0, 1, \.\.\., .* \(1,\)"),
        (
            lambda: LinearGeneral(3, 4)(jnp.ones((2, 5))),
            r"sizes \(3,\) along the axes \(-1,\), but got one of shape \(2, 5\)",
        ),
        (
            lambda: LinearGeneral((3, 3), 4, axis=(1, -1))(jnp.ones((2, 3))),
            r"along the axes \(1, -1\), but got one of shape \(2, 3\)",
        ),
        (
            lambda: LinearGeneral((2, 3), 4, axis=(-2, -1))(jnp.ones(3)),
            r"but got one of shape \(3,\)",
        ),
        (
            lambda: LinearGeneral(3, 4, batch_axis={0: 2})(jnp.ones((5, 3))),
            r"and batch axes of size \{0: 2\}, but got one of shape \(5, 3\)",
        ),
        (lambda: Einsum("ab,bc", (2, 3)), "two operands.* and an arrow, .* but got 'ab,bc'"),
        (lambda: Einsum("ab->b", (2, 3)), "two operands"),
        (
            lambda: Einsum("ab,bc->ac", (2, 3, 4)),
            r"axes 'bc' in 'ab,bc->ac', but kernel_shape is \(2, 3, 4\)",
        ),
        (
            lambda: Einsum("ab,bc->ac", (2, 3))(jnp.ones((5, 4))),
            r"Einsum expects an input of shape \(a, 2\) for 'ab,bc->ac', but got \(5, 4\)",
        ),
        (
            lambda: Einsum("...b,bc->...c", (2, 3))(jnp.ones((5, 4))),
            r"of shape \(\.\.\., 2\) for .*, but got \(5, 4\)",
        ),
        (lambda: Einsum("ab,bc->ac", (2, 3))(jnp.ones(2)), r"but got \(2,\)"),
        (
            lambda: Einsum("ab,bc->ac", (2, 3), (2,))(jnp.ones((5, 2))),
            r"with sizes \(3,\), but bias_shape is \(2,\)",
        ),
    ],
)
def test_mistakes_raise_errors_that_say_what_is_wrong(make, message):
    with nnx.scope(0), pytest.raises(ValueError, match=message):
        make()


def test_parameters_need_a_stream():
    with pytest.raises(nnx.MissingStreamError, match="'params'"):
        LinearGeneral(2, 3)


def test_the_arguments_are_those_of_flax():
    same_arguments(fnx.LinearGeneral, LinearGeneral)
    same_arguments(fnx.Einsum, Einsum)


def same_arguments(theirs, ours, added=(), other=()):
    """The constructor has the arguments of flax's, in order and with equal defaults, less rngs."""
    a, b = (inspect.signature(cls.__init__).parameters for cls in (theirs, ours))
    assert [n for n in a if n not in ("rngs", "keep_rngs")] == [n for n in b if n not in added]
    plain = (int, float, bool, str, tuple, type(None))
    for name in a.keys() & b.keys():
        assert a[name].kind == b[name].kind, name
        if isinstance(a[name].default, plain) and name not in other:
            assert a[name].default == b[name].default, name
