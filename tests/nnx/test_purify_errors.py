"""purify: each mistake is an error that names the parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import refx
from nnx.purify import purify
from tests.nnx.test_purify import W, X, close

param = purify.param
fixed = purify.fixed
intermediate = purify.intermediate
prefix = purify.prefix


@jax.jit
def kept_jit(x):
    return param(3, "w") * x


def dense(x, features):
    return x @ param((x.shape[-1], features), "w") + param(features, "b")


@pytest.fixture
def simple():
    def simple():
        return param(3, "weight") * fixed(3, "x")

    return purify(simple)


def test_missing_and_unexpected_names(simple):
    where = r"purify\(simple.*simple\)"
    with pytest.raises(
        purify.MissingNameError,
        match=where
        + r" needs the parameter 'weight' \(float32\[3\]\), but it was not given in the dictionary. Given: 'wieght'",
    ):
        simple({"wieght": W}, x=X)
    with pytest.raises(
        purify.MissingNameError, match=r"fixed value 'x' .*by keyword. Given: nothing"
    ):
        simple({"weight": W})
    with pytest.raises(
        purify.UnexpectedNameError,
        match=r"given the parameter 'weights', which it does not have. Did you mean 'weight'\? It has: 'weight'",
    ):
        simple({"weight": W, "weights": W}, x=X)
    with pytest.raises(purify.UnexpectedNameError, match=r"fixed value 'y'"):
        simple({"weight": W}, x=X, y=X)
    with pytest.raises(
        purify.UnexpectedNameError,
        match=r"the parameter 'x', which it does not have. It is a fixed value",
    ):
        simple({"weight": W, "x": X}, x=X)
    with pytest.raises(
        purify.PurifyError,
        match=r"takes a dictionary of parameters by name, not a tuple. Make one with .zeros",
    ):
        simple((W,), x=X)
    assert issubclass(purify.MissingNameError, refx.RefError)


def test_wrong_shapes_and_dtypes(simple):
    with pytest.raises(
        refx.ShapeError,
        match=r"Parameter 'weight' of purify\(.*\) was declared with shape \(3,\), but got an array of shape \(4,\)",
    ):
        simple({"weight": jnp.ones(4)}, x=X)
    with pytest.raises(refx.ShapeError, match=r"Fixed value 'x' .* shape \(\)"):
        simple({"weight": W}, x=1.0)
    with pytest.raises(
        refx.ShapeError, match=r"'x' .* was declared as float32\[3\], but got 'abc'"
    ):
        simple({"weight": W}, x="abc")
    with pytest.raises(
        refx.DtypeError,
        match=r"'weight' .* declared with dtype float32, but got complex64, .* Cast it",
    ):
        simple({"weight": W.astype(jnp.complex64)}, x=X)
    # A cast that loses nothing is allowed.
    close(simple({"weight": W.astype(jnp.bfloat16)}, x=[1, 2, 3]), W * jnp.array([1, 2, 3]))
    assert simple({"weight": np.ones(3)}, x=np.ones(3, np.float64)).dtype == jnp.float32
    tree = purify(lambda: param({"a": 2, "b": 3}, "tree"))
    with pytest.raises(refx.ShapeError, match=r"'tree' .* pytree of another structure"):
        tree({"tree": {"a": jnp.ones(2)}})
    with pytest.raises(
        refx.ShapeError, match=r"'tree' of purify\(.*\)\['b'\] was declared with shape \(3,\)"
    ):
        tree({"tree": {"a": jnp.ones(2), "b": jnp.ones(2)}})
    half = purify(lambda: param((), "h", jnp.bfloat16))
    assert half({"h": 1.5}).dtype == jnp.bfloat16
    with pytest.raises(refx.DtypeError, match="float32, which does not fit"):
        half({"h": jnp.float32(1.5)})


def test_duplicate_names():
    advice = r"declared by two calls. Give each its own name"
    twice = lambda: param(3, "w") + param(3, "w")
    with pytest.raises(purify.DuplicateNameError, match=r"param\('w'\) was " + advice):
        purify(twice).shapes()
    with pytest.raises(purify.DuplicateNameError, match=r"with float32\[3\] and with float32\[4\]"):
        purify(lambda: (param(3, "w"), param(4, "w"))).shapes()
    with pytest.raises(purify.DuplicateNameError, match=r"fixed\('x'\)"):
        purify(lambda: (fixed(3, "x"), fixed(3, "x"))).fixed_shapes()
    with pytest.raises(purify.DuplicateNameError, match=r"intermediate\('y'\)"):
        purify(lambda: (intermediate(X, "y"), intermediate(X, "y")))({})
    with pytest.raises(purify.DuplicateNameError, match=r"param\('a.w'\)"):
        purify(lambda: prefix("a", dense)(X, 2) + prefix("a", dense)(X, 2)).shapes()
    with pytest.raises(purify.DuplicateNameError, match=r"param\('w'\)"):
        purify(lambda x: jax.jit(dense, static_argnums=1)(lax.map(lambda x: dense(x, 3), x), 3))(
            {}, X[None]
        )
    with pytest.raises(
        purify.DuplicateNameError, match=r"would be called 'param_0', but another one has that name"
    ):
        purify(lambda: (param(3, "param_0"), param(3))).shapes()


@pytest.mark.parametrize(
    "between", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "remat"]
)
def test_a_jitted_function_called_twice_is_a_duplicate_too(between):
    for f in (kept_jit, jax.jit(lambda x: x * param(3))):
        model = purify(lambda x: f(between(lambda x: f(x))(x)))
        with pytest.raises(
            purify.DuplicateNameError,
            match=r"jitted function '.*', which declares param\(.* is called twice. Give",
        ):
            model({}, X)


def test_one_call_is_not_a_duplicate_however_often_jax_runs_it():
    energy = jax.jit(lambda x: jnp.sum(jnp.sin(param(3, "w") * x)))
    for f in (
        jax.hessian(energy),
        jax.value_and_grad(energy),
        jax.grad(jax.checkpoint(lambda x: jax.checkpoint(energy)(jnp.sin(x)))),
        lambda x: jax.linearize(energy, x)[1](x),
        lambda x: lax.fori_loop(0, 3, lambda i, c: c + jax.grad(energy)(c), x),
        # A carry whose type is found by tracing the body again.
        lambda x: lax.scan(lambda c, _: (c * param(3, "w")[0], None), 1.0, None, length=2)[0],
        lambda x: jax.linearize(
            lambda x: lax.while_loop(
                lambda c: c[0] < 3, lambda c: (c[0] + energy(X * 0) + 1, c[1] * 2), (0.0, x)
            )[1],
            x,
        )[1](x),
    ):
        model = purify(f)
        assert list(model.shapes(X)) == ["w"]
        model({"w": W}, X)


def test_mistakes_at_markers():
    with pytest.raises(
        purify.MarkerError,
        match=r"param\('n'\) was declared with dtype int32, which has no gradient",
    ):
        param(3, "n", jnp.int32)
    with pytest.raises(
        purify.MarkerError, match=r"param\('t'\)\['b'\] was declared with dtype int32"
    ):
        param({"a": 3, "b": jnp.arange(2)}, "t")
    with pytest.raises(purify.MarkerError, match=r"param\('n'\) takes a shape .* not 'three'"):
        param("three", "n")
    with pytest.raises(purify.MarkerError, match="negative size"):
        param(-1, "n")
    with pytest.raises(purify.MarkerError, match="needs a name, because it is passed by keyword"):
        fixed(3)
    with pytest.raises(
        purify.MarkerError, match="name of a param must be a non-empty string, not 3"
    ):
        param("w", 3)
    with pytest.raises(purify.MarkerError, match="holds 'text', a str"):
        intermediate({"a": "text"}, "y")
    with pytest.raises(TypeError, match="purify takes a function, not 3"):
        purify(3)
    with pytest.raises(purify.MarkerError, match="name of a prefix"):
        prefix("", dense)


def test_markers_in_what_takes_no_inputs_are_an_error():
    def f(x):
        return lax.reduce(x, 0.0, lambda a, b: a + b * param((), "w"), (0,))

    with pytest.raises(
        purify.MarkerError, match=r"param\('w'\) is inside reduce, .* Call the marker before it"
    ):
        purify(f).shapes(X)


def test_values_in_python_control_flow_are_the_error_of_jit():
    with pytest.raises(jax.errors.TracerBoolConversionError):
        purify(lambda: 1 if param((), "w") > 0 else 2)({"w": 1.0})


def test_the_namespace():
    import nnx.purify as module
    from nnx.purify.namespace import purify as same

    assert purify is same and purify.purify is purify and repr(purify) == "nnx.purify"
    names = __import__("importlib").import_module("nnx.purify").__all__
    assert all(getattr(purify, n) is not None for n in names)
    assert module is not None
    model = purify(lambda: param(3, "w"))
    assert isinstance(model, purify.Purified) and repr(model).startswith(
        "purify(test_the_namespace"
    )
