import jax
import jax.numpy as jnp
import optax
import pytest

import refx
from refx import Partition
from refx.folded import folded

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


def test_what_is_not_a_path_or_a_partition():
    with pytest.raises(refx.UnknownPathError, match="3 is not a path"):
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
                with pytest.raises(refx.StructureError, match="does not fit into nested dicts"):
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


class TestFolding:
    """If parts repeat, like the layers of a model, one is printed, with their number."""

    def test_layers_fold(self):
        layer = {"a.kernel": jnp.ones((2, 2)), "a.bias": jnp.ones(2), "n": 1.5}
        values = {f"blocks.{i}.{p}": v for i in range(30) for p, v in layer.items()}
        values |= {"blocks.30.a.kernel": jnp.ones((2, 3)), "head": jnp.ones(2)}
        partition = refx.Partition(values)
        assert repr(partition) == (
            "Partition({\n"
            "  'blocks.0..29.a.kernel': float32[2,2],  # ×30\n"
            "  'blocks.0..29.a.bias': float32[2],  # ×30\n"
            "  'blocks.0..29.n': 1.5,  # ×30\n"
            "  'blocks.30.a.kernel': float32[2,3],\n"
            "  'head': float32[2],\n"
            "})"
        )
        html = partition._repr_html_()
        assert "Partition of 92 values" in html and "&#x27;blocks.0..29.n&#x27;" in html

    def test_layers_in_layers_fold(self):
        values = {f"{i}.{j}.w": jnp.ones(2) for i in range(4) for j in range(5)}
        lines = repr(refx.Partition(values)).splitlines()
        assert lines[1:-1] == ["  '0..3.0..4.w': float32[2],  # ×20"]

    def test_what_differs_does_not_fold(self):
        same = jnp.ones(2)
        two = {"a.0": same, "a.1": same}
        other = {"a.0.w": same, "a.1.w": same, "a.2.v": same}
        longer = {"a.0.w": same, "a.1.w": same, "a.2.w": same, "a.2.v": same}
        values = {"0": 1.0, "1": 2.0, "2": 3.0}
        apart = {"a.0": same, "a.1": same, "b": same, "a.2": same}
        for given in (two, other, longer, values, apart):
            lines = repr(refx.Partition(given)).splitlines()
            assert len(lines) == len(given) + 2 and "×" not in "".join(lines)

    def test_it_says_how_many_are_left_out(self):
        values = {f"{i}": i for i in range(300)} | {f"x.{i}": 1 for i in range(50)}
        lines = repr(refx.Partition(values)).splitlines()
        assert lines[-2] == "  … 150 more" and len(lines) == 203

    def test_a_huge_one_prints_at_once(self):
        def count(n):
            seen = []

            class Part(str):
                def isdigit(self):
                    seen.append(1)
                    return str.isdigit(self)

            entries = [((Part("a"), Part(str(i)), Part(str(i % 7))), str(i)) for i in range(n)]
            assert len(list(folded(entries))) == n
            return len(seen)

        assert count(2000) < 12 * count(200)
