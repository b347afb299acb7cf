"""Every change between two calls is seen: nothing remembered may be stale."""

import gc
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from tests.models import Dense, Net


class Plain(nnx.Module):
    pass


def evaluate(x):
    """One number for a whole tree, as eager code sees it."""
    if isinstance(x, nnx.Ref):
        return jnp.sum(x.value) + 1
    if isinstance(x, nnx.Module):
        return sum((evaluate(v) * (i + 2) for i, v in enumerate(vars_of(x).values())), 0.5)
    if isinstance(x, dict):
        return sum((evaluate(v) * (i + 3) + len(k) for i, (k, v) in enumerate(x.items())), 0.25)
    if isinstance(x, list | tuple):
        return sum((evaluate(v) * (i + 5) for i, v in enumerate(x)), 0.125)
    if isinstance(x, jax.Array | np.ndarray):
        return jnp.sum(x) * 7
    if isinstance(x, int | float | np.generic):
        return (
            jnp.asarray(x).dtype.itemsize * 100
            + jnp.copysign(11.0, float(x))
            + x * 1.5
            + (1000 if isinstance(x, bool) else 0)
            + (500 if isinstance(x, float) else 0)
        )
    return 3.0 if x is None else float(len(str(x)))


def vars_of(module):
    return module._dict


def model():
    m = Plain()
    m.first = Dense(seed=1)
    m.items = [Dense(seed=2), 2, [nnx.Ref(jnp.array(3.0)), "s"]]
    m.table = {"a": Dense(seed=3), "b": (1, nnx.Ref(jnp.array(4.0)))}
    m.array = jnp.arange(3.0)
    m.arrays = (jnp.ones(2), 5)
    m.count, m.zero, m.flag, m.name, m.none = 2, 0.0, True, "n", None
    m.tied = m.first
    return m


def tie(m):
    m.table["a"].w = nnx.get_ref(m.first, "w")


def untie(m):
    m.first.b = nnx.Ref(m.first.b + 1, "params")


CHANGES = {
    "attribute set": lambda m: setattr(m, "count", 7),
    "attribute added": lambda m: setattr(m, "more", 7),
    "attribute deleted": lambda m: delattr(m, "name"),
    "attribute renamed": lambda m: (setattr(m, "second", m.first), delattr(m, "first")),
    "last attribute renamed": lambda m: (setattr(m, "knot", m.tied), delattr(m, "tied")),
    "through vars()": lambda m: vars(m).update(count=9),
    "through vars(), deleted": lambda m: vars(m).pop("count"),
    "through vars(), equal number": lambda m: vars(m).update(count=2.0),
    "through vars(), bool for int": lambda m: vars(m).update(flag=1),
    "nested attribute": lambda m: setattr(m.first, "extra", 1),
    "equal number of another type": lambda m: setattr(m, "count", 2.0),
    "number by an equal array": lambda m: setattr(m, "count", jnp.array(2)),
    "number by an equal NumPy number": lambda m: setattr(m, "count", np.float32(2)),
    "number by an array of several": lambda m: setattr(m, "count", jnp.ones(3)),
    "negative zero": lambda m: setattr(m, "zero", -0.0),
    "list append": lambda m: m.items.append(3),
    "list insert": lambda m: m.items.insert(0, Dense(seed=9)),
    "list replace": lambda m: m.items.__setitem__(0, Dense(seed=8)),
    "list number by its equal": lambda m: m.items.__setitem__(1, 2.0),
    "list reverse": lambda m: m.items.reverse(),
    "list sort": lambda m: m.items.sort(key=lambda x: str(type(x))),
    "list clear": lambda m: m.items.clear(),
    "nested list": lambda m: m.items[2].append("t"),
    "list by an equal list, then append": lambda m: (
        setattr(m, "items", list(m.items)),
        m.items.append(1),
    ),
    "dict item": lambda m: m.table.__setitem__("c", nnx.Ref(jnp.array(9.0))),
    "dict item replaced": lambda m: m.table.__setitem__("a", 3),
    "dict pop": lambda m: m.table.pop("a"),
    "tuple replaced": lambda m: m.table.__setitem__("b", (2, m.table["b"][1])),
    "tuple by an equal one": lambda m: m.table.__setitem__("b", (1.0, m.table["b"][1])),
    "array replaced": lambda m: setattr(m, "array", jnp.arange(4.0)),
    "array by one of the same shape": lambda m: setattr(m, "array", m.array + 1),
    "scalar array by an equal one of another dtype": lambda m: setattr(m, "array", jnp.array(1)),
    "array in a tuple": lambda m: setattr(m, "arrays", (jnp.zeros(2), 5)),
    "array by a static": lambda m: setattr(m, "array", 3),
    "static by an array": lambda m: setattr(m, "none", jnp.ones(2)),
    "Ref by another Ref": lambda m: m.items[2].__setitem__(0, nnx.Ref(jnp.array(8.0))),
    "Ref of another collection": lambda m: m.items[2].__setitem__(0, nnx.Ref(jnp.array(3.0), "c")),
    "field Ref by another": lambda m: setattr(m.first, "w", nnx.Ref(jnp.zeros((2, 2)), "params")),
    "field to None": lambda m: setattr(m.first, "b", None),
    "tie made": tie,
    "tie broken": untie,
    "module by another": lambda m: setattr(m, "first", Dense(seed=6)),
    "value written": lambda m: setattr(m.first, "b", m.first.b + 1),
}


@pytest.fixture(scope="module")
def compiled():
    return nnx.jit(evaluate), jax.jit(evaluate)


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_seen(name, compiled):
    stateful, plain = compiled
    m = model()
    before = stateful(m)
    assert jnp.allclose(before, evaluate(m)) and jnp.allclose(plain(m), before)
    structure = nnx.split(m)[0]
    CHANGES[name](m)
    assert jnp.allclose(stateful(m), evaluate(m))
    assert jnp.allclose(plain(m), evaluate(m))
    assert nnx.split(m)[0] is nnx.split(nnx.clone(m))[0]
    if name not in ("value written", "tie broken") and "array by one" not in name:
        unchanged = nnx.split(m)[0] is structure and jnp.allclose(before, evaluate(m))
        assert not unchanged


def test_two_models_swapped_and_shared_in_the_arguments():
    @nnx.jit
    def f(a, b):
        a.b = a.b + 1
        return a.w.sum() - 2 * b.b.sum()

    a, b = Dense(seed=1), Dense(seed=2)
    for x, y in [(a, b), (b, a), (a, a), (b, a)]:
        before = float(x.b[0])
        expected = x.w.sum() - 2 * (y.b + (y is x)).sum()
        assert jnp.allclose(f(x, y), expected)
        assert float(x.b[0]) == before + 1


def test_a_model_made_at_the_address_of_a_dead_one():
    f = nnx.jit(lambda m: m.w.sum() * m.factor)
    for i in range(20):
        m = Dense(seed=i)
        m.factor = i % 3
        assert jnp.allclose(f(m), m.w.sum() * m.factor)
        del m
        gc.collect(1)


def test_refs_come_and_go_as_arguments():
    @nnx.jit
    def f(a, b, m):
        a.value += 1
        return a.value + 10 * b.value + m.w.sum()

    m = Dense()
    for i in range(20):
        a = nnx.Ref(jnp.array(float(i)))
        b = a if i % 2 else nnx.Ref(jnp.array(1.0))
        expected = (i + 1) + 10 * (i + 1 if i % 2 else 1) + m.w.sum()
        assert jnp.allclose(f(a, b, m), expected)


def test_two_threads_with_separate_models():
    step = nnx.jit(lambda m, x: m(x) * len(m.blocks))
    errors = []

    def work(seed):
        try:
            x = jnp.ones((1, 2)) * seed
            m = Net()
            for i in range(15):
                if i % 5 == 4:
                    m.blocks.append(Dense(seed=seed + i))
                calls = int(m.blocks[0].calls)
                expected = nnx.clone(m)(x) * len(m.blocks)
                assert jnp.allclose(step(m, x), expected, atol=1e-5)
                assert int(m.blocks[0].calls) == calls + 2
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors


def test_a_dead_model_is_freed():
    import weakref

    f = nnx.jit(lambda m: m.w.sum())
    m = Dense()
    f(m)
    alive = weakref.ref(m)
    array = weakref.ref(nnx.get_ref(m, "w"))
    del m
    gc.collect()
    assert alive() is None and array() is None
