import jax
import jax.numpy as jnp
import optax
import pytest

import refx
from refx import Partition

P = Partition({("a", "w"): jnp.ones((2, 3)), "b.x": jnp.zeros(1)})


def test_is_an_immutable_mapping_by_path_and_by_dotted_path():
    assert list(P) == [("a", "w"), ("b", "x")] and len(P) == 2
    assert P["a", "w"] is P["a.w"] and "b.x" in P and ("b", "x") in P and "b" not in P
    with pytest.raises(TypeError):
        P["a.w"] = 1
    assert dict(P).keys() == {("a", "w"), ("b", "x")}


def test_an_unknown_path_is_named():
    with pytest.raises(refx.UnknownPathError, match=r"no path 'a\.v'; it has 'a\.w', 'b\.x'"):
        P["a.v"]
    with pytest.raises(KeyError):
        P["a", "v"]


def test_is_a_pytree_with_key_paths():
    doubled = jax.tree.map(lambda x: 2 * x, P)
    assert isinstance(doubled, Partition) and doubled["a.w"][0, 0] == 2
    paths = [jax.tree_util.keystr(path, simple=True) for path, _ in jax.tree.leaves_with_path(P)]
    assert paths == ["a.w", "b.x"]
    assert jax.jit(lambda p: p)(P)["b.x"].shape == (1,)


def test_works_with_optax():
    tx = optax.adam(0.1)
    updates, _ = tx.update(P, tx.init(P), P)
    assert optax.apply_updates(P, updates)["a.w"].shape == (2, 3)


def test_union_and_repr():
    both = P | {("c",): 1.0, ("b", "x"): 2.0}
    assert both["c"] == 1.0 and both["b.x"] == 2.0 and P["b.x"].shape == (1,)
    assert repr(P) == "Partition({\n  'a.w': float32[2,3],\n  'b.x': float32[1],\n})"
    assert repr(Partition()) == "Partition({})"
    state = Partition({"a": {"mu": jnp.ones((2, 3)), "n": 1}, "b": (jnp.ones(2), None)})
    text = "Partition({\n  'a': {'mu': float32[2,3], 'n': 1},\n  'b': (float32[2], None),\n})"
    assert repr(state) == text
    many = repr(Partition({str(i): i for i in range(1234)})).splitlines()
    assert len(many) == 203 and many[-3:] == ["  '199': 199,", "  … 1,034 more", "})"]


def test_equality_is_identity_and_raises_nothing():
    assert P == P and P != Partition(P)


def test_what_is_no_path_and_no_partition():
    with pytest.raises(refx.UnknownPathError, match="3 is no path"):
        Partition({3: 1})
    with pytest.raises(refx.ValueTypeError, match="mappings from path to value, but got a list"):
        refx.update(refx.Ref(1.0), [1])


class TestNested:
    def test_there_and_back(self):
        a, b = refx.Ref(1.0), refx.Ref({"x": 2.0, "y": ()})
        p = refx.get_partition({"m": {"a.b": a, 3: b}, "n": [b, refx.Ref(4.0)]})
        nested = p.nested()
        assert nested == {"m": {"a.b": 1.0, "3": {"x": 2.0, "y": ()}}, "n": {"1": 4.0}}
        back = refx.Partition.from_nested(nested, like=p)
        assert dict(back) == dict(p) and list(back) == list(p)
        deeper = refx.Partition.from_nested(nested)
        assert ("m", "3", "x") in deeper and ("m", "3") not in deeper
        assert refx.get_partition(refx.Ref(5.0)).nested() == 5.0
        assert dict(refx.Partition.from_nested(5.0)) == {(): 5.0}
        assert refx.Partition({}).nested() == {} and len(refx.Partition.from_nested({})) == 0

    def test_what_has_no_place(self):
        for paths in (
            [("a",), ("a", "b")],
            [("a", "b"), ("a",)],
            [(), ("a",)],
            [("a",), ("a", "b", "c")],
        ):
            for value in (1.0, {}):
                with pytest.raises(refx.StructureError, match="has no place in nested dicts"):
                    refx.Partition(dict.fromkeys(paths, value)).nested()
        with pytest.raises(
            refx.UnknownPathError, match="have no value at path 'b'; `like` has 'b'"
        ):
            refx.Partition.from_nested({"a": 1}, like={"b": 1})
        with pytest.raises(refx.UnknownPathError, match="have a value at path 'a'"):
            refx.Partition.from_nested({"b": 1, "a": 1}, like={"b": 1})


def test_an_exported_program_of_partitions_is_written_and_read():
    p = refx.Partition({("a", "w.x"): jnp.ones(2), ("b",): jnp.zeros(2)})
    exported = jax.export.export(jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p)))(p)
    out = jax.export.deserialize(exported.serialize()).call(p)
    assert list(out) == list(p) and out["a", "w.x"].tolist() == [2, 2]
