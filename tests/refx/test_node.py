"""A Node is an ordinary Python object whose every change is seen."""

import copy
import dataclasses
import gc
import pickle
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx import Ref
from tests.models import Dense, Net


class Plain(nnx.Module):
    pass


@dataclasses.dataclass
class Compared(nnx.Module):
    n: int
    w: jax.Array


class AlwaysEqual(nnx.Module):
    def __init__(self, n):
        self.n = n

    def __eq__(self, other):
        return True

    def __hash__(self):
        return 1


VALUES = {
    "number": 2.0,
    "zero": 0,
    "bool": True,
    "array": jnp.ones(3),
    "scalar array": jnp.array(2.0),
    "numpy array": np.ones(2),
    "empty array": jnp.zeros(0),
    "Ref": Ref(1.0),
    "module": Plain(),
    "list": [1, 2],
    "None": None,
    "string": "s",
    "function": len,
}


@pytest.mark.parametrize("new", VALUES)
@pytest.mark.parametrize("old", VALUES)
def test_any_attribute_may_become_any_other(old, new):
    node = Plain()
    node.x = VALUES[old]
    before = nnx.split(node)[0]
    if old == "Ref" and isinstance(VALUES[new], float | int | np.ndarray | jax.Array):
        del node.x
    node.x = VALUES[new]
    assert node.x is VALUES[new]
    fresh = Plain()
    fresh.x = VALUES[new]
    assert nnx.split(node)[0] is nnx.split(fresh)[0]
    assert before is not None


def seen(m):
    return jnp.asarray(m.n)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "n", 1.0),
        lambda m: vars(m).update(n=1.0),
        lambda m: m.__dict__.__setitem__("n", 1.0),
        lambda m: (delattr(m, "n"), setattr(m, "n", 1.0)),
        lambda m: m.__setstate__({"n": 1.0}),
    ],
    ids=["setattr", "vars", "__dict__", "delattr", "__setstate__"],
)
def test_a_number_by_an_equal_one_in_every_way_that_python_has(change):
    model = Plain()
    model.n = 1
    f = nnx.jit(seen)
    assert f(model).dtype == jnp.int32
    change(model)
    assert f(model).dtype == jnp.float32


def test_a_dict_that_was_taken_before_is_still_watched():
    model = Plain()
    model.n = 1
    attributes, f = vars(model), nnx.jit(seen)
    for value, dtype in [(1, "int32"), (1.0, "float32"), (True, "bool"), (1, "int32")]:
        attributes["n"] = value
        assert f(model).dtype == dtype


def test_modules_that_say_they_are_equal():
    model = Plain()
    model.part = AlwaysEqual(1)
    f = nnx.jit(lambda m: m.part.n + jnp.zeros(()))
    assert f(model) == 1
    model.part = AlwaysEqual(2)
    assert f(model) == 2
    model.part.n = 5
    assert f(model) == 5


def test_dataclasses_that_compare_their_arrays():
    model = Plain()
    model.part = Compared(1, jnp.ones(2))
    f = nnx.jit(lambda m: m.part.w.sum() * m.part.n)
    assert f(model) == 2
    model.part = Compared(3, jnp.ones(2))
    assert f(model) == 6
    model.part.w = jnp.zeros(2)
    assert f(model) == 0


def test_deleting_what_is_not_there():
    with pytest.raises(AttributeError):
        del Plain().missing
    with pytest.raises(AttributeError, match=r"Dense\.w"):
        dense = Dense()
        del dense.w
        _ = dense.w


def test_a_shallow_copy_shares_its_refs(net):
    other = copy.copy(net)
    assert other is not net and other.blocks is net.blocks
    other.scale = 5.0
    assert net.scale == 2.0
    other.blocks[0].b = jnp.ones(2)
    assert (net.blocks[0].b == 1).all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_cycles_are_independent(copied):
    net = Net()
    net.me, net.table = net, {"net": (net, jnp.ones(2))}
    other = copied(net)
    assert other.me is other and other.table["net"][0] is other
    other.blocks[0].b = jnp.ones(2)
    assert (other.blocks[2].b == 1).all() and (net.blocks[0].b == 0).all()
    assert nnx.jit(lambda m: m.blocks[2].b.sum())(other) == 2


def test_a_cycle_is_collected():
    net = Net()
    net.me = net
    nnx.jit(lambda m: m.blocks[0].b)(net)
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None


def test_properties_methods_and_class_attributes_are_as_in_python():
    class Model(nnx.Module):
        kind = "model"

        def __init__(self):
            self._n = 1

        @property
        def n(self):
            return self._n

        @n.setter
        def n(self, value):
            self._n = value * 2

        @classmethod
        def make(cls):
            return cls()

        @staticmethod
        def helper(x):
            return x + 1

    model = Model.make()
    model.n = 3
    assert (model.n, model.kind, model.helper(1)) == (6, "model", 2)
    assert nnx.jit(lambda m: jnp.asarray(m.helper(m.n)))(model) == 7
    assert nnx.clone(model).n == 6


def test_a_module_with_init_arguments_by_super():
    class Base(nnx.Module):
        w: jax.Array = nnx.param()

        def __init__(self, n):
            self.w = jnp.ones(n)

    class Derived(Base):
        b: jax.Array = nnx.param()

        def __init__(self, n, m):
            super().__init__(n)
            self.b = jnp.zeros(m)

    assert [v.shape for v in Derived(2, 3)["params"].values()] == [(2,), (3,)]


class First(nnx.Module):
    a: jax.Array = nnx.param(default_factory=lambda: jnp.ones(2))
    both: jax.Array = nnx.param(default=1.0)


class Second(nnx.Module):
    b: jax.Array = nnx.ref("stats", default_factory=lambda: jnp.ones(3))
    both: tuple = nnx.static(default=(1, 2))
    s: tuple = nnx.static(default=None)


class Mixin:
    c: jax.Array = nnx.param(default=2.0)


def test_the_fields_of_every_base_count():
    class Both(First, Second):  # pyright: ignore[reportIncompatibleVariableOverride]
        pass

    class Mixed(Mixin, Second):
        b = 5  # pyright: ignore[reportAssignmentType]

    both, mixed = Both(), Mixed()
    assert {path[0]: ref.collection for path, ref in nnx.refs(both).items()} == {
        "a": "params",
        "b": "stats",
        "both": "params",
    }
    assert (mixed.c, mixed.b, mixed.both) == (2.0, 5, (1, 2))
    assert list(nnx.refs(mixed)) == [("c",)]
    both.s = ("x", (1, 2))
    assert nnx.clone(both).s == both.s and len(jax.tree.leaves(both)) == 3
    both.s = (jnp.float32, [1])
    with pytest.raises(nnx.UnhashableStaticError, match="'s' is a tuple"):
        nnx.split(both)


def test_of_two_bases_the_first_decides_as_in_python():
    class Swapped(Second, First):  # pyright: ignore[reportIncompatibleVariableOverride]
        pass

    class Diamond(First):
        both: tuple = nnx.static(default=(3,))  # pyright: ignore[reportIncompatibleVariableOverride]

    class Other(First):
        pass

    class Bottom(Other, Diamond):
        pass

    assert Swapped().both == (1, 2) and ("both",) not in nnx.refs(Swapped())
    assert Bottom().both == (3,) and list(nnx.refs(Bottom())) == [("a",)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: type("Slotted", (nnx.Module,), {"__slots__": ("w",)}),
        lambda: type("Slotted", (Dense,), {"__slots__": "w2"}),
        lambda: dataclasses.dataclass(slots=True)(
            type("Slotted", (nnx.Module,), {"__annotations__": {"n": int}})
        ),
    ],
    ids=["tuple", "string", "dataclass"],
)
def test_slots_are_refused_where_the_class_is_made(make):
    with pytest.raises(TypeError, match=r"Slotted has __slots__ = .*nnx.jit would miss it"):
        make()


def test_empty_slots_are_none():
    made = type("Made", (nnx.Module,), {"__slots__": ()})()
    made.w = Ref(1.0, "params")
    assert list(made["params"]) == [("w",)]


@pytest.mark.parametrize(
    "field, message",
    [
        (
            nnx.param(),
            r"'w' of a Plain was assigned a field.*`w: jax\.Array = nnx\.param\(\)`.*"
            r"self\.w = .*nnx\.Ref\(value, 'params'\)",
        ),
        (nnx.ref("stats", default=1), r"`w: jax\.Array = nnx\.ref\('stats'\)`"),
        (
            nnx.static(default=1),
            r"Declare a static field in the class body; in a method, assign the value itself",
        ),
    ],
)
def test_a_field_is_not_assigned_to_an_instance(field, message):
    class Plain(nnx.Node):
        pass

    class Declares(nnx.Node):
        w = nnx.param()

    with pytest.raises(nnx.ValueTypeError, match=message):
        Plain().w = field
    with pytest.raises(nnx.ValueTypeError, match="'w' of a Declares was assigned a field"):
        Declares().w = field


@pytest.mark.parametrize("value", [jnp.ones(2), np.ones(2), np.float32(1), 1, 2.0, True])
def test_an_array_does_not_replace_a_ref_unnoticed(value):
    class Counter(nnx.Node):
        def __init__(self):
            self.count = nnx.Ref(0, "counters")

    counter = Counter()
    cell = counter.count
    with pytest.raises(
        nnx.StructureError,
        match=(
            r"'count' of a Counter is a Ref.*self\.count\.value = \.\.\..*`del self\.count` first"
        ),
    ):
        counter.count = value
    assert counter.count is cell
    counter.count = nnx.Ref(1)
    counter.count = None
    counter.count = value
    counter.count = cell
    del counter.count
    counter.count = value


def test_a_shape_is_not_a_field():
    # JAX has an attribute is_ref on it.
    class Box(nnx.Node):
        like = jax.ShapeDtypeStruct((2,), jnp.float32)

    box = Box()
    box.shape = box.like
    assert box.shape is Box.like and Box._fields == {}
