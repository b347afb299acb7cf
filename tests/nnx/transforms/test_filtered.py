import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from tests.models import Dense, Net


class LinearOrIdentity(nnx.Module):
    def __init__(self, n, m, flag, key):
        self.weight = jax.random.normal(key, (m, n))
        self.flag = flag

    def __call__(self, x):
        return x if self.flag else self.weight @ x


def test_the_program_of_the_first_equinox():
    traces = []

    @functools.partial(nnx.jit_filter, filter_fn=nnx.is_inexact_array)
    @functools.partial(nnx.grad_filter, filter_fn=nnx.is_inexact_array)
    def loss(model, x, y):
        traces.append(1)
        return jnp.mean((y - jax.vmap(model)(x)) ** 2)

    model = LinearOrIdentity(2, 3, False, jax.random.key(0))
    x, y = jnp.ones((4, 2)), jnp.zeros((4, 3))
    for _ in range(2):
        grads = loss(model, x, y)
    expected = jax.grad(lambda w: jnp.mean((y - x @ w.T) ** 2))(model.weight)
    np.testing.assert_allclose(grads.weight, expected, rtol=1e-5)
    assert isinstance(grads, LinearOrIdentity) and grads.flag is False and len(traces) == 1
    new = jax.tree.map(lambda w, g: w - 0.1 * g, model, grads)
    assert new.weight.shape == (3, 2)
    loss(LinearOrIdentity(2, 2, True, jax.random.key(0)), x, jnp.zeros((4, 2)))
    assert len(traces) == 2


def test_nothing_of_the_callers_changes_and_fresh_modules_come_out(data):
    x, _ = data
    net = Net()
    before = dict(nnx.split(net)[1])

    @nnx.jit_filter
    def f(m, x):
        out = m(x)
        m.blocks.append(Dense(seed=5))
        return m, out, m.blocks[0]

    with jax.check_tracer_leaks():
        new, out, block = f(net, x)
    assert len(net.blocks) == 3 and all(
        jnp.array_equal(v, before[p]) for p, v in nnx.split(net)[1].items()
    )
    assert new is not net and len(new.blocks) == 4 and new.blocks[0].calls == 2
    assert new.blocks[0] is new.blocks[2] is block
    new.blocks[0].w = jnp.zeros((2, 2))
    same = nnx.jit_filter(lambda a, b: (a, b, a is b))(net, net)
    assert same[0] is same[1] is not net and same[2]


def test_what_is_not_traced_is_static():
    traces = []

    @nnx.jit_filter
    def f(x, n, act, options):
        traces.append(n)
        assert isinstance(n, int) and callable(act)
        return act(x) * n if options["mode"] == "a" else x

    args = (jnp.ones(2), 3, jnp.tanh, {"mode": "a"})
    assert jnp.allclose(f(*args), 3 * jnp.tanh(1.0)) and jnp.allclose(f(*args), 3 * jnp.tanh(1.0))
    f(jnp.ones(2), 4, jnp.tanh, {"mode": "a"})
    f(np.ones(2), 4, jnp.tanh, options={"mode": "b"})
    assert traces == [3, 4, 4]
    g = nnx.jit_filter(lambda x, n: x * n, filter_tree=(True, False))
    assert g(jnp.ones(2), 2).tolist() == [2, 2]
    h = nnx.jit_filter(lambda m: m.w * m.calls, filter_tree=({"params": True, ...: False},))
    model = Dense()
    model.calls = 3
    assert jnp.allclose(h(model), 3 * model.w)


def test_an_array_cannot_be_static():
    with pytest.raises(
        nnx.UnhashableStaticError, match=r"float32\[2\], which cannot be hashed.*Trace it"
    ):
        nnx.jit_filter(lambda x: x, filter_fn=lambda leaf: False)(jnp.ones(2))


def test_closures_are_read_and_not_written(dense, data):
    x, _ = data
    f = nnx.jit_filter(lambda x: x @ dense.w + dense.b)
    for i in range(2):
        assert jnp.allclose(f(x), x @ dense.w + i)
        dense.b = dense.b + 1
    with pytest.raises(
        nnx.TraceLevelError,
        match=r"Ref 'calls' was written inside nnx\.jit_filter.*value semantics",
    ):
        nnx.jit_filter(lambda x: dense(x))(x)
    assert dense.calls == 0


def test_streams_advance():
    f = nnx.jit_filter(lambda: jax.random.normal(nnx.make_rng("x"), ()))
    with nnx.scope(0):
        a, b = f(), f()
    with nnx.scope(0):
        assert a == jax.random.normal(nnx.make_rng("x"), ()) and a != b


def test_gradients_leaf_by_leaf_with_none_for_the_rest(dense, data):
    x, _ = data
    (value, aux), grads = nnx.value_and_grad_filter(lambda m, x: (m(x).sum(), m), has_aux=True)(
        dense, x
    )
    assert isinstance(grads, Dense) and grads.calls is None and jnp.allclose(grads.b, 4)
    assert (
        aux is not dense
        and aux.calls == 1
        and dense.calls == 0
        and jnp.allclose(value, (x @ dense.w).sum())
    )
    frozen = nnx.grad_filter(
        lambda m: m(x).sum(), filter_tree={nnx.PathContains("w"): True, ...: False}
    )(dense)
    assert frozen.b is None and frozen.w.shape == (2, 2)
    net = Net()
    shared = nnx.grad_filter(lambda m: m(x).sum())(net)
    expected = nnx.grad(lambda m: m(x).sum())(nnx.clone(net))
    assert shared.blocks[0] is shared.blocks[2]
    np.testing.assert_allclose(shared.blocks[0].w, expected["blocks.0.w"], rtol=1e-4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, x: nnx.grad_filter(lambda m: m.w)(m), r"array of shape \(2, 2\)"),
        (lambda m, x: nnx.grad_filter(lambda m: m.w.sum(), has_aux=True)(m), r"\(scalar, aux\)"),
        (lambda m, x: nnx.grad_filter(lambda n: n)(1), "nothing to differentiate: none of the"),
        (lambda m, x: nnx.grad_filter(lambda: 1.0)(), "first argument, but got none"),
        (
            lambda m, x: nnx.grad_filter(lambda p: p["a"].sum(), filter_tree={"b": True})({"a": x}),
            "not a prefix",
        ),
    ],
)
def test_errors(dense, data, call, message):
    with pytest.raises(nnx.DifferentiationError, match=message):
        call(dense, data[0])


def test_an_exception_changes_nothing(dense, data):
    def bad(m, x):
        m(x)
        raise ZeroDivisionError

    for f in (nnx.jit_filter(bad), nnx.grad_filter(bad)):
        with pytest.raises(ZeroDivisionError):
            f(dense, data[0])
    assert dense.calls == 0
