"""The options of the filtered transformations that select arguments, as in JAX and Equinox."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from tests.models import Dense


def dead(x):
    return any(a.is_deleted() for a in jax.tree.leaves(x) if isinstance(a, jax.Array))


def test_the_stages_are_those_of_jit():
    f = nnx.jit_filter(lambda w, x, n: (w.value.sum() + x) * n, donate_argnums=1)
    w, x = nnx.Ref(jnp.ones(2)), jnp.array(1.0)
    shapes = jax.eval_shape(lambda *args: args, w, x)
    assert "mul" in str(f.trace(w, x, 2).jaxpr)
    for lowered in (f.lower(w, x, 2), f.lower(*shapes, 2)):
        compiled = lowered.compile()
        assert float(compiled(w, x + 1, 2)) == 8.0
        with pytest.raises(nnx.StructureError, match="other static values than it was compiled"):
            compiled(w, x, 3)
        with pytest.raises(nnx.StructureError, match="another structure than it was compiled"):
            compiled(x, w, 2)
    some = nnx.jit_filter(lambda x, y: x + y, filter_fn=nnx.is_inexact_array)
    assert float(some.lower(*[jax.ShapeDtypeStruct((), jnp.float32)] * 2).compile()(x, x)) == 2.0


def test_donated_plain_arrays():
    f = nnx.jit_filter(
        lambda a, b, *, c: (a + 1, b + 1, c + 1), donate_argnums=(0,), donate_argnames="c"
    )
    a, b, c = jnp.ones(4), jnp.ones(4), jnp.ones(4)
    for _ in range(3):
        new_a, new_b, new_c = f(a, b, c=c)
        assert dead(a) and dead(c) and not dead(b)
        np.testing.assert_array_equal(new_a, a_next := np.asarray(new_b))
        a, b, c = new_a, new_b, new_c
        np.testing.assert_array_equal(c, a_next)


def test_donation_is_that_of_jax_for_pytrees_and_names():
    def step(state, x, lr=0.1):
        return jax.tree.map(lambda w: w - lr * x, state)

    by = {"donate_argnums": 0}, {"donate_argnames": ("state",)}, {"donate_argnums": (-3,)}
    for options in by:
        ours, theirs = ({"w": jnp.ones(3), "n": [jnp.zeros(2)]} for _ in range(2))
        out = nnx.jit_filter(step, **options)(ours, jnp.array(2.0))
        if "donate_argnums" not in options or options["donate_argnums"] == 0:
            expected = jax.jit(step, **options)(theirs, jnp.array(2.0))
            assert dead(theirs)
            jax.tree.map(np.testing.assert_array_equal, out, expected)
        assert all(x.is_deleted() for x in jax.tree.leaves(ours))


class Net(nnx.Module):
    def __init__(self):
        self.w = nnx.Ref(jnp.ones(3), "params")
        self.frozen = nnx.Ref(jnp.ones(3), "frozen")
        self.table = jnp.ones(3)
        self.mode = "fast"


def test_a_donated_module_comes_back_whole():
    @functools.partial(nnx.jit_filter, donate_argnums=0)
    def step(m, x):
        m.w.value = m.w.value + x
        return m, m.table

    net, ones = Net(), jnp.ones(3)
    for i in range(3):
        old = net
        net, table = step(net, ones)
        assert dead(old.w._value) and dead(old.frozen._value) and dead(old.table)
        np.testing.assert_array_equal(net.w.value, np.full(3, 2.0 + i))
        np.testing.assert_array_equal(net.frozen.value, np.ones(3))
        np.testing.assert_array_equal(net.table, np.ones(3))
        np.testing.assert_array_equal(table, np.ones(3))
        assert net.mode == "fast" and not dead(ones)


def test_what_is_not_donated_lives():
    a, b = Net(), Net()
    f = nnx.jit_filter(lambda a, b: (b, a.w.value + b.w.value), donate_argnums=1)
    new, _ = f(a, b)
    assert not dead(nnx.split(a)[1]) and dead(b.w._value) and not dead(nnx.split(new)[1])
    with pytest.raises(nnx.DonationError, match="'w'"):
        f(a, b)


def test_static_arguments():
    traces = []

    @functools.partial(nnx.jit_filter, static_argnums=(1,), static_argnames="mode")
    def f(x, n, *, mode="up", by=1):
        traces.append((n, mode))
        return x * n if mode == "up" else x - n

    x = jnp.ones(2)
    for n, mode in ((2, "up"), (2, "up"), (3, "up"), (3, "down")):
        expected = x * n if mode == "up" else x - n
        np.testing.assert_array_equal(f(x, n, mode=mode), expected)
    np.testing.assert_array_equal(f(x, n=2, mode="up"), x * 2)
    assert traces[:3] == [(2, "up"), (3, "up"), (3, "down")]
    with pytest.raises(nnx.UnhashableStaticError, match=r"argument 1 of nnx\.jit_filter is a list"):
        f(x, [1])

    # The numbers do not count the module of a bound method, and may be negative.
    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Ref(jnp.ones(2), "params")

        def scaled(self, x, n):
            return self.w.value * x * n

    model = Model()
    g = nnx.jit_filter(model.scaled, static_argnums=1)
    np.testing.assert_array_equal(g(x, 3), 3 * x)
    h = nnx.jit_filter(lambda n, x, m: x * n, static_argnums=-3, filter_tree=(True, False, True))
    assert h(2, 3, model) == 6


def test_static_and_donated_together():
    f = nnx.jit_filter(lambda n, x, y: (x * n, y * n), static_argnums=0, donate_argnums=2)
    x, y = jnp.ones(3), jnp.ones(3)
    f(2, x, y)
    assert dead(y) and not dead(x)


@pytest.mark.parametrize("transformation", [nnx.jit, nnx.jit_filter])
@pytest.mark.parametrize(
    "options, message",
    [
        ({"static_argnums": 2}, r"static_argnums=\(2,\), but its function takes 2 positional"),
        ({"static_argnums": -3}, r"static_argnums=\(-3,\)"),
        ({"static_argnames": "mod"}, r"no argument 'mod'; it has 'a', 'b', 'mode'"),
    ],
)
def test_arguments_that_are_not_there(transformation, options, message):
    def f(a, b, *, mode=1):
        return a

    with pytest.raises(nnx.ArgumentError, match=message):
        transformation(f, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"donate_argnums": (0, 7)}, r"donate_argnums=\(0, 7\), but its function takes 2"),
        ({"donate_argnames": "z"}, r"donate_argnames=\('z',\).*no argument 'z'"),
        ({"donate_argnums": 0, "static_argnums": 0}, "cannot donate an argument that is static"),
    ],
)
def test_donated_arguments_that_are_not_there(options, message):
    with pytest.raises(nnx.ArgumentError, match=message):
        nnx.jit_filter(lambda a, b: a, **options)
    with pytest.raises(TypeError, match="in_shardings"):
        nnx.jit_filter(lambda a: a, in_shardings=None)


@pytest.mark.parametrize("argnums", [0, 1, -1, (0, 1), (1, 0), (0,), [1]])
def test_argnums_are_those_of_jax(argnums):
    def loss(a, b, scale):
        return (a["w"] * b).sum() * scale

    args = {"w": jnp.arange(3.0)}, jnp.ones(3), 2.0
    value, grads = nnx.value_and_grad_filter(loss, argnums=argnums, filter_fn=lambda x: True)(*args)
    expected = jax.value_and_grad(loss, argnums=argnums)(*args)
    jax.tree.map(np.testing.assert_array_equal, (value, grads), expected)
    assert jax.tree.structure(grads) == jax.tree.structure(expected[1])
    only = nnx.grad_filter(loss, argnums=argnums, filter_fn=lambda x: True)(*args)
    jax.tree.map(np.testing.assert_array_equal, only, expected[1])


def test_argnums_with_modules():
    a, b = Dense(), Dense()
    x = jnp.ones((2, 2))
    loss = lambda x, a, b: (a(x) * b(x)).sum()  # noqa: E731
    both = nnx.grad_filter(loss, argnums=(1, 2))(x, a, b)
    assert [type(g) for g in both] == [Dense, Dense] and both[0].calls is None
    expected = nnx.grad(loss, argnums=(1, 2))(x, nnx.clone(a), nnx.clone(b))
    for ours, theirs in zip(both, expected, strict=True):
        np.testing.assert_allclose(ours.w, theirs["w"], rtol=1e-5)
    some = nnx.grad_filter(loss, argnums=(1, 2), filter_tree=({"params": True, ...: False}, False))(
        x, a, b
    )
    assert some[0].w is not None and some[0].calls is None and some[1].w is None
    with pytest.raises(nnx.DifferentiationError, match="argument 3, but it was called with 3"):
        nnx.grad_filter(loss, argnums=3)(x, a, b)


def test_a_function_and_a_tree_both_count():
    p = {"a": jnp.ones(2), "b": jnp.ones(2), "n": jnp.arange(2)}
    loss = lambda p: (p["a"] * p["b"]).sum()  # noqa: E731
    tree = {"a": True, "b": False, "n": True}
    grads = nnx.grad_filter(loss, filter_fn=nnx.is_inexact_array, filter_tree=tree)(p)
    assert grads["a"] is not None and grads["b"] is None and grads["n"] is None
    grads = nnx.grad_filter(loss, filter_tree=nnx.is_inexact_array)(p)
    assert grads["b"] is not None and grads["n"] is None
    grads = nnx.grad_filter(loss, filter_tree={"a": nnx.is_array, "b": False, "n": False})(p)
    assert grads["a"] is not None and grads["b"] is None

    traced = []

    def f(x, n):
        traced.append((isinstance(x, jax.core.Tracer), isinstance(n, jax.core.Tracer)))
        return 0

    nnx.jit_filter(f, filter_fn=lambda x: not isinstance(x, int), filter_tree=True)(1.0, 2)
    nnx.jit_filter(f, filter_fn=lambda x: True, filter_tree=(True, False))(1.0, 2)
    assert traced == [(True, False), (True, False)]


@pytest.mark.parametrize("spec", ["params", 1.0, jnp.ones(2), float])
def test_a_tree_of_something_else_is_an_error(spec):
    for transform in (nnx.jit_filter, nnx.grad_filter):
        with pytest.raises(
            nnx.FilterError, match="must have bools, or functions from leaf to bool"
        ):
            transform(lambda x: x, filter_tree=(spec,) if transform is nnx.jit_filter else spec)(
                1.0
            )


def test_a_module_of_bools_is_a_filter_tree():
    net = Net()
    net.mean = nnx.Ref({"a": jnp.ones(2), "b": 3}, "stats")
    bools = jax.tree.map(lambda x: isinstance(x, jax.Array), net)
    traced = {}

    def f(m, x):
        traced["a"], traced["b"] = (isinstance(m.mean.value[k], jax.core.Tracer) for k in "ab")
        traced["table"] = isinstance(m.table, jax.core.Tracer)
        return m.w.value * x

    out = nnx.jit_filter(f, filter_tree=(bools, True))(net, 2.0)
    np.testing.assert_array_equal(out, [2.0, 2.0, 2.0])
    assert traced == {"a": True, "b": False, "table": True}
    some = jax.tree.map(lambda x: False, net)
    some.w.value = True
    grads = nnx.grad_filter(
        lambda m: (m.w.value * m.frozen.value * m.table).sum(), filter_tree=some
    )(net)
    assert grads.w is not None and grads.frozen.value is None and grads.table is None
    other = jax.tree.map(lambda x: True, Dense())
    with pytest.raises(nnx.RefError, match="none for|not a prefix"):
        nnx.jit_filter(f, filter_tree=(other, True))(net, 2.0)


def test_a_partition_of_axes():
    model = nnx.Linear.init(0)(2, 3)
    axes = nnx.Partition({"kernel": 0, "bias": None})
    f = nnx.vmap(lambda m: m.kernel.sum() + m.bias.sum(), in_axes=(axes,))
    np.testing.assert_allclose(f(model), model.kernel.sum(1) + model.bias.sum(), rtol=1e-6)
    with pytest.raises(nnx.AxisError, match=r"Partition of specifications.*none for 'bias'"):
        nnx.vmap(lambda m: 0, in_axes=(nnx.Partition({"kernel": 0}),))(model)
