"""Loops and branches outside compiled code: one program for each function, and nothing kept alive."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx

XS = jnp.arange(4.0)
TRACES = []


class L(nnx.Module):
    w: jax.Array = nnx.param()

    def __init__(self, v=0.0):
        self.w = jnp.asarray(v, jnp.float32)


def add(m, x):
    TRACES.append(1)
    m.w = m.w + x
    return m.w


def scanned(m, scale=1.0):
    return nnx.scan(lambda c, x: (c, add(m, x * scale)), None, XS)[1]


def counted(m):
    return nnx.fori_loop(0, 4, lambda i, c: c + add(m, i * 1.0), jnp.float32(0))


def while_small(m):
    return nnx.while_loop(lambda c: c < 6, lambda c: (add(m, c), c + 1)[1], jnp.float32(0))


def branch(m, sign=True):
    return nnx.cond(sign, lambda: add(m, 1.0), lambda: add(m, -1.0))


def switched(m, index=1):
    return nnx.switch(index, [lambda: add(m, 1.0), lambda: add(m, 10.0)])


def mapped(m):
    return nnx.map(lambda x: add(m, x), XS)


USES = [scanned, counted, while_small, branch, switched, mapped]


@pytest.mark.parametrize("use", USES, ids=lambda f: f.__name__)
def test_a_new_lambda_over_the_same_objects_costs_no_trace(use):
    m, n = L(), L()
    with jax.disable_jit():
        expected = [use(n), n.w, use(n), n.w]
    first = [use(m), m.w]
    before = len(TRACES)
    assert jax.tree.all(jax.tree.map(jnp.allclose, [*first, use(m), m.w], expected))
    assert len(TRACES) == before
    # The same holds for another module of the same structure, and none of them is kept.
    other = L()
    use(other)
    assert len(TRACES) == before
    alive = [weakref.ref(m), weakref.ref(other), weakref.ref(m.w), weakref.ref(other.w)]
    del m, other, first
    gc.collect()
    assert [r() for r in alive] == [None] * 4


def test_what_a_function_closes_over_is_seen_by_the_next_call():
    m = L()
    results = []
    for scale in (1.0, 2.0, 1.0, True, np.float32(3), jnp.float32(4)):
        m.w = jnp.float32(0)
        results.append(float(scanned(m, scale)[-1]))
    assert results == [6, 12, 6, 6, 18, 24]


NET, SCALE = L(1), 1.0


class Trainer:
    rate = 1.0

    def __init__(self):
        self.net = L(1)
        self.traced = 0

    def step(self, c, x):
        self.traced += 1
        self.net.w = self.net.w + x * self.rate
        return c, self.net.w

    def run(self):
        return nnx.scan(self.step, None, XS)[1]


def test_methods_of_plain_objects():
    trainer = Trainer()
    trainer.run()
    traced = trainer.traced
    assert float(trainer.run()[-1]) == 13 and trainer.traced == traced
    trainer.net = L(100)
    assert float(trainer.run()[-1]) == 106 and trainer.traced == traced
    trainer.rate = 2.0
    assert float(trainer.run()[-1]) == 118
    ref = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert ref() is None


def test_attributes_of_functions():
    def made(net, factor):
        def helper(x):
            return helper.net.w * helper.factor + x

        def body(c, x):
            body.traced += 1
            return c, helper(x)

        helper.net, helper.factor, body.traced = net, factor, 0
        return helper, body

    helper, body = made(L(1), 2)
    assert float(nnx.scan(body, None, XS)[1][-1]) == 5
    traced = body.traced
    helper.net.w = helper.net.w + 1
    assert float(nnx.scan(body, None, XS)[1][-1]) == 7 and body.traced == traced > 0
    helper.net = L(10)
    assert float(nnx.scan(body, None, XS)[1][-1]) == 23
    helper.factor = 3
    assert float(nnx.scan(body, None, XS)[1][-1]) == 33
    assert float(nnx.scan(made(L(10), 4)[1], None, XS)[1][-1]) == 43


def test_globals_are_found_by_looking():
    global NET
    body = lambda c, x: (c, add(NET, x))
    NET = L(1)
    nnx.scan(body, None, XS)
    before = len(TRACES)
    assert float(nnx.scan(body, None, XS)[1][-1]) == 13 and len(TRACES) == before
    NET = L(50)
    assert float(nnx.scan(body, None, XS)[1][-1]) == 56 and NET.w == 56


def test_a_body_that_needs_a_value_is_run_as_it_is():
    n = jnp.array(3)
    for _ in range(2):
        out, _ = nnx.scan(lambda c, x: (c + sum(x for _ in range(int(n))), None), 0.0, XS)
        assert out == 18
    n = jnp.array(2)
    assert nnx.scan(lambda c, x: (c + sum(x for _ in range(int(n))), None), 0.0, XS)[0] == 12


def test_recursive_and_nested_functions_partials_and_methods():
    m = L(2)

    def power(x, k):
        return x if k == 0 else m.w * power(x, k - 1)

    class Net(nnx.Module):
        def __init__(self):
            self.inner = m

        def step(self, c, x):
            return c + self.inner.w * x, None

    net = Net()
    for _ in range(2):
        assert nnx.scan(lambda c, x: (c + power(x, 2), None), 0.0, XS)[0] == 24
        assert nnx.scan(net.step, 0.0, XS)[0] == 12
        step = functools.partial(lambda k, c, x: (c + k["a"] * x, None), {"a": jnp.array(3.0)})
        assert nnx.scan(step, 0.0, XS)[0] == 18
        assert nnx.cond(True, net.inner.__class__.w.__get__, lambda m: -m.w, m) == 2


@pytest.mark.parametrize("what", ["variable", "list of arrays", "list of modules"])
def test_what_is_outside_of_a_body_is_not_changed_in_it(what):
    total, seen, nets = jnp.zeros(()), [jnp.zeros(())], [L(1)]

    def variable(c, x):
        nonlocal total
        total = total + x
        return c, None

    def arrays(c, x):
        seen.append(x)
        return c, None

    def modules(c, x):
        nets.append(L(2))
        return c, None

    body = {"variable": variable, "list of arrays": arrays, "list of modules": modules}[what]
    with pytest.raises(nnx.StructureError, match=r"changed (the variable 'total'|a list).*Ref"):
        nnx.scan(body, None, XS)
    assert total == 0 and len(seen) == len(nets) == 1


def test_under_gradients_and_lanes_nothing_is_traced_again():
    m = L(2)
    loss = lambda m: nnx.scan(lambda c, x: (TRACES.append(1), (c + m.w * x, None))[1], 0.0, XS)[0]
    assert nnx.grad(loss)(m)["w"] == 6
    before = len(TRACES)
    assert nnx.grad(loss)(m)["w"] == 6 and len(TRACES) == before
    lanes = nnx.vmap(lambda x: nnx.cond(x > 1, lambda: m.w * x, lambda: -x))
    assert lanes(XS).tolist() == [0, -1, 4, 6]


def tracers():
    gc.collect()
    return sum(isinstance(x, jax.core.Tracer) for x in gc.get_objects())


def test_an_error_in_a_body_changes_nothing_and_leaves_nothing():
    def fail(m):
        m.w = m.w * 2
        raise ZeroDivisionError

    uses = [
        lambda m: nnx.scan(lambda c, x: (c, fail(m)), None, XS),
        lambda m: nnx.fori_loop(0, 3, lambda i, c: fail(m), None),
        lambda m: nnx.while_loop(lambda c: True, lambda c: fail(m), None),
        lambda m: nnx.cond(True, lambda: fail(m), lambda: None),
        lambda m: nnx.switch(0, [lambda: fail(m), lambda: None]),
        lambda m: nnx.map(lambda x: fail(m), XS),
        lambda m: nnx.remat(lambda: fail(m))(),
        lambda m: nnx.checkify(lambda: fail(m))(),
        lambda m: nnx.vmap(lambda x: fail(m))(XS),
        lambda m: nnx.grad(fail)(m),
        lambda m: nnx.jit(fail)(m),
    ]
    alive = []
    before = tracers()
    for use in uses:
        m = L(3)
        alive += [weakref.ref(m), weakref.ref(m.w)]
        with pytest.raises(ZeroDivisionError):
            use(m)
        assert m.w == 3
        del m
    gc.collect()
    assert [r() for r in alive] == [None] * len(alive)
    assert tracers() <= before


class TestWithoutJit:
    """Under `jax.disable_jit()`, bodies see numbers, as in JAX's own loops."""

    def test_everything_is_python(self):
        m = L(2)
        stack = jax.tree.map(lambda x: jnp.arange(3.0), m)

        def double(m):
            m.w = m.w + float(m.w)
            return float(m.w)

        def step(c, layer):
            layer.w = layer.w + float(layer.w) + 1
            return c + float(layer.w), layer.w

        with jax.disable_jit():
            assert nnx.jit(lambda x: float(x) * 2)(3.0) == 6
            assert nnx.jit(double)(m) == 4 and nnx.jit(lambda: double(m))() == 8 and m.w == 8
            assert nnx.cond(jnp.array(True), lambda: float(m.w), lambda: 1) == 8
            assert nnx.switch(7, [lambda: 1, lambda: float(m.w)]) == 8
            c, ys = nnx.scan(step, 0.0, stack)
            assert c == 9 and ys.tolist() == stack.w.tolist() == [1, 3, 5]
            _, ys = nnx.scan(step, 0.0, stack, reverse=True)
            assert ys.tolist() == stack.w.tolist() == [3, 7, 11]
            nnx.scan(lambda c, layer: (c, double(layer)), None, stack, axes={"other": 0, ...: 0})
            assert nnx.fori_loop(0, 3, lambda i, c: c + float(i), 0.0) == 3
            m.w = jnp.float32(16)
            assert nnx.while_loop(lambda c: float(c) < 5, lambda c: c * 2, 1.0) == 8
            assert nnx.jit_filter(lambda m, x: float(m.w) * float(x))(m, jnp.array(2.0)) == 32
            assert nnx.map(lambda x: float(x) * jnp.ones(1), XS).tolist() == [[0], [1], [2], [3]]

    def test_an_error_changes_nothing(self):
        m = L(2)

        def fail(m):
            m.w = m.w + 1
            raise ZeroDivisionError

        with jax.disable_jit(), pytest.raises(ZeroDivisionError):
            nnx.jit(fail)(m)
        assert m.w == 2


def test_a_stream_does_not_depend_on_the_branch():
    after = []
    for taken in (True, False):
        with nnx.scope(0):
            draw = lambda: jax.random.normal(nnx.make_rng()) + jax.random.normal(nnx.make_rng())
            nnx.cond(taken, draw, lambda: 0.0)
            after.append(jax.random.key_data(nnx.make_rng()).tolist())
    with nnx.scope(0):
        drawn = [jax.random.key_data(nnx.make_rng()).tolist() for _ in range(3)]
    assert after == [drawn[2]] * 2


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_environments_with_a_reset_of_their_own(wrap):
    def reset():
        return jax.random.normal(nnx.make_rng("env"))

    def rollout(state):
        step = lambda s, _: (nnx.cond(s > 0, lambda: s - 1, reset), s)
        return nnx.scan(step, state, None, length=5)[1]

    starts = jnp.array([-1.0, 0.5, 2.5, -1.0])
    with nnx.scope(0):
        many = wrap(nnx.vmap(rollout))(starts)
        again = wrap(nnx.vmap(rollout))(starts)
    assert many.shape == (4, 5) and not jnp.array_equal(many, again)
    assert len({float(x) for x in many[:, 1][jnp.array([0, 3])]}) == 2
    for row in many.tolist():
        assert all(abs(b - a + 1) < 1e-5 for a, b in zip(row, row[1:]) if a > 0)


class Noting(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(2, 2)

    def __call__(self, x, scale=1.0, *, flag=False, other=None):
        TRACES.append(1)
        x = self.linear(x) * scale + (1.0 if flag else 0.0)
        return x if other is None else x + other.linear(x)


@pytest.mark.parametrize(
    "options", [{}, {"flag": True}, {"scale": jnp.array(2.0), "flag": True}, {"other": Noting}]
)
def test_an_eager_stack_is_traced_once(options):
    with nnx.scope(jax.random.key(0)):
        stack = nnx.Stack(Noting, 3)
        given = {k: v() if v is Noting else v for k, v in options.items()}
    x = jnp.ones((1, 2))
    outs = [stack(x, **given)]
    before = len(TRACES)
    outs += [stack(x, **given) for _ in range(3)]
    assert len(TRACES) == before
    for layer in stack:
        x = layer(x, **given)
    np.testing.assert_allclose(outs, [x] * 4, rtol=1e-5)


def test_settings_in_a_new_container_cost_no_trace():
    def step(scale, c, x, *, power=1):
        TRACES.append(1)
        return c + scale * x**power, None

    def run(power, factors):
        options, factors = {"power": power}, list(factors)

        def body(c, x):
            return step(factors[0] * sum(f for f in factors), c, x, **options)

        partial = functools.partial(step, 2, power=power)
        return nnx.scan(body, 0.0, XS)[0], nnx.scan(partial, 0.0, XS)[0]

    assert run(1, [1, 2]) == (18, 12)
    before = len(TRACES)
    assert run(1, [1, 2]) == (18, 12) and len(TRACES) == before
    assert run(2, [1, 2]) == (42, 28) and run(1, [2, 2]) == (48, 12)


def test_a_container_that_the_body_fills_is_its_own():
    def run():
        seen = []

        def body(c, x):
            seen.append(1)
            return c, x

        nnx.scan(body, 0.0, XS)
        return len(seen)

    assert run() == run() > 0
