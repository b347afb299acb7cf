"""Lists and dicts take any item without asking: what a body changes in them is noticed afterwards."""

import functools

import jax
import jax.numpy as jnp
import pytest

import nnx


class Cached(nnx.Module):
    w: jax.Array = nnx.param()

    def __init__(self):
        self.w = jnp.array(2.0)
        self.cache = {"k": jnp.zeros(3), "a": 1}
        self.hist = []

    @functools.cached_property
    def table(self):
        return jnp.arange(3.0)

    def __call__(self, i):
        self.cache["k"] = self.cache["k"].at[i].set(self.w)
        return self.cache["k"].sum()


def state(model):
    return list(model.cache), model.cache["k"].tolist(), model.hist, sorted(vars(model))


UNTOUCHED = ["k", "a"], [0, 0, 0], [], ["cache", "hist", "w"]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m(0),
        lambda m: m.hist.append(1),
        lambda m: m.hist.append(jnp.ones(2)),
        lambda m: m.cache.pop("a"),
        lambda m: m.cache.update(a=m.cache.pop("a"), k=m.cache.pop("k")),
        lambda m: m.table,
    ],
)
def test_a_closed_over_container_changed_in_jit(change):
    model = Cached()
    message = (
        r"A Cached that nnx\.jit.* closes over was changed inside it: .* Pass the module as an"
    )
    for _ in range(2):
        with pytest.raises(nnx.StructureError, match=message):
            nnx.jit(lambda: (model.w, change(model)) and None)()
        assert state(model) == UNTOUCHED

    def fails():
        change(model)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        nnx.jit(fails)()
    assert state(model) == UNTOUCHED


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: nnx.vmap(f)(jnp.arange(3)),
        lambda f: nnx.remat(f)(0),
        lambda f: nnx.scan(lambda c, i: (c, f(i)), None, jnp.arange(3)),
        lambda f: nnx.cond(True, f, lambda i: 0.0, 1),
        lambda f: nnx.jit(lambda: nnx.remat(f)(0))(),
    ],
)
def test_a_tracer_in_a_closed_over_container(transform):
    model = Cached()
    with pytest.raises(nnx.StructureError, match=r"A Cached that nnx\..* closes over was .* a Ref"):
        transform(lambda i: model(i))


def test_as_an_argument_such_changes_propagate():
    model = Cached()
    nnx.jit(lambda m: m(1))(model)
    nnx.jit(lambda m: m.hist.append(m.w))(model)
    assert model.cache["k"].tolist() == [0, 2, 0] and float(model.hist[0]) == 2


def inc(ref, by=1.0):
    ref.value["a"] = ref.value["a"] + by


@pytest.mark.parametrize(
    "count, transform",
    [
        (3, lambda r: nnx.scan(lambda c, x: (c, inc(r)), None, None, length=3)),
        (3, lambda r: nnx.scan(lambda r, x: (r, inc(r)), r, None, length=3)),
        (3, lambda r: nnx.while_loop(lambda r: r.value["a"] < 3, lambda r: (inc(r), r)[1], r)),
        (1, lambda r: nnx.cond(True, lambda: inc(r), lambda: None)),
        (1, lambda r: nnx.remat(lambda: inc(r))()),
        (1, lambda r: nnx.jit(lambda: inc(r))()),
        (1, lambda r: nnx.jit(inc)(r)),
        (
            1,
            lambda r: nnx.grad(lambda w, r: (inc(r, w.value), w.value)[1])(
                nnx.Ref(1.0, "params"), r
            ),
        ),
    ],
)
def test_a_dict_in_a_ref_changed_in_place(count, transform):
    ref = nnx.Ref({"a": jnp.zeros(())}, "cache")
    transform(ref)
    assert float(ref.value["a"]) == count and not isinstance(ref.value["a"], jax.core.Tracer)


def test_a_dict_in_a_ref_changed_in_place_where_it_may_not_be_written():
    ref = nnx.Ref({"a": jnp.zeros(())}, "cache")
    w = nnx.Ref(jnp.array(1.0), "params")

    def fails(w, ref):
        inc(ref, w.value)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        nnx.grad(fails)(w, ref)
    with pytest.raises(nnx.TraceLevelError, match="a closed-over Ref is a constant there"):
        nnx.grad(lambda w: (inc(ref, w.value), w.value)[1])(w)
    with pytest.raises(nnx.AxisError, match="value that differs between the lanes"):
        nnx.vmap(lambda x: inc(ref, x))(jnp.arange(3.0))
    assert ref.value == {"a": 0.0}


def test_other_keys_with_the_same_leaves_are_a_change():
    ref = nnx.Ref({"a": jnp.zeros(())}, "cache")
    nnx.jit(lambda r: r.value.update(b=r.value.pop("a")))(ref)
    nnx.jit(lambda r: r.value.update(c=None))(ref)
    assert ref.value == {"b": 0.0, "c": None}
