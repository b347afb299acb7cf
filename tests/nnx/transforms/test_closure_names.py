"""If a closed-over name leads elsewhere at the next call of a compiled function, that is seen."""

import gc
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx import Ref
from tests.models import Dense


class Plain(nnx.Module):
    pass


class Holder:
    pass


def agree(compiled, eager):
    np.testing.assert_allclose(compiled(), eager(), rtol=1e-5)


def test_names_rebound_among_the_same_modules():
    x, y = Dense(seed=1), Dense(seed=2)
    a, b, c = x, x, y

    def f():
        return a.w.sum() + 10 * b.w.sum() + 100 * c.w.sum()

    compiled = nnx.jit(f)
    agree(compiled, f)
    b = y
    agree(compiled, f)
    a, c = y, x
    agree(compiled, f)
    a, b, c = x, x, y
    agree(compiled, f)


def test_a_dict_whose_keys_change_places():
    x, y = Dense(seed=1), Dense(seed=2)
    table = {"a": x, "b": y}

    def f():
        return table["a"].w.sum() + 10 * table["b"].w.sum()

    compiled = nnx.jit(f)
    agree(compiled, f)
    table.clear()
    table.update(b=x, a=y)
    agree(compiled, f)


def test_a_list_in_a_dict_that_grows():
    table = {"layers": [Dense(seed=1)]}

    def f():
        return sum(m.w.sum() for m in table["layers"])

    compiled = nnx.jit(f)
    agree(compiled, f)
    table["layers"].append(Dense(seed=2))
    agree(compiled, f)
    table["layers"].pop(0)
    agree(compiled, f)


def test_a_module_moved_between_two_closed_over_lists():
    x, y = Dense(seed=1), Dense(seed=2)
    table = [[x, y], []]

    def f():
        return sum(m.w.sum() for m in table[0]) + 10 * sum(m.w.sum() for m in table[1])

    compiled = nnx.jit(f)
    agree(compiled, f)
    table[1].append(table[0].pop())
    agree(compiled, f)


def test_an_attribute_of_an_object_in_an_object():
    holder = Holder()
    holder.inner = Holder()
    holder.inner.model = Dense(seed=1)

    def f():
        return holder.inner.model.w.sum()

    compiled = nnx.jit(f)
    agree(compiled, f)
    holder.inner.model = Dense(seed=2)
    agree(compiled, f)


def test_an_attribute_of_a_class_and_of_a_namespace():
    class Config:
        model = Dense(seed=1)

    space = types.SimpleNamespace(config=Config)

    def f():
        return space.config.model.w.sum()

    compiled = nnx.jit(f)
    agree(compiled, f)
    Config.model = Dense(seed=2)
    agree(compiled, f)


def test_an_object_in_a_static_attribute_cannot_hide_modules():
    model = Plain()
    model.helper = Holder()
    model.helper.layer = Dense(seed=1)
    with pytest.raises(
        nnx.StructureError, match=r"'helper' is a Holder that holds Refs.*nnx\.Module"
    ):
        nnx.jit(lambda m: m.helper.layer.w.sum())(model)


@pytest.mark.parametrize("where", ["cell", "attribute"])
def test_a_name_that_was_none(where):
    holder, model = Holder(), None
    holder.model = None

    def f():
        m = model if where == "cell" else holder.model
        return 0.0 if m is None else m.w.sum()

    compiled = nnx.jit(f)
    agree(compiled, f)
    model = holder.model = Dense(seed=2)
    agree(compiled, f)
    model = holder.model = None
    agree(compiled, f)


def test_a_name_that_is_bound_to_a_ref_then_to_a_module():
    thing = Ref(jnp.array(2.0))

    def f():
        return thing.value if isinstance(thing, Ref) else thing.w.sum()

    compiled = nnx.jit(f)
    agree(compiled, f)
    thing = Dense(seed=1)
    agree(compiled, f)


def test_a_helper_that_is_replaced():
    x, y = Dense(seed=1), Dense(seed=2)
    helper = lambda: x.w.sum()

    def f():
        return helper()

    compiled = nnx.jit(f)
    agree(compiled, f)
    helper = lambda: y.w.sum()
    agree(compiled, f)


def test_a_numpy_attribute_changed_in_place():
    model = Plain()
    model.table = np.arange(3.0)

    def f():
        # Copy it, because JAX caches constants made from a NumPy array by its identity.
        return jnp.sum(model.table.copy())

    compiled = nnx.jit(f)
    agree(compiled, f)
    model.table[0] = 10
    agree(compiled, f)


def test_writes_go_to_the_module_that_the_name_is_bound_to_now():
    holder = Holder()
    holder.inner = Holder()
    first = holder.inner.model = Dense(seed=1)
    step = nnx.jit(lambda x: holder.inner.model(x))
    step(jnp.ones((1, 2)))
    second = holder.inner.model = Dense(seed=2)
    step(jnp.ones((1, 2)))
    assert (first.calls, second.calls) == (1, 1)


def test_a_module_that_no_name_leads_to_any_more_is_freed():
    holder = Holder()
    holder.inner = Holder()
    holder.inner.model = Dense(seed=1)
    step = nnx.jit(lambda x: holder.inner.model(x))
    step(jnp.ones((1, 2)))
    old = weakref.ref(holder.inner.model)
    holder.inner.model = Dense(seed=2)
    step(jnp.ones((1, 2)))
    gc.collect()
    assert old() is None


# ---- one Ref, reached in two ways through two boundaries


def test_an_argument_of_an_inner_call_that_is_closed_over_by_its_outer_name():
    def outer(m):
        def inner(k):
            k.b = k.b + 1
            return dense.b.sum()

        return nnx.jit(inner)(m)

    dense = Dense()
    assert outer(dense) == 2.0
    dense = Dense()
    assert nnx.jit(outer)(dense) == 2.0 and (dense.b == 1).all()


def test_two_names_of_one_module_closed_over_by_an_inner_call():
    def outer(m):
        def inner():
            m.b = m.b + 1
            return dense.b.sum()

        return nnx.jit(inner)()

    dense = Dense()
    assert outer(dense) == 2.0
    dense = Dense()
    assert nnx.jit(outer)(dense) == 2.0 and (dense.b == 1).all()


def test_an_inner_gradient_of_the_module_by_its_outer_name(data):
    x, _ = data
    dense = Dense()

    def step(m):
        return nnx.grad(lambda k: jnp.sum(x @ dense.w) + k.b.sum())(m)["w"]

    expected = jnp.broadcast_to(x.sum(0)[:, None], (2, 2))
    np.testing.assert_allclose(step(dense), expected, rtol=1e-5)
    np.testing.assert_allclose(nnx.jit(step)(dense), expected, rtol=1e-5)


# ---- a plain jax.jit, which has its own cache, inside a stateful transformation


def call_or_refuse(f, expected):
    """The right answer or an error, but never a stale value."""
    try:
        result = f()
    except nnx.ClosureError as error:
        assert "nnx" in str(error)
        return
    np.testing.assert_allclose(jax.tree.leaves(result), jax.tree.leaves(expected), rtol=1e-6)


def test_a_plain_jit_in_a_stateful_one_after_a_write():
    ref = Ref(jnp.array(1.0))
    plain = jax.jit(lambda x: x * ref.value)

    @nnx.jit
    def f(x):
        before = plain(x)
        ref.value = ref.value * 2
        return before, plain(x)

    call_or_refuse(lambda: f(1.0), (1.0, 2.0))


def test_a_plain_scan_in_a_stateful_jit_after_a_write():
    @nnx.jit
    def f(ref, xs):
        def body(carry, x):
            return carry + x * ref.value, None

        before = jax.lax.scan(body, 0.0, xs)[0]
        ref.value = ref.value * 2
        return before, jax.lax.scan(body, 0.0, xs)[0]

    call_or_refuse(lambda: f(Ref(jnp.array(1.0)), jnp.ones(3)), (3.0, 6.0))


def test_a_plain_jit_in_two_stateful_ones():
    ref = Ref(jnp.array(1.0))
    plain = jax.jit(lambda x: x * ref.value)
    f, g = nnx.jit(lambda x: plain(x)), nnx.jit(lambda x: plain(x) + 1)
    # JAX keeps the inner program with a tracer of the first body, and says so itself.
    with pytest.raises(jax.errors.UnexpectedTracerError):
        (f(1.0), g(1.0))


@pytest.mark.parametrize("name", ["grad", "value_and_grad", "vmap"])
def test_a_plain_jit_in_an_eager_transformation(name):
    ref = Ref(jnp.array(1.0))
    plain = jax.jit(lambda x: x * ref.value)
    model = Dense()
    run = {
        "grad": lambda: nnx.grad(lambda m: plain(m.w).sum())(model)["w"][0, 0],
        "value_and_grad": lambda: nnx.value_and_grad(lambda m: plain(m.w).sum())(model)[1]["w"][
            0, 0
        ],
        "vmap": lambda: nnx.vmap(plain)(jnp.ones(2))[0],
    }[name]
    call_or_refuse(run, 1.0)
    ref.value = jnp.array(5.0)
    call_or_refuse(run, 5.0)
