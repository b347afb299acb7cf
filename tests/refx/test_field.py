"""Fields: reading gives the value of a Ref, writing writes it."""

import copy
import dataclasses
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import nnx
from nnx import Ref
from refx import MISSING


class Layer(nnx.Module):
    w: jax.Array = nnx.param()
    s: jax.Array = nnx.ref("stats", axis="x")
    n: int = nnx.static(default=3)

    def __init__(self, value=1.0):
        self.w = jnp.array(value)
        self.s = jnp.array(0.0)


def test_the_label_and_the_facts_of_a_field_are_those_of_its_ref():
    ref = nnx.get_ref(Layer(), "s")
    assert (ref.collection, dict(ref.metadata)) == ("stats", {"axis": "x"})


def test_augmented_assignment_writes_the_same_ref():
    layer = Layer()
    ref = nnx.get_ref(layer, "w")
    layer.w += 2
    assert nnx.get_ref(layer, "w") is ref and ref.value == 3.0


def test_a_ref_field_holds_values_only():
    layer = Layer()
    for bad in (Layer(), [Ref(1.0)]):
        with pytest.raises(nnx.ValueTypeError, match="get_ref"):
            layer.w = bad
    assert layer.w == 1.0


def test_a_tie_and_its_end():
    a, b, c = Layer(1.0), Layer(2.0), Layer(3.0)
    b.w = c.w_alias = nnx.get_ref(a, "w")
    b.w = jnp.array(7.0)
    assert a.w == 7.0 and c.w_alias.value == 7.0
    b.w = None
    b.w = jnp.array(9.0)
    assert a.w == 7.0 and b.w == 9.0
    assert nnx.get_ref(b, "w") is not nnx.get_ref(a, "w")


def test_a_tie_takes_the_label_of_the_ref():
    a, b = Layer(), Layer()
    b.s = nnx.get_ref(a, "w")
    assert list(b["params"]) == [("w",), ("s",)]


def test_a_field_may_hold_a_tree():
    layer = Layer()
    layer.s = {"mean": jnp.zeros(2), "n": 0}
    layer.s["n"] = 5
    assert layer.s["n"] == 5
    nnx.jit(lambda m: m.s.update(n=m.s["n"] + 1))(layer)
    assert layer.s["n"] == 6


def test_deleting_a_field_and_reading_it():
    layer = Layer()
    del layer.w
    with pytest.raises(nnx.UnsetFieldError, match=r"Layer\.w was read before it was set"):
        _ = layer.w
    with pytest.raises(nnx.UnsetFieldError, match=r"Layer\.w"):
        del layer.w
    layer.w = jnp.array(5.0)
    assert nnx.get_ref(layer, "w").collection == "params"


def test_static_defaults_belong_to_the_instance():
    a, b = Layer(), Layer()
    a.n = 4
    assert (a.n, b.n) == (4, 3)
    assert nnx.split(a)[0] is not nnx.split(b)[0]


def test_a_class_shows_its_fields():
    assert repr(Layer.n) == "static field 'n'"
    assert repr(Layer.w) == "field 'w' of collection 'params'"


def test_a_default_factory_may_draw():
    class Noise(nnx.Module):
        w: jax.Array = nnx.param(
            default_factory=lambda: jax.random.normal(nnx.make_rng("params"), (2,))
        )

    a, b = Noise.init(0)(), Noise.init(0)()
    assert (a.w == b.w).all() and not (a.w == Noise.init(1)().w).any()
    with pytest.raises(nnx.MissingStreamError, match="'params'"):
        Noise()


def test_a_dataclass_of_a_dataclass():
    @nnx.dataclass
    class Base(nnx.Module):
        w: jax.Array = nnx.param()
        n: int = 3

    @nnx.dataclass
    class Derived(Base):
        k: int = 4
        v: jax.Array = nnx.ref("stats", default_factory=lambda: jnp.zeros(1))

    class Plain(Derived):
        pass

    made = Derived(jnp.ones(2), 5, k=6)
    assert (made.n, made.k) == (5, 6) and list(nnx.refs(made)) == [("w",), ("v",)]
    assert Plain(jnp.ones(2)).n == 3 and (Plain(jnp.ones(2)).v == 0).all()
    with pytest.raises(ValueError, match="default_factory"):

        @nnx.dataclass
        class Bad(nnx.Module):
            layers: list = []


def test_a_dataclass_takes_the_fields_of_its_bases_in_the_order_of_dataclasses():
    @nnx.dataclass
    class A(nnx.Module):
        a: jax.Array = nnx.param(default=1.0)

    @nnx.dataclass
    class B(nnx.Module):
        b: jax.Array = nnx.ref("stats", default=2.0)
        n: int = nnx.static(default=3)

    @nnx.dataclass
    class Both(A, B):
        c: int = 4

    names = [f.name for f in dataclasses.fields(Both)]  # pyright: ignore
    made = Both(5.0, 6, 7.0)  # pyright: ignore[reportArgumentType]
    assert names == ["b", "n", "a", "c"]
    assert (made.b, made.n, made.a, made.c) == (5.0, 6, 7.0, 4)
    assert list(nnx.refs(made)) == [("b",), ("a",)]


def test_defaults_that_the_init_of_a_dataclass_does_not_set():
    class Base(nnx.Module):
        a: jax.Array = nnx.param(default=1.0)

    @nnx.dataclass
    class Derived(Base):
        b: jax.Array = nnx.param(default=2.0, init=False)
        n: int = nnx.static(default=3, init=False)
        c: jax.Array = nnx.param(default=4.0)

    @nnx.dataclass
    class Again(Derived):
        c: jax.Array  # pyright: ignore[reportGeneralTypeIssues]

    @nnx.dataclass
    class Own(nnx.Module):
        w: jax.Array = nnx.param(default=5.0)

        def __init__(self):
            self.seen = self.w

    for made in (Derived(), Again(), Derived(4.0)):  # pyright: ignore[reportArgumentType]
        assert (made.a, made.b, made.n, made.c) == (1.0, 2.0, 3, 4.0)
        assert set(nnx.refs(made)) == {("a",), ("b",), ("c",)}
    assert Own().seen == 5.0


def _ones():
    return jnp.ones(2)


class Filled(nnx.Module):
    w: jax.Array = nnx.param(default_factory=_ones, axis="x")
    s: jax.Array = nnx.ref("stats")
    n: int = nnx.static(default=3, kw_only=True)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_fields_make_a_class_again_that_was_pickled_by_value(copied):
    # As cloudpickle does it: an empty class, and then its attributes one by one.
    content = {name: vars(Filled)[name] for name in ("w", "s", "n", "_fields", "_defaults")}
    again: Any = type("Again", (nnx.Module,), {})
    for name, value in copied(content).items():
        setattr(again, name, value)
    made = again()
    assert again.w is not Filled.w and again._fields["w"] is again.w
    assert (made.w == 1).all() and made.n == 3 and again.n.kw_only
    made.s = made.w = jnp.zeros(2)
    w, s = nnx.get_ref(made, "w"), nnx.get_ref(made, "s")
    assert (w.collection, dict(w.metadata), s.collection) == ("params", {"axis": "x"}, "stats")
    del made.s
    with pytest.raises(nnx.UnsetFieldError, match=r"Again\.s was read before it was set"):
        _ = made.s
    assert not again.s.has_default and copied(MISSING) is MISSING
