"""When two structures are equal; a remembered one is never mistaken for another."""

import collections
import dataclasses
import enum
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
import refx
from refx import Ref


class Plain(nnx.Module):
    pass


class Setting(nnx.Module):
    value: object = nnx.static()


@functools.partial(jax.tree_util.register_dataclass, data_fields=["x"], meta_fields=["n"])
@dataclasses.dataclass
class Registered:
    x: object
    n: int


class Color(enum.IntEnum):
    RED = 1


@dataclasses.dataclass(frozen=True)
class Config:
    scale: Any
    name: Any = dataclasses.field(default=1, compare=False)


class Pair(NamedTuple):
    scale: Any


class Degrees(float):
    """A number with a unit, which its == ignores."""


class Kelvin(Degrees):
    pass


@dataclasses.dataclass(frozen=True)
class ByName:
    """An object that is compared only by its name."""

    name: str
    table: Any

    def __eq__(self, other):
        return self.name == other.name

    def __hash__(self):
        return hash(self.name)


def plain(**attributes):
    node = Plain()
    for name, value in attributes.items():
        setattr(node, name, value)
    return node


def dagdef(tree):
    return refx.split(tree)[0]


EQUAL_BUT_DIFFERENT = {
    "int and float": (1, 1.0),
    "int and bool": (1, True),
    "zero and negative zero": (0.0, -0.0),
    "complex and negative zero": (0j, complex(0.0, -0.0)),
    "int and enum": (1, Color.RED),
    "numpy scalars of two types": (np.float32(1), np.float64(1)),
    "numpy zeros": (np.float32(0.0), np.float32(-0.0)),
    "numpy double zeros": (np.float64(0.0), np.float64(-0.0)),
    "in a tuple": ((1, "a"), (1.0, "a")),
    "in a frozen dataclass": (Config(1), Config(1.0)),
    "in a tuple in a dataclass": (Config((0.0, "a")), Config((-0.0, "a"))),
    "in a NamedTuple in a dataclass": (Config(Pair(1)), Config(Pair(1.0))),
    "subclasses of float": (Degrees(1.0), Kelvin(1.0)),
    "a float and a subclass": (1.0, Degrees(1.0)),
    "in a dataclass in a dataclass": (Config(Config(1)), Config(Config(True))),
}


@pytest.mark.parametrize("name", EQUAL_BUT_DIFFERENT)
@pytest.mark.parametrize("where", ["attribute", "static field"])
def test_equal_values_that_compute_differently(name, where):
    a, b = EQUAL_BUT_DIFFERENT[name]
    make = (lambda v: plain(value=v)) if where == "attribute" else _setting
    assert dagdef(make(a)) is not dagdef(make(b))
    assert dagdef(make(a)) is dagdef(make(a))
    for value in (a, b):
        kept = refx.clone(make(value)).value
        assert type(kept) is type(value) and repr(kept) == repr(value)


def _setting(value):
    setting = Setting()
    setting.value = value
    return setting


def kind(m):
    """What the traced code sees of the first number in m.value."""
    value = m.value
    while isinstance(value, list | tuple | dict):
        value = next(iter(value.values())) if isinstance(value, dict) else value[0]
    return {bool: 1, int: 2, float: 3}[type(value)] + (0.5 if str(value)[0] == "-" else 0)


@pytest.fixture(scope="module")
def compiled_kind():
    return nnx.jit(lambda m: jnp.asarray(kind(m))), jax.jit(lambda m: jnp.asarray(kind(m)))


REPLACED = {
    "a list": ([1], [1.0]),
    "a nested list": ([[1]], [[1.0]]),
    "a dict": ({"k": 1}, {"k": True}),
    "a list in a dict": ({"k": [0.0]}, {"k": [-0.0]}),
    "a tuple in a list": ([(1,)], [(1.0,)]),
    "a list in a tuple": (([1],), ([1.0],)),
    "a tuple": ((1,), (True,)),
}


@pytest.mark.parametrize("name", REPLACED)
@pytest.mark.parametrize("where", ["attribute", "item of a list", "item of a dict"])
def test_a_container_replaced_by_an_equal_one_with_other_numbers(name, where, compiled_kind):
    a, b = REPLACED[name]
    stateful, pure = compiled_kind
    model = plain(value={"attribute": a, "item of a list": [a], "item of a dict": {"x": a}}[where])
    assert stateful(model) == pure(model) == kind(model)
    if where == "attribute":
        model.value = b
    else:
        model.value[0 if where == "item of a list" else "x"] = b
    assert stateful(model) == pure(model) == kind(model)


def test_a_static_field_replaced_by_an_equal_one():
    f = nnx.jit(lambda m: jnp.asarray(m.value[0]))
    setting = _setting((2, "a"))
    assert f(setting).dtype == jnp.int32
    setting.value = (2.0, "a")
    assert f(setting).dtype == jnp.float32


def test_settings_that_are_equal_but_compute_differently():
    f = nnx.jit(lambda m, x: x * m.value.scale)
    for make in (Config, Pair):
        setting = _setting(make(1))
        assert f(setting, jnp.arange(2)).dtype == jnp.int32
        setting.value = make(1.0)
        assert f(setting, jnp.arange(2)).dtype == jnp.float32
    g = nnx.jit(lambda c: jnp.asarray(c.scale), static_argnums=0)
    for make in (Config, Pair):
        assert (g(make(1)).dtype, g(make(1.0)).dtype) == (jnp.int32, jnp.float32)


def test_settings_share_a_program_only_with_the_same_type_and_content():
    assert dagdef(_setting(Config(1, name=1))) is dagdef(_setting(Config(1, name=1)))
    assert dagdef(_setting(Config(1, name=1))) is not dagdef(_setting(Config(1, name=1.0)))
    tables = [np.ones(2), [1]], [np.zeros(2), [2]], [np.ones(2), [1]]
    a, b, c = (dagdef(_setting(ByName("a", tuple(table)))) for table in tables)
    assert a is c is not b and a is not dagdef(_setting(ByName("b", ())))


@pytest.mark.parametrize("how", ["in place", "by another dict"])
def test_the_order_of_a_dict(how):
    model = plain(table={"a": Ref(jnp.array(1.0)), "b": Ref(jnp.array(2.0))})
    first = nnx.jit(lambda m: next(iter(m.table.values())).value)
    pure = jax.jit(lambda m: next(iter(m.table.values())).value)
    assert first(model) == pure(model) == 1.0
    if how == "in place":
        model.table["a"] = model.table.pop("a")
    else:
        model.table = {"b": model.table["b"], "a": model.table["a"]}
    assert first(model) == pure(model) == 2.0
    assert list(refx.refs(model)) == [("table", "b"), ("table", "a")]


def test_lists_that_become_one_and_two_again():
    ref = Ref(jnp.array(1.0))
    model = plain(a=[ref], b=[ref])
    one = nnx.jit(lambda m: jnp.asarray(m.a is m.b))
    assert not one(model)
    model.b = model.a
    assert one(model)
    model.b = list(model.a)
    assert not one(model)


def test_equal_keys_of_other_types():
    a, b = {1: Ref(1.0)}, {True: Ref(1.0)}
    assert dagdef(a) is not dagdef(b)
    assert list(refx.clone(b)) == [True] and type(next(iter(refx.clone(b)))) is bool


def test_labels_of_refs_are_told_apart():
    assert dagdef(Ref(1.0, "p", scale=2)) is not dagdef(Ref(1.0, "p", scale=2.0))
    assert dagdef(Ref(1.0, 1)) is not dagdef(Ref(1.0, True))
    other = refx.clone([Ref(1.0, "p", scale=2), Ref(1.0, "p", scale=2.0)])
    assert [type(r.metadata["scale"]) for r in other] == [int, float]


def test_keys_with_equal_text_are_two_paths():
    tree = {1: Ref(1.0, "params"), "1": Ref(2.0, "params")}
    try:
        refs = refx.refs(tree)
    except refx.RefError as error:
        assert "1" in str(error)
        return
    assert len(refs) == 2
    other = refx.clone(tree)
    assert (other[1].value, other["1"].value) == (1.0, 2.0)
    assert len(nnx.grad(lambda t: t[1].value * 3 + t["1"].value * 5)(tree)) == 2


def test_a_key_with_a_dot_is_found_by_its_text():
    tree = {"a.b": Ref(1.0)}
    partition = refx.get_partition(tree)
    assert partition["a.b"] == 1.0
    refx.update(tree, {("a.b",): 2.0})
    refx.update(tree, {"a.b": 3.0})
    assert tree["a.b"].value == 3.0


def test_registered_pytrees_that_change_in_place():
    model = plain(d=Registered(Ref(jnp.array(1.0)), 2))
    f = nnx.jit(lambda m: m.d.x.value * m.d.n)
    assert f(model) == 2.0
    model.d.x = Ref(jnp.array(3.0))
    assert f(model) == 6.0
    model.d.n = 5
    assert f(model) == 15.0


def test_an_ordered_dict_whose_key_changes():
    model = plain(d=collections.OrderedDict(a=Ref(jnp.array(1.0)), b=Ref(jnp.array(2.0))))
    f = nnx.jit(lambda m: m.d["b"].value if "b" in m.d else -m.d["c"].value)
    assert f(model) == 2.0
    model.d["c"] = model.d.pop("b")
    assert f(model) == -2.0


def test_pytrees_of_other_kinds_keep_their_kind():
    Pair = collections.namedtuple("Pair", "a b")
    tree = plain(
        pair=Pair(Ref(1.0), 2),
        lazy=collections.defaultdict(list, k=[Ref(2.0)]),
        both=Registered([Ref(3.0)], 4),
    )
    other = refx.clone(tree)
    assert isinstance(other.pair, Pair) and other.pair.a.value == 1.0
    assert other.lazy.default_factory is list and other.both.n == 4
    assert list(refx.refs(tree)) == [("pair", "a"), ("lazy", "k", "0"), ("both", "x", "0")]


@pytest.mark.parametrize("hide", [lambda r: (x for x in [r]), lambda r: iter([r])])
def test_refs_do_not_disappear_in_an_iterator(hide):
    tree = plain(items=hide(Ref(1.0)))
    with pytest.raises(refx.RefError, match="items"):
        refx.split(tree)


@pytest.mark.parametrize("make", [lambda: Ref(1.0), Plain])
def test_refs_do_not_disappear_in_a_static_field(make):
    with pytest.raises(refx.RefError, match="value"):
        refx.split(_setting(make()))


@pytest.mark.parametrize(
    "value", [{1}, bytearray(b"x"), collections.Counter("a")], ids=["set", "bytearray", "Counter"]
)
def test_what_cannot_be_hashed_is_named_with_its_path(value):
    tree = {"blocks": [plain(option=value)]}
    with pytest.raises(
        refx.UnhashableStaticError, match=r"'blocks\.0\.option' is a .* Use a tuple"
    ):
        refx.split(tree)
    with pytest.raises(TypeError):
        refx.split(tree)


@pytest.mark.parametrize("value", [[1], {"a": 1}, np.ones(2)], ids=["list", "dict", "array"])
def test_a_static_field_must_be_hashable(value):
    with pytest.raises(refx.UnhashableStaticError, match="'value'"):
        refx.split(_setting(value))


def test_a_function_may_close_over_a_variable_that_is_not_bound_yet():
    class Holder(refx.Node):
        pass

    def make():
        holder = Holder()
        holder.fn = lambda x: later(x)
        dagdef, _ = refx.split(holder)
        later = abs
        assert refx.split(holder)[0] is dagdef
        return holder

    assert make().fn(-1) == 1
