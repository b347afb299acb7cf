import copy
import gc
import pickle
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
import refx
from refx import Ref


def test_reads_and_writes_its_value():
    ref = Ref(jnp.array(1.0), "params")
    ref.value = jnp.array(2.0)
    assert ref.value == 2.0
    assert ref.collection == "params"


def test_equality_and_hash_are_identity():
    a, b = Ref(1.0), Ref(1.0)
    assert a == a and a != b
    assert len({a, b, a}) == 2


def test_has_slots_and_weak_references():
    ref = Ref(1.0)
    with pytest.raises(AttributeError):
        ref.other = 1
    alive = weakref.ref(ref)
    del ref
    gc.collect()
    assert alive() is None


def test_metadata_is_read_only():
    ref = Ref(1.0, "params", sharding=("x", None))
    assert ref.metadata["sharding"] == ("x", None)
    with pytest.raises(TypeError):
        ref.metadata["sharding"] = None


def test_collection_and_metadata_must_be_hashable():
    with pytest.raises(refx.UnhashableStaticError, match=r"collection of a Ref must be hashable"):
        Ref(1.0, ["params"])
    with pytest.raises(refx.UnhashableStaticError, match=r"metadata 'names' .* Use a tuple"):
        Ref(1.0, names=["x"])


@pytest.mark.parametrize("value", [Ref(1.0), {"a": [Ref(1.0)]}, refx.Node()])
def test_holds_values_only(value):
    with pytest.raises(refx.ValueTypeError, match=r"holds a (Ref|Node).*get_ref"):
        Ref(value)
    ref = Ref(1.0)
    with pytest.raises(refx.ValueTypeError):
        ref.value = value
    assert ref.value == 1.0


def test_value_may_be_a_pytree():
    ref = Ref({"m": jnp.zeros(2), "n": (1, 2.0)})
    ref.value["n"] = (3, 4.0)
    assert ref.value["n"] == (3, 4.0)


def test_repr_shows_shapes_and_collection():
    assert repr(Ref(jnp.zeros((2, 3)), "params", axis=1)) == "Ref(float32[2,3], 'params', axis=1)"
    assert repr(Ref({"a": 1, "b": 2})) == "Ref(dict of 2 leaves, None)"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_copies_keep_value_sharing_and_labels(copied):
    ref = Ref(jnp.arange(3), "params", axis=1)
    a, b = copied([ref, ref])
    assert a is b and a is not ref
    assert a.value.tolist() == [0, 1, 2] and a.collection == "params" and a.metadata["axis"] == 1
    a.value = jnp.zeros(3)
    assert ref.value.tolist() == [0, 1, 2]


def test_is_a_pytree_of_its_value():
    ref = Ref(jnp.array(1.0), "params")
    doubled = jax.tree.map(lambda x: x * 2, {"a": ref})["a"]
    assert doubled.value == 2.0 and doubled.collection == "params" and ref.value == 1.0
    doubled.value = 5.0
    with pytest.raises(refx.ReadOnlyError, match="nnx.jit_filter"):
        jax.jit(lambda r: setattr(r, "value", 0.0))(ref)


@pytest.mark.parametrize(
    "compute",
    [
        *(lambda r: r + 1, lambda r: 1 - r, lambda r: r @ r, lambda r: -r, lambda r: r < 2, abs),
        *(lambda r: r[0], lambda r: list(r), lambda r: r.__setitem__(0, 1), float, int, round),
        *(jnp.sin, jnp.asarray, np.asarray, np.sin, lambda r: jnp.ones(3) * r),
        *(lambda r: np.ones(3) + r, lambda r: jnp.where(r, 1, 2), lambda r: r**2),
    ],
)
def test_computing_with_a_ref_says_to_use_its_value(compute):
    message = r"^Ref\(float32\[3\], 'params'\) is a cell.*use \.value, as in ref\.value \+ 1\."
    with pytest.raises(TypeError, match=message):
        compute(Ref(jnp.ones(3), "params"))


def test_a_ref_is_still_compared_by_identity_and_true():
    a, b = Ref(1), Ref(1)
    assert a == a and a != b and a and len({a, b}) == 2
    assert jax.tree.leaves(a) == [1] and jax.jit(lambda r: r.value + 1)(a) == 2


def test_an_ended_ref_prints_so():
    kept = []
    nnx.jit(lambda ref: kept.append(ref))(Ref(jnp.ones(2), "params"))
    assert repr(kept[0]) == "Ref(<ended trace>, 'params')"


@pytest.mark.parametrize(
    "value, what",
    [
        ("a name", "a str: 'a name'"),
        ((jnp.ones(2), jax.nn.relu), "a custom_jvp"),
        ({"a": len}, "a builtin_function_or_method"),
        (np.array(["a"]), "a ndarray"),
        (np.dtype("int8"), "a Int8DType"),
    ],
)
def test_holds_arrays_and_numbers_only(value, what):
    message = (
        f"A new Ref was given a value that holds {what}.*Keep settings and functions in ordinary"
    )
    with pytest.raises(refx.ValueTypeError, match=message):
        Ref(value)
    ref = Ref(1.0)
    with pytest.raises(refx.ValueTypeError, match="pytree of arrays and scalars"):
        ref.value = value
    assert ref.value == 1.0
    # Whatever JAX puts in the place of a leaf is kept, and may be replaced and copied.
    mask = jax.tree.map(lambda _: value, Ref(1.0))
    if not isinstance(value, tuple | np.ndarray):
        mask.value = value
    for other in (copy.deepcopy(mask), refx.clone(mask)):
        assert type(other.value) is type(value)


def test_may_hold_what_stands_for_an_array():
    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    for value in (shape, None, (), {"a": None}, np.float32(1), True, 1 + 2j, jax.random.key(0)):
        ref = Ref(value)
        ref.value = value
        assert ref.value is value


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t)), refx.clone],
)
def test_copies_of_a_tree_of_numbers_are_constants_as_it_is(copied):
    numbers = jax.tree.map(lambda _: 2, [Ref(jnp.ones(2)), Ref(jnp.ones(3))])
    same = copied(numbers)
    assert jax.jit(lambda x: x * same[0].value * len(range(same[1].value)))(3) == 12
    # A number that was put there is a value.
    count = copied([Ref(2)])
    with pytest.raises(refx.ClosureError):
        jax.jit(lambda x: x * count[0].value)(3)
