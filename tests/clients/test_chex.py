"""chex: assertions on values, code without jit, and variants of tests."""

import unittest

import chex
import jax
import jax.numpy as jnp
import pytest

import nnx

X = jnp.ones((3, 2))


@pytest.fixture
def net():
    return nnx.Linear.init(0)(2, 2)


def test_chexify_takes_a_frozen_module(net):
    for jit in (jax.jit, nnx.jit):

        @chex.chexify
        @jit
        def call(model, x):
            y = model(x)
            chex.assert_tree_all_finite(y)
            return y

        assert jnp.allclose(call(nnx.frozen(net), X), net(X))
        broken = nnx.clone(net)
        broken.bias = broken.bias * jnp.nan
        with pytest.raises(AssertionError, match="finite"):
            call(nnx.frozen(broken), X)
            call.wait_checks()
        with pytest.raises(nnx.ClosureError, match=r"checkify.*use nnx\.frozen\(model\)"):
            call(net, X)


def test_code_runs_without_jit_where_chex_fakes_it(net):
    seen = []

    def call(model, x):
        seen.append(isinstance(x, jax.core.Tracer))
        return model(x)

    step = nnx.jit(call)
    step(net, X)
    with chex.fake_jit():
        step(net, X)
        nnx.jit(call)(net, X)
    with chex.fake_pmap_and_jit():
        step(net, X)
    step(net, X)
    assert seen == [True, False, False, False]


def test_variants_of_a_test(net):
    class Test(chex.TestCase):
        @chex.variants(with_jit=True, without_jit=True, with_device=True, with_pmap=True)
        def test_call(self):
            out = self.variant(lambda model, x: model(x))(net, X)
            chex.assert_trees_all_close(out, net(X), atol=1e-5)

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Test).run(result)
    assert result.testsRun == 4 and result.wasSuccessful(), result.errors


def test_assertions_about_trees_and_traces(net):
    chex.assert_trees_all_equal(net, nnx.clone(net))
    chex.assert_trees_all_equal_shapes(net, jax.tree.map(jnp.zeros_like, net))
    with pytest.raises(AssertionError, match="kernel"):
        chex.assert_trees_all_equal(net, nnx.Linear.init(1)(2, 2))
    step = nnx.jit(chex.assert_max_traces(lambda model, x: model(x), n=1))
    step(net, X)
    step(net, X)
    with pytest.raises(AssertionError, match="traced"):
        step(net, X[:2])
    chex.clear_trace_counter()


def test_a_chex_dataclass_of_a_module(net):
    @chex.dataclass
    class State:
        net: nnx.Module
        step: jax.Array

    @nnx.jit
    def update(state):
        state.net.bias = state.net.bias + 1
        return state.replace(step=state.step + 1)

    before = net.bias
    new = update(State(net=net, step=jnp.array(0)))
    assert new.net is net and new.step == 1 and jnp.array_equal(net.bias, before + 1)
