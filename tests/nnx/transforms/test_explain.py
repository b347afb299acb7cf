"""`step.explain` names the reason for every kind of new program, and nothing else."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx.debug import TooManyTracesError, assert_max_traces, retraces


class Drop(nnx.Module):
    def __init__(self, rate=0.1):
        self.rate = rate

    def __call__(self, x):
        return x * (1 - self.rate)


class Cell(nnx.Module):
    w: jax.Array = nnx.param()

    def __init__(self):
        self.w, self.drops, self.table = jnp.ones(3), [Drop(), Drop()], {"a": 1}
        self.plain = jnp.zeros(2)

    def __call__(self, x):
        for drop in self.drops:
            x = drop(x)
        return x * self.w


class Other(Cell):
    pass


X = jnp.ones((4, 3))


def basic():
    return nnx.jit(lambda model, x, **more: model(x)), Cell()


def set_at(path, value):
    def change(model):
        *front, last = path
        for name in front:
            model = model[name] if isinstance(model, list | dict) else getattr(model, name)
        if isinstance(model, list | dict):
            model[last] = value
        else:
            setattr(model, last, value)

    return change


def tie(model):
    model.extra = nnx.get_ref(model, "w")


def untie(model):
    model.other = nnx.get_ref(model, "w")


# Changes of a module that was called before, and the reasons; all of them.
CHANGES = {
    "setting": (set_at(["drops", 1, "rate"], 0.2), ["model.drops.1.rate: 0.1 → 0.2"]),
    "its type": (set_at(["table", "a"], True), ["model.table.a: 1 → True"]),
    "its type, alike": (set_at(["table", "a"], np.int64(1)), [r"model.table.a: .*1.* → np.int64\(1\)"]),
    "a new setting": (set_at(["mode"], "fast"), ["the setting 'model.mode' = 'fast' was added"]),
    "a setting less": (lambda m: m.table.clear(), ["the setting 'model.table.a' = 1 was removed"]),
    "a Ref": (
        lambda m: setattr(m, "lora_a", nnx.Ref(jnp.ones(2), "lora")),
        ["a Ref 'model.lora_a' was added"],
    ),
    "a Ref less": (lambda m: delattr(m, "w"), ["a Ref 'model.w' was removed"]),
    "a layer": (lambda m: m.drops.append(Drop()), ["a Drop 'model.drops.2' was added"]),
    "another layer": (lambda m: m.drops.__setitem__(0, nnx.LayerNorm(3)), ["model.drops.0: Drop → LayerNorm"]),
    "a function for a layer": (
        set_at(["drops", 0], jnp.tanh),
        ["model.drops.0: a Drop → the setting"],
    ),
    "an array": (set_at(["more"], jnp.ones(2)), ["an array 'model.more' was added"]),
    "a collection": (
        lambda m: (delattr(m, "w"), setattr(m, "w", nnx.Ref(jnp.ones(3), "frozen"))),
        ["Ref 'model.w': 'params' → 'frozen'"],
    ),
    "metadata": (
        lambda m: (delattr(m, "w"), setattr(m, "w", nnx.Ref(jnp.ones(3), "params", axis="x"))),
        ["the metadata of Ref 'model.w': {} → {'axis': 'x'}"],
    ),
    "a shared layer": (
        lambda m: m.drops.append(m.drops[0]),
        ["a shared object 'model.drops.2' was added"],
    ),
    "sharing": (
        lambda m: m.drops.__setitem__(1, m.drops[0]),
        ["model.drops.1: a Drop → a shared object"],
    ),
    "the shape of a Ref": (set_at(["w"], jnp.ones((4, 3))), [r"model.w: float32\[3\] → float32\[4,3\]"]),
    "the dtype of a Ref": (
        set_at(["w"], jnp.ones(3, jnp.bfloat16)),
        [r"model.w: float32\[3\] → bfloat16\[3\]"],
    ),
    "an array's shape": (set_at(["plain"], jnp.ones(5)), [r"model.plain: float32\[2\] → float32\[5\]"]),
    "an order": (
        lambda m: m.__setattr__("table", {"b": 2, **m.table}),
        ["the setting 'model.table.b' = 2 was added"],
    ),
    "no array in a Ref": (
        lambda m: (delattr(m, "w"), setattr(m, "w", nnx.Ref(2.0, "params"))),
        [r"model.w: float32\[3\] → float32\[\]"],
    ),
    "several": (
        lambda m: (set_at(["drops", 0, "rate"], 0.5)(m), m.drops.pop()),
        ["model.drops.0.rate: 0.1 → 0.5", "a Drop 'model.drops.1' was removed"],
    ),
}  # fmt: skip


def check(step, call, reasons, count=2):
    """The text of `explain` before a call, of `retraces` during it, and of `explain` after it."""
    args, kwargs = call
    before = step.explain(*args, **kwargs)
    assert not before.compiled
    assert len(before.reasons) == len(reasons), before
    import re

    for reason, expected in zip(before.reasons, reasons, strict=True):
        assert re.fullmatch(expected, reason) or expected in reason, (reason, expected)
    with retraces() as seen:
        step(*args, **kwargs)
        step(*args, **kwargs)
    assert [e.reasons for e in seen] == [before.reasons]
    assert step.explain(*args, **kwargs).compiled
    assert str(before).splitlines()[0].endswith(f"program number {count}:")


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_a_module(name):
    change, reasons = CHANGES[name]
    if name == "a Ref less":
        step, model = nnx.jit(lambda model, x: x), Cell()
    else:
        step, model = basic()
    step(model, X)
    assert step.explain(model, X).compiled and step.explain(Cell(), X + 1).compiled
    change(model)
    check(step, ((model, X), {}), reasons)


ARGUMENTS = {
    "shape": (((X[:3],), {}), [r"x: float32\[4,3\] → float32\[3,3\]"]),
    "dtype": (((X.astype(jnp.int32),), {}), [r"x: float32\[4,3\] → int32\[4,3\]"]),
    "structure": ((([X][0],), {"y": {"z": X}}), ["an argument 'y.z' was added"]),
    "a module in its place": (((nnx.Ref(X),), {}), ["x: an argument → a Ref"]),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name):
    ((given, kwargs), reasons) = ARGUMENTS[name]
    step = nnx.jit(lambda x, **more: getattr(x, "value", x) * 2)
    step(X)
    check(step, (given, kwargs), reasons)


def test_weak_types_and_numbers():
    step = nnx.jit(lambda x: x * 2)
    step(jnp.float32(3))
    check(
        step,
        ((3.0,), {}),
        [r"x: float32\[\] → float32\[\], an array \(or made of one\) before, now a Python number"],
    )
    check(step, ((3,), {}), [r"x: float32\[\] → int32\[\]"], count=3)
    check(step, ((True,), {}), [r"x: .* → bool\[\]"], count=4)


def test_static_arguments():
    step = nnx.jit(lambda x, mode, n=1: x * n, static_argnames=("mode", "n"))
    step(X, "a")
    assert step.explain(X + 1, "a").compiled
    check(step, ((X, "b"), {}), ["the static argument mode: 'a' → 'b'"])
    check(step, ((X, "b"), {"n": 2}), ["the static argument n was given"], count=3)
    check(step, ((X, "b"), {"n": 2.0}), ["the static argument n: 2 → 2.0"], count=4)


def test_the_scope():
    step = nnx.jit(lambda x: x * (2 if nnx.get_flag("training", False) else 1))
    step(X)
    with nnx.scope(training=False):
        check(step, ((X,), {}), ["a scope is active"])
    with nnx.scope(training=True):
        check(step, ((X,), {}), ["the flag 'training' of the scope: False → True"], count=3)
    with nnx.scope({"drop": jax.random.key(0)}, training=True):
        check(step, ((X,), {}), ["the random stream 'drop' of the scope was set"], count=4)


class Config:
    def __init__(self):
        self.rate = 2.0


def helper(x):
    return x


def test_closures(monkeypatch):
    model, config = Cell(), Config()

    @nnx.jit
    def step(x, by=1):
        return helper(model(x)) * config.rate * by

    step(X)
    assert step.explain(X).compiled
    other = Cell()
    other.plain = model.plain
    model = other
    assert step.explain(X).compiled
    model.drops[0].rate = 0.4
    check(step, ((X,), {}), ["model.drops.0.rate: 0.1 → 0.4"])
    config.rate = 3.0
    check(step, ((X,), {}), ["config.rate, which the function closes over: 2.0 → 3.0"], count=3)
    monkeypatch.setitem(globals(), "helper", lambda x: -x)
    check(step, ((X,), {}), ["helper, which the function closes over: another one"], count=4)
    model.plain = jnp.ones(2)
    constant = (
        "model.plain is another array. In a module that the function closes over, it is a constant"
    )
    check(step, ((X,), {}), [constant], count=5)
    model = nnx.Sequential(model)
    check(step, ((X,), {}), ["model: Cell → Sequential"], count=6)


def test_another_function_and_one_that_is_new():
    def make():
        return nnx.jit(lambda x: x + 1)

    first = make()
    assert first.explain(X).reasons == ["it was not called before"]
    assert str(first.explain(X)).startswith("nnx.jit(test_another_function")
    first(X)
    (reason,) = make().explain(X).reasons
    assert reason.startswith("another function: nnx.jit was called again on the same code")


def test_a_method_that_was_replaced():
    class Local(Cell):
        pass

    step, model = basic()[0], Local()
    step(model, X)
    Local.__call__ = lambda self, x: x * 3
    check(
        step,
        ((model, X), {}),
        ["the class Local of 'model' was changed: a method or a class attribute"],
    )
    assert step(model, X)[0, 0] == 3


def test_the_state_of_jax():
    step = nnx.jit(lambda x: x @ x.T)
    step(X)
    with jax.default_matmul_precision("float32"):
        check(step, ((X,), {}), ["jax_default_matmul_precision: None → float32"])
    with jax.numpy_rank_promotion("raise"):
        check(step, ((X,), {}), ["jax_numpy_rank_promotion: allow → raise"], count=3)
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        reasons = step.explain(X).reasons
        assert len(reasons) == 1 and reasons[0].startswith("the mesh: ")
    with jax.debug_nans(True):
        assert len(step.explain(X).reasons) <= 1


def test_what_jax_forgot():
    step = nnx.jit(lambda x: x - 7)
    step(X)
    jax.clear_caches()
    with retraces() as seen:
        step(X)
    assert [e.reasons for e in seen] == [
        ["the same call was traced before: JAX's caches were cleared, or dropped the program"]
    ]


def test_another_device_compiles_and_does_not_trace():
    traced = []
    step = nnx.jit(lambda x: traced.append(1) or x + 1)
    a, b = jax.devices()[:2]
    step(jax.device_put(X, a))
    assert step.explain(jax.device_put(X, a)).compiled
    there = jax.device_put(X, b)
    assert step.explain(there).reasons == [
        f"x: on {a} → on {b}",
        "this is compiled again, but not traced",
    ]
    count = len(traced)
    step(there)
    assert step.explain(there).compiled and len(traced) == count
    assert step.explain(jax.device_put(X, a)).compiled


def test_methods_donation_and_shardings():
    class Model(Cell):
        @nnx.jit(donate=True)
        def step(self, x):
            self.w = self.w + x.sum()

    model = Model()
    with retraces() as seen:
        for _ in range(3):
            model.step(X)
    assert len(seen) == 1
    bound = nnx.jit(model)
    bound(X)
    assert bound.explain(X).compiled and "x: " in bound.explain(X[:2]).reasons[0]
    placed = nnx.jit(lambda x: x, out_shardings=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    with retraces() as seen:
        placed(X), placed(X)
    assert len(seen) == 1


def test_a_closure_that_is_found_late_is_one_trace_with_one_reason():
    class Box:
        pass

    box = Box()
    box.inner = Box()
    box.inner.model = Cell()

    @nnx.jit
    def step(x):
        return box.inner.model(x)

    with retraces() as seen, assert_max_traces(step, 1):
        step(X), step(X)
    assert [e.reasons for e in seen] == [["it was not called before"]]


def test_retraces_are_logged(caplog):
    step = nnx.jit(lambda batch: batch * 2)
    step(X)
    with caplog.at_level(logging.WARNING, "nnx"), retraces():
        step(X), step(X[:1])
    assert len(caplog.records) == 1
    assert "compiles program number 2:\n  batch: float32[4,3] → float32[1,3]" in caplog.text
    step(X[:2])
    assert len(caplog.records) == 1


def test_assert_max_traces():
    step = nnx.jit(lambda x: x * 5)
    with assert_max_traces(step, 2):
        step(X), step(X[:2])
        with pytest.raises(
            TooManyTracesError,
            match=r"(?s)traced 3 times, but the limit is 2.*x: float32\[.,3\] → float32\[1,3\]",
        ):
            step(X[:1])
    with pytest.raises(AssertionError, match="traced 3 times, but the limit is 1"):
        assert_max_traces(step, 1)
    limit = assert_max_traces(step, 3)
    with limit:
        step(X)
    step(X[:, :1])
    with pytest.raises(
        TypeError, match="takes a function that nnx.jit returned, but got a function"
    ):
        assert_max_traces(lambda x: x, 1)


def test_nothing_of_a_call_is_kept_alive():
    import gc
    import weakref

    step, model = basic()
    step(model, X)
    step.explain(model, X[:2])
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_a_static_argument_that_is_new_in_each_call_is_warned_of():
    step = nnx.jit(lambda x, rate: x * rate, static_argnames="rate")
    message = (
        r"5 times in a row only because the value of rate changed, the last time 0\.5 → 0\.6\. A static "
        r"argument is part of the program\. Leave it out of static_argnums and static_argnames\."
    )
    with pytest.warns(UserWarning, match=message):
        for i in range(6):
            step(X, rate=(i + 1) / 10)
