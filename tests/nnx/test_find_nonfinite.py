"""`nnx.debug.find_nonfinite` names where the first nan comes from, and changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnx
from nnx.debug import find_nonfinite

X = jnp.ones((3, 2))


class Log(nnx.Module):
    def __call__(self, x):
        return jnp.log(x)


class Sqrt(nnx.Module):
    def __call__(self, x):
        return jnp.sqrt(x)


def net(*layers):
    with nnx.scope(0):
        return nnx.Sequential(nnx.Linear(2, 2), *layers, nnx.Linear(2, 2))


def test_the_first_output_in_the_order_of_the_computation():
    model = net(nnx.relu, Log(), nnx.relu)
    found = find_nonfinite(model)(0 * X)
    assert str(found) == (
        "The output of 'layers.2' (Log) is the first that is not finite: 0 nan, 6 infinite. "
        "Its input is finite."
    )
    assert (found.kind, found.path, found.module, found.step) == ("output", "layers.2", "Log", ())
    assert find_nonfinite(lambda m, x: m.layers[0](x))(model, X) is None
    found = find_nonfinite(lambda m, x: m.layers[0](x / 0))(model, X)
    assert "Its input is already not finite, and was made outside modules" in str(found)


@pytest.mark.parametrize(
    "wrap",
    [
        nnx.jit,
        nnx.remat,
        lambda f: nnx.vmap(f, (None, 0)),
        nnx.jit_filter,
        lambda f: nnx.jit(nnx.jit(f)),
    ],
    ids=["jit", "remat", "vmap", "jit_filter", "jit in jit"],
)
def test_inside_transformations(wrap):
    model = net(Sqrt())
    model.layers[0].kernel, model.layers[0].bias = jnp.zeros((2, 2)), -jnp.ones(2)
    for _ in range(2):
        found = find_nonfinite(wrap(lambda model, x: model(x)))(model, X)
        assert (found.kind, found.path, found.module) == ("output", "model.layers.1", "Sqrt")
        assert found.input_is_finite and sum((found.nans, found.infinities)) in (2, 6)


def test_the_parameter_or_the_argument_that_was_so_before():
    model = net(nnx.relu)
    model.layers[2].bias = model.layers[2].bias.at[0].set(jnp.nan)
    found = find_nonfinite(lambda model, x: model(x))(model, X)
    assert (
        str(found) == "Ref 'model.layers.2.bias' was not finite before the call: 1 nan, 0 infinite."
    )
    found = find_nonfinite(lambda model, x, data: model(x))(net(), X.at[1].set(jnp.inf), {"y": X})
    assert str(found) == "The argument 'x' was not finite before the call: 0 nan, 2 infinite."
    # A harmless mask of infinities is not reported.
    model = net()
    model.mask = nnx.Ref(jnp.array(-jnp.inf), "masks")
    assert (
        find_nonfinite(lambda model, x: jnp.maximum(model(x), model.mask.value))(model, X) is None
    )


def sgd(model, opt, x):
    loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).sum())(model)
    opt.update(model, grads)
    return loss


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_the_first_gradient_on_the_way_back(wrap):
    model = net(Sqrt(), nnx.relu)
    model.layers[0].kernel *= 0
    opt = nnx.Optimizer(model, optax.sgd(0.1))
    before = model["params"]
    found = find_nonfinite(wrap(sgd))(model, opt, X)
    assert (found.kind, found.path, found.module) == ("output gradient", "model.layers.0", "Linear")
    assert "'model.layers.0' (Linear) is the first on the way back" in str(found)
    # Nothing of that call was kept.
    assert all(np.array_equal(before[p], x) for p, x in model["params"].items())


def test_the_gradient_of_a_parameter():
    class Power(nnx.Module):
        p: jax.Array = nnx.param()

        def __init__(self):
            self.p = jnp.array(0.5)

        def __call__(self, x):
            return x * jnp.sqrt(self.p - 0.5)

    found = find_nonfinite(lambda m: nnx.grad(lambda m: m(X).sum())(m))(nnx.Sequential(Power()))
    assert str(found) == (
        "The gradient of 'layers.0.p' is not finite, although the gradients of all outputs are: "
        "0 nan, 1 infinite."
    )


def test_the_step_of_a_loop():
    def loop(model, x):
        return nnx.scan(lambda h, i: (model(h - i), None), 3.5 * x, jnp.arange(6.0))[0]

    found = find_nonfinite(loop)(Log(), X)
    # log(3.5) = 1.25, log(0.25) < 0
    assert (found.kind, found.path, found.step) == ("output", "model", (2,))
    assert "not finite in step 2: 6 nan" in str(found)

    def while_loop(model, x):
        return nnx.while_loop(
            lambda c: c[0] < 5, lambda c: (c[0] + 1, model(c[1] - c[0])), (0, 3.5 * x)
        )

    assert find_nonfinite(while_loop)(Log(), X).step == (2,)

    class Middle(nnx.Module):
        scale: jax.Array = nnx.param()

        def __init__(self):
            self.scale, self.root = jnp.ones(()), Sqrt()

        def __call__(self, x):
            return self.root(x) * self.scale

    stack = nnx.Stack.init(0)(Middle, 4)
    stack.layers.scale = jnp.array([1.0, 1.0, -1.0, 1.0])
    found = find_nonfinite(nnx.jit(lambda s, x: s(x)))(stack, X)
    assert (found.path, found.step) == ("s.layers.root", (3,))
    stack.layers.scale = jnp.array([1.0, 0.0, 1.0, 1.0])
    found = find_nonfinite(lambda s, x: nnx.grad(lambda s: s(x).sum())(s))(stack, X)
    # From layer 1 on everything is 0, where the root in layer 3 has no gradient.
    assert (found.kind, found.path, found.step) == ("output gradient", "s.layers", (2,))


def test_what_is_written_and_what_is_returned():
    def spoil(model):
        model.layers[0].bias = model.layers[0].bias / 0

    model = net()
    found = find_nonfinite(spoil)(model)
    assert str(found).startswith(
        "All outputs of modules are finite, but Ref 'model.layers.0.bias' was written"
    )
    assert np.isfinite(model.layers[0].bias).all()
    found = find_nonfinite(lambda model: {"a": model(X) / 0})(model)
    assert "the result of the function at ['a'] is not: 0 nan, 6 infinite" in str(found)


root = net(Sqrt())
root.layers[0].kernel *= 0


def helper(x):
    return root(x).sum()


@nnx.jit
def step(x):
    return nnx.grad(lambda m: helper(x))(root)


def test_modules_that_the_function_closes_over():
    found = find_nonfinite(step)(X)
    assert (found.kind, found.path) == ("output gradient", "root.layers.0")
    local = net(Log())
    local.layers[0].kernel *= 0
    found = find_nonfinite(lambda x: [local][0](x))(X)
    assert (found.kind, found.path) == ("output", "local.layers.1")
    assert type(local.layers[1]) is Log and type(root.layers[1]) is Sqrt


def test_donation_and_random_streams_are_left_alone():
    model = net(Sqrt())
    model.layers[0].bias -= 10.0

    @nnx.jit(donate=True)
    def train(model, x):
        model.layers[0].kernel = model.layers[0].kernel + jax.random.normal(nnx.make_rng(), (2, 2))
        return model(x)

    with nnx.scope(1):
        assert find_nonfinite(train)(model, X).path == "model.layers.1"
        key = nnx.make_rng()
    with nnx.scope(1):
        assert (jax.random.key_data(key) == jax.random.key_data(nnx.make_rng())).all()
    assert np.isfinite(model.layers[0].kernel).all()


def test_what_plain_jax_does_is_not_seen_but_its_result_is():
    model = net(Log())

    def loss(model, x):
        return jax.grad(lambda x: jax.vmap(model)(x).sum())(x)

    model.layers[0].kernel *= 0
    found = find_nonfinite(loss)(model, X)
    assert (found.kind, found.path) == ("result", "")
    assert "the result of the function is not" in str(found)
