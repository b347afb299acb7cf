"""Functions that close over modules and Refs: never a stale constant, never a leaked tracer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from tests.models import Dense, sgd

GLOBAL = nnx.Ref(jnp.array(1.0))


def through_a_global(x):
    GLOBAL.value += x
    return GLOBAL.value


def test_reads_and_writes_are_lifted_without_an_extra_trace(dense, data):
    traces = []

    @nnx.jit
    def f(x):
        traces.append(1)
        return dense(x)

    x, _ = data
    for i in range(3):
        assert jnp.allclose(f(x), x @ dense.w + dense.b)
        dense.b = dense.b + 1
        assert dense.calls == i + 1
    assert len(traces) == 1


def test_globals_helpers_partials_and_defaults(dense):
    assert nnx.jit(through_a_global)(1.0) == GLOBAL.value
    assert nnx.jit(lambda x: through_a_global(x))(1.0) == GLOBAL.value

    def bump(m, by):
        m.b = m.b + by

    nnx.jit(functools.partial(bump, dense))(1.0)
    nnx.jit(functools.partial(bump, m=dense))(by=1.0)
    nnx.jit(lambda by, m=dense: bump(m, by))(1.0)
    assert (dense.b == 3).all()


def test_what_cannot_be_seen_is_found_by_reading(dense, data):
    class Holder:
        __slots__ = ("inner", "model", "ref")

    holder = Holder()
    holder.inner = Holder()
    holder.inner.model = dense
    traces = []

    @nnx.jit
    def f(x):
        traces.append(1)
        return holder.inner.model(x)

    x, _ = data
    with jax.check_tracer_leaks():
        for _ in range(3):
            assert jnp.allclose(f(x), x @ dense.w + dense.b)
            dense.b = dense.b + 1
    assert len(traces) == 2 and dense.calls == 3


def test_three_levels_deep_costs_one_extra_trace_for_each():
    class Holder:
        __slots__ = ("inner", "model", "ref")

    holder = Holder()
    holder.inner = Holder()
    ref = holder.inner.ref = nnx.Ref(jnp.array(1.0))
    traces = []

    @nnx.jit
    def outer(x):
        traces.append("outer")

        @nnx.jit
        def middle(x):
            traces.append("middle")

            @nnx.jit
            def inner(x):
                traces.append("inner")
                holder.inner.ref.value *= 2
                return holder.inner.ref.value + x

            return inner(x)

        return middle(x)

    with jax.check_tracer_leaks():
        assert outer(1.0) == 3.0 and outer(1.0) == 5.0 and ref.value == 4.0
    assert traces.count("outer") == 2
    assert traces.count("middle") <= 3 and traces.count("inner") <= 4


def test_the_same_model_as_argument_and_by_closure(dense):
    @nnx.jit
    def f(m):
        m.b = m.b + 1
        return dense.b.sum()

    other = Dense(seed=3)
    assert f(dense) == 2.0 and f(other) == 2.0 and f(dense) == 4.0
    assert (other.b == 1).all() and (dense.b == 2).all()


def test_closed_over_structure_and_names_are_not_stale(dense, data):
    x, _ = data
    model = nnx.Sequential(dense, nnx.Dropout(1.0))
    current = [dense]

    @nnx.jit
    def f(x):
        return model(x)

    @nnx.jit
    def g(x):
        return x @ sum(m.w for m in current)

    assert f(x).sum() == 0
    model.eval()
    assert jnp.allclose(f(x), x @ dense.w)
    model.layers.append(lambda x: x * 2)
    assert jnp.allclose(f(x), 2 * x @ dense.w)
    model = nnx.Sequential(Dense(seed=9))
    assert jnp.allclose(f(x), x @ model.layers[0].w)
    assert jnp.allclose(g(x), x @ dense.w)
    current.append(Dense(seed=4))
    assert jnp.allclose(g(x), x @ (dense.w + current[1].w))


def test_array_attributes_of_closed_over_modules_are_not_stale():
    class Table(nnx.Module):
        def __init__(self):
            self.table = jnp.arange(3.0)

    t = Table()
    f = nnx.jit(lambda: t.table.sum())
    assert f() == 3
    t.table = t.table * 2
    assert f() == 6


def test_a_trainer_that_is_not_a_module(data):
    class Trainer:
        def __init__(self):
            self.model = Dense()
            self.step = nnx.jit(self._step)

        def _step(self, x, y):
            sgd(self.model, x, y)

    trainer = Trainer()
    before = trainer.model.w
    trainer.step(*data)
    assert not (before == trainer.model.w).all()
    trainer.model = Dense(seed=8)
    trainer.step(*data)
    assert trainer.model.calls == 1


def test_closed_over_objects_go_out_as_the_callers_own(dense):
    ref = nnx.Ref(jnp.array(0.0))
    assert nnx.jit(lambda: (dense, ref))() == (dense, ref)
    hidden = {"deep": (dense,)}
    box = type("Box", (), {"content": hidden})()
    assert nnx.jit(lambda: box.content["deep"][0])() is dense


def test_structure_of_closed_over_modules_cannot_be_changed_inside(dense):
    with pytest.raises(nnx.TraceLevelError, match=r"'note' of a Dense was set inside nnx\.jit"):
        nnx.jit(lambda: setattr(dense, "note", 1))()
    model = nnx.Sequential(dense)
    with pytest.raises(nnx.StructureError, match=r"Sequential that nnx\.jit.* closes over"):
        nnx.jit(lambda: model.layers.append(1))()
    assert not hasattr(dense, "note") and len(model.layers) == 1


def test_grad_takes_what_it_closes_over_as_constant(dense, data):
    x, _ = data
    other = Dense(seed=2)
    grads = nnx.grad(lambda m: jnp.sum((x @ m.w) * (x @ other.w)))(dense)
    assert jnp.allclose(grads["w"], x.T @ (x @ other.w), atol=1e-5)
    with pytest.raises(
        nnx.TraceLevelError, match=r"'calls'|Dense\.calls.*constant there.*argument"
    ):
        nnx.grad(lambda m: jnp.sum(m(x) + other(x)))(dense)
    assert dense.calls == 0 and other.calls == 0


def test_grad_knows_the_one_it_differentiates_by_closure_too(dense, data):
    x, _ = data
    grads = nnx.grad(lambda m: jnp.sum(dense(x)))(dense)
    assert jnp.allclose(grads["b"], 4.0) and dense.calls == 1


def test_closures_inside_compiled_steps(dense, data):
    x, y = data

    @nnx.jit
    def step(model):
        def loss():
            return jnp.mean((model(x) - y) ** 2)

        with pytest.raises(nnx.TraceLevelError):
            nnx.grad(lambda unused: loss())(Dense())
        grads = nnx.grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
        return nnx.jit(lambda: model(x))(), grads

    out, grads = step(dense)
    assert jnp.allclose(out, x @ dense.w) and dense.calls == 2 and grads["w"].shape == (2, 2)


def test_a_plain_array_of_a_closed_over_module_becomes_one_of_another_library():
    class Plain(nnx.Module):
        pass

    model = Plain()
    model.table = np.arange(3)
    total = nnx.jit(lambda: model.table.sum())
    assert total() == 3
    model.table = jnp.arange(4)
    assert total() == 6
    model.table = np.arange(5)
    assert total() == 10
