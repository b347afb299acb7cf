"""Pictures of models."""

import itertools
import sys
import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import pytest

import nnx
from nnx.show._layout import BACK_EDGE, SHARED, TREE_EDGE
from nnx.show.graph import graph


class Box(nnx.Module):
    """A module with the given attributes."""

    def __init__(self, **attributes):
        for name, value in attributes.items():
            setattr(self, name, value)


class Leaf(nnx.Module):
    w: jax.Array = nnx.param()

    def __init__(self, n=2):
        self.w = jnp.zeros((n, 2))


class Other(Leaf):
    pass


def drawn(picture):
    """The visible content: boxes, and edges by the titles of their ends."""
    boxes = [(box.title, box.count) for box in picture.boxes]
    kinds = {TREE_EDGE: "", SHARED: "shared", BACK_EDGE: "back"}
    edges = [(e.source.title, e.label, e.target.title, kinds[e.kind]) for e in picture.edges]
    return boxes, sorted(edges)


def sharing():
    model = Box(a=Leaf(), b=Other(), c=Box(d=Leaf(3)))
    model.c.again = model.a
    model.c.root = model
    model.b.w = nnx.get_ref(model.c.d, "w")
    model.many = {"<&>": [Leaf(4) for _ in range(12)]}
    return model


def test_shared_modules_and_refs_are_drawn_once():
    boxes, edges = drawn(graph(sharing()))
    assert boxes == [
        ("Box", 1),
        ("Leaf", 1),
        ("Other", 1),
        ("w", 1),
        ("Box", 1),
        ("Leaf", 1),
        ("Leaf", 12),
    ]
    assert edges == [
        ("Box", "a", "Leaf", ""),
        ("Box", "again", "Leaf", "shared"),
        ("Box", "b", "Other", ""),
        ("Box", "c", "Box", ""),
        ("Box", "d", "Leaf", ""),
        ("Box", "many.<&>[0..11]", "Leaf", ""),
        ("Box", "root", "Box", "back"),
        ("Leaf", "w", "w", "shared"),
        ("Other", "w", "w", "shared"),
    ]


def test_the_same_list_or_layer_again_is_one_edge():
    layers = [Leaf() for _ in range(6)]
    _, edges = drawn(graph(Box(layers=layers, inner=Other(), same=layers, copy=list(layers))))
    assert edges == [
        ("Box", "inner", "Other", ""),
        ("Box", "layers[0..5]", "Leaf", ""),
        ("Box", "same[0..5], copy[0..5]", "Leaf", "shared"),
    ]
    _, edges = drawn(graph(Box(layers=[layers[0]] * 12)))
    assert edges == [
        ("Box", "layers[0]", "Leaf", ""),
        ("Box", "layers[1..11]", "Leaf", "shared"),
    ]


def test_what_is_folded_keeps_its_edges():
    class Tied(nnx.Module):
        def __init__(self, common):
            self.own, self.common = Leaf(), common

    common = Other()
    model = Box(common=common, layers=[Tied(common) for _ in range(4)])
    model.last = model.layers[3].own
    boxes, edges = drawn(graph(model))
    assert boxes == [("Box", 1), ("Other", 1), ("Tied", 4), ("Leaf", 1)]
    assert ("Tied", "common", "Other", "shared") in edges
    assert ("Box", "last", "Leaf", "shared") in edges


def test_depth():
    boxes, edges = drawn(graph(sharing(), depth=1))
    assert boxes == [("Box", 1), ("Leaf", 1), ("Other", 1), ("w", 1), ("Box", 1), ("Leaf", 12)]
    assert ("Box", "d.w", "w", "shared") in edges
    assert drawn(graph(sharing(), depth=0))[0][0] == ("Box", 1)


def test_svg_is_well_formed_and_escaped():
    model = sharing()
    model.name = 'a "quoted" <name> & \x00\x1b\ud800'
    picture = graph(model)
    root = ET.fromstring(picture.svg.encode())
    texts = ["".join(t.itertext()) for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "many.<&>[0..11]" in texts and "Leaf ×12" in texts and "48 params" not in texts
    assert any(text == "8 params" for text in texts)
    titles = ["".join(t.itertext()) for t in root.iter("{http://www.w3.org/2000/svg}title")]
    assert any("w = float32[4,2]" in title and "params: 8 (32 B)" in title for title in titles)
    assert picture._repr_svg_() == picture.svg and "http" not in picture.svg.split(">", 1)[1]
    assert repr(picture) == "<nnx.Graph of 7 boxes and 9 edges>"


def models():
    yield sharing()
    yield Box(x={str(i): Box(y=[Leaf(i), Other(i)] * 2, z=Leaf(9)) for i in range(1, 6)})
    common = Leaf()
    deep = Box(a=Leaf(), common=common)
    for i in range(6):
        deep = Box(inner=deep, common=common, n=Leaf(i + 1))
    top = Box(early=common, deep=deep)
    deep.inner.inner.top = top
    deep.inner.inner.itself = deep.inner.inner
    yield top


@pytest.mark.parametrize("model", list(models()))
def test_boxes_and_edges_do_not_run_into_each_other(model):
    picture = graph(model)
    width, height = picture.size

    def around(box):
        return box.x, box.y - box.height / 2, box.x + box.width, box.y + box.height / 2

    for box in picture.boxes:
        left, top, right, bottom = around(box)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
    for a, b in itertools.combinations(map(around, picture.boxes), 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    for edge in picture.edges:
        points = [p[-1] for p in edge.path]
        ends = (edge.source, edge.target)
        first, last = ends[::-1] if edge.kind == BACK_EDGE else ends
        if first is last:
            continue
        assert points[0][0] == first.x + first.width and points[-1][0] == last.x
        assert all(a[0] <= b[0] for a, b in itertools.pairwise(points))
        for box in picture.boxes:
            left, top, right, bottom = around(box)
            for (x0, y0), (x1, y1) in itertools.pairwise(points):
                straight = y0 == y1 and x0 < right and left < x1
                assert not straight or not top < y0 < bottom


def test_a_long_chain_needs_no_recursion():
    chain = Leaf()
    for _ in range(1000):
        chain = Box(inner=chain)
    assert len(graph(chain).boxes) == 1001


def test_files(tmp_path, monkeypatch):
    model = sharing()
    picture = graph(model, tmp_path / "model.svg")
    assert (tmp_path / "model.svg").read_text() == picture.svg
    picture.save(str(tmp_path / "model.PNG"))
    picture.save(tmp_path / "model.pdf")
    data = (tmp_path / "model.PNG").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert abs(width - 2 * picture.size[0]) <= 2 and abs(height - 2 * picture.size[1]) <= 2
    assert (tmp_path / "model.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(
        ValueError, match=r"saves .svg and, with matplotlib, .png and .pdf.*'x.jpg'"
    ):
        picture.save("x.jpg")
    with pytest.raises(TypeError, match="takes a module, but got a dict"):
        graph({"a": model})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        ImportError, match="needs matplotlib to save a PNG.*ends in .svg, which works without it"
    ):
        picture.save(tmp_path / "other.png")
