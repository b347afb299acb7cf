"""`nnx.modules` and `nnx.replace`: every place, sharing kept, nothing changed by a failure."""

import jax
import jax.numpy as jnp
import pytest

import nnx
from tests.models import Dense


class Wrapped(nnx.Module):
    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x):
        return 2 * self.inner(x)


class Holder(nnx.Module):
    def __init__(self):
        self.shared = Dense()
        self.pair = (self.shared, [self.shared, {"deep": self.shared}])
        self.call = self.shared.__call__
        self.again = self
        self.other = Wrapped(Dense(seed=1))

    def __call__(self, x):
        return self.call(self.pair[1][1]["deep"](x)) + self.other(x)


def test_modules_are_listed_once_by_their_first_path():
    model = Holder()
    found = nnx.modules(model)
    assert list(found) == [(), ("shared",), ("other",), ("other", "inner")]
    assert found["shared",] is model.shared
    assert list(nnx.modules(model, Dense)) == [("shared",), ("other", "inner")]
    assert list(nnx.modules({"a": model.other, "b": [model.shared]}, Dense)) == [
        ("a", "inner"),
        ("b", "0"),
    ]


def test_a_module_is_replaced_at_all_its_places_by_one():
    model, x = Holder(), jnp.ones((1, 2))
    shared, refs = model.shared, nnx.refs(model)
    calls = []

    def wrap(module):
        calls.append(module)
        return Wrapped(module)

    before = 2 * shared(2 * shared(x)) + model.other(x)
    assert nnx.replace(model, "shared", wrap) is model
    assert calls == [shared] and model.shared.inner is shared
    assert model.pair[0] is model.pair[1][0] is model.pair[1][1]["deep"] is model.shared
    assert model.call.__self__ is model.shared
    assert {id(r) for r in nnx.refs(model).values()} == {id(r) for r in refs.values()}
    assert jnp.allclose(model(x), before)


@pytest.mark.parametrize(
    "where, paths",
    [
        (Dense, ["shared", "other.inner"]),
        ("**.inner", ["other.inner"]),
        ("oth*", ["other"]),
        ((Wrapped, "shared"), ["shared", "other"]),
        (lambda path, module: len(path) == 2, ["other.inner"]),
        (nnx.Not(nnx.Any("", "other", nnx.OfType(Wrapped))), ["shared", "other.inner"]),
        (nnx.PathContains("inner"), ["other.inner"]),
    ],
)
def test_what_selects(where, paths):
    model = Holder()
    found = {id(m): ".".join(p) for p, m in nnx.modules(model).items()}
    seen = []
    nnx.replace(model, where, lambda m: seen.append(found[id(m)]) or m)
    assert seen == paths


def test_inner_ones_come_first_and_the_root_is_returned():
    model = Wrapped(Wrapped(Dense()))
    order = []
    new = nnx.replace(model, Wrapped, lambda m: order.append(m) or Wrapped(m.inner))
    assert order[1] is model
    assert new is not model and type(new.inner) is Wrapped and new.inner is model.inner
    assert new.inner is not order[0]
    both = nnx.replace((model, [model]), lambda path, m: m is model, lambda m: new)
    assert both[0] is new and both[1][0] is new


def test_the_compiled_step_sees_it_and_functions_will_do():
    model, x = nnx.Sequential(Dense(), Dense()), jnp.ones((1, 2))
    step = nnx.jit(lambda m, x: m(x))
    step(model, x)
    nnx.replace(model, "layers.1", lambda _: jnp.negative)
    assert jnp.allclose(step(model, x), -model.layers[0](x))


def test_a_failure_changes_nothing():
    model = Holder()
    before = nnx.modules(model)

    def fail(module):
        if module is model.other:
            raise ZeroDivisionError
        return Wrapped(module)

    with pytest.raises(ZeroDivisionError):
        nnx.replace(model, (Dense, Wrapped), fail)
    assert nnx.modules(model) == before and model.call.__self__ is model.shared
    with pytest.raises(
        TypeError, match="cannot replace 'shared': fn returned None. Return the new"
    ):
        nnx.replace(model, "shared", lambda m: None)
    with pytest.raises(
        nnx.FilterError, match="Holder with 'nothing'. Its modules are: '' .*other.inner"
    ):
        nnx.replace(model, "nothing", Wrapped)
    with pytest.raises(nnx.FilterError, match="3 does not select modules. Give a class, a glob"):
        nnx.replace(model, 3, Wrapped)
    with pytest.raises(nnx.TraceLevelError, match="inner.*was set inside"):
        jax.jit(lambda x: nnx.replace(model, "other.inner", Wrapped) and x)(1.0)


def test_quantization_in_a_dozen_lines():
    class Int8(nnx.Module):
        q: jax.Array = nnx.ref("quantized")

        def __init__(self, linear):
            self.scale = nnx.Ref(jnp.abs(linear.kernel).max(0) / 127, "quantized")
            self.q = jnp.round(linear.kernel / self.scale.value).astype(jnp.int8)
            self.bias = nnx.get_ref(linear, "bias")

        def __call__(self, x):
            return x @ (self.q * self.scale.value) + self.bias.value

    with nnx.scope(0):
        model = nnx.Sequential(nnx.Linear(4, 16), nnx.relu, nnx.Linear(16, 2))
    x = jax.random.normal(jax.random.key(1), (8, 4))
    before = model(x)
    nnx.replace(model, nnx.Linear, Int8)
    assert model.layers[0].q.dtype == jnp.int8
    assert jnp.abs(model(x) - before).max() < 0.03


def test_a_shared_module_may_be_named_by_any_of_its_paths():
    model = Holder()
    shared = model.shared
    nnx.replace(model, "pair.1.1.deep", Wrapped)
    assert model.shared.inner is shared and model.pair[0] is model.shared
    x = jnp.ones((1, 2))
    with pytest.raises(nnx.FilterError, match="selects no module"):
        nnx.replace(model, "pair.5", Wrapped)
    y, captured = nnx.capture(model, "pair.0.inner")(x)
    assert list(captured) == [("shared", "inner")] and len(captured["shared.inner"]) == 2
    again = nnx.patch(model, {"again.pair.0": lambda h: 0 * h})(x)
    assert jnp.allclose(again, model.other(x))
