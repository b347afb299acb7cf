"""Trace levels: who may read and write a Ref where; and the behaviour of JAX that refx/trace.py relies on."""

import threading

import jax
import jax.numpy as jnp
import pytest

import nnx
import refx
from refx import Ref
from refx.trace import EVAL, current_trace


def chain():
    trace, kinds = current_trace(()), []
    while trace is not None:
        kinds.append(type(trace).__name__)
        trace = getattr(trace, "parent_trace", None)
    return kinds


def test_jax_has_one_evaluating_trace_for_all_threads():
    seen = [current_trace(())]
    thread = threading.Thread(target=lambda: seen.append(current_trace(())))
    thread.start()
    thread.join()
    assert seen[0] is seen[1] is EVAL


def test_jax_traces_lead_to_their_parents():
    found = {}

    def note(name):
        return lambda x: found.setdefault(name, chain()) and x

    jax.jit(note("jit"))(1.0)
    jax.vmap(note("vmap"))(jnp.ones(2))
    jax.grad(note("grad"))(1.0)
    jax.jit(jax.vmap(jax.grad(note("all"))))(jnp.ones(2))
    assert found["jit"] == ["DynamicJaxprTrace", "EvalTrace"]
    assert found["vmap"] == ["BatchTrace", "EvalTrace"]
    assert found["grad"] == ["LinearizeTrace", "EvalTrace"]
    assert found["all"] == ["LinearizeTrace", "BatchTrace", "DynamicJaxprTrace", "EvalTrace"]


def test_jax_tracers_know_their_trace_and_their_batching():
    def look(x):
        assert x._trace is current_trace(())
        assert x.batch_dim == 0
        return x

    jax.vmap(look)(jnp.ones(2))


TRANSFORMS = {
    "jit": lambda f: jax.jit(f)(1.0),
    "vmap": lambda f: jax.vmap(f)(jnp.ones(2)),
    "grad": lambda f: jax.grad(f)(1.0),
    "scan": lambda f: jax.lax.scan(lambda c, x: (f(c), None), 1.0, None, length=2),
    "cond": lambda f: jax.lax.cond(True, f, lambda x: x, 1.0),
    "checkpoint": lambda f: jax.checkpoint(f)(1.0),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_write_inside_a_plain_transformation_is_an_error(name):
    ref = Ref(jnp.array(0.0), "params")

    def f(x):
        ref.value = jnp.array(1.0)
        return x

    with pytest.raises(refx.TraceLevelError, match=r"'params', float32\[\].*made outside of it"):
        TRANSFORMS[name](f)
    assert ref.value == 0.0


@pytest.mark.parametrize("name", ["jit", "scan", "cond", "checkpoint"])
def test_a_closed_over_value_is_not_baked_into_a_plain_program(name):
    ref = Ref(jnp.array(2.0), "params")
    with pytest.raises(refx.ClosureError, match=r"constant of the compiled program.*nnx\.jit"):
        TRANSFORMS[name](lambda x: x * ref.value)
    with pytest.raises(refx.ClosureError):
        jax.jit(jax.vmap(lambda x: x * ref.value))(jnp.ones(2))


def test_a_closed_over_value_is_read_where_nothing_is_kept():
    ref = Ref(jnp.array(2.0))
    assert jax.vmap(lambda x: x * ref.value)(jnp.ones(2)).tolist() == [2.0, 2.0]
    assert jax.grad(lambda x: x * ref.value)(1.0) == 2.0


def test_a_tracer_of_an_ended_transformation_is_refused():
    kept = []
    jax.vmap(lambda x: kept.append(x) or x)(jnp.ones(2))
    ref = Ref(jnp.array(0.0), "params")
    with pytest.raises(refx.ForeignTracerError, match=r"another JAX transformation.*leak"):
        ref.value = {"a": kept[0]}
    with pytest.raises(refx.ForeignTracerError, match="A new Ref"):
        Ref(kept[0])
    assert ref.value == 0.0


def test_the_forward_rule_of_an_eager_custom_vjp_cannot_leak():
    # It runs at the top level, where the Ref may be written, while grad's tracers are visible.
    ref = Ref(jnp.array(0.0))

    def outer(x):
        @jax.custom_vjp
        def f(y):
            return y

        def fwd(y):
            ref.value = x
            return y, None

        f.defvjp(fwd, lambda residual, g: (g,))
        return f(x * 2)

    with pytest.raises(refx.RefError):
        jax.grad(outer)(1.0)
    assert ref.value == 0.0


def test_a_ref_of_an_ended_body_says_so():
    kept = []

    @nnx.jit
    def keep(r):
        kept.extend([r, Ref(r.value * 2, "made")])

    keep(Ref(jnp.array(1.0), "params"))
    for ref in kept:
        with pytest.raises(refx.EndedTraceError, match=r"made inside nnx.jit\(.*keep\).*Return"):
            _ = ref.value
        with pytest.raises(refx.EndedTraceError):
            ref.value = 1.0


def test_a_module_of_an_ended_body_cannot_be_changed(dense):
    kept = []
    nnx.jit(lambda m: kept.append(m))(dense)
    with pytest.raises(refx.EndedTraceError, match=r"'note' of a Dense .* had ended"):
        kept[0].note = 1


def test_a_ref_of_a_running_body_is_not_for_other_threads():
    errors = []

    @nnx.jit
    def body(r):
        def use():
            try:
                _ = r.value
            except refx.RefError as error:
                errors.append(error)

        thread = threading.Thread(target=use)
        thread.start()
        thread.join()

    body(Ref(jnp.array(1.0)))
    assert isinstance(errors[0], refx.TraceLevelError) and "another thread" in str(errors[0])


def test_refs_made_in_a_plain_transformation_may_be_written_there():
    def f(x):
        ref = Ref(x)
        ref.value = ref.value * 3
        return jax.vmap(lambda y: y * ref.value)(jnp.ones(2)).sum()

    assert jax.jit(f)(1.0) == 6.0
    assert jax.grad(f)(1.0) == 6.0


def test_value_copies_are_read_only_and_clones_of_them_are_not(dense, data):
    x, _ = data
    with pytest.raises(refx.ReadOnlyError, match=r"Dense\.calls .*copy.*nnx\.clone"):
        jax.jit(lambda m, x: m(x))(dense, x)

    def functional(m, x):
        m = nnx.clone(m)
        m(x)
        return m

    after = jax.jit(functional)(dense, x)
    assert after.calls == 1 and dense.calls == 0
    after.calls = jnp.array(7)
    with pytest.raises(refx.ReadOnlyError, match="'extra' of a Dense"):
        jax.jit(lambda m: setattr(m, "extra", 1))(dense)
    assert not hasattr(dense, "extra")


def test_vmap_with_an_unmapped_leaf_is_read_only_too(dense):
    axes = jax.tree.map(lambda _: None, dense)
    with pytest.raises(refx.ReadOnlyError):
        jax.vmap(lambda m, x: setattr(m, "b", m.b + 1), in_axes=(axes, 0))(dense, jnp.ones(2))
