"""Models as interactive pages."""

import sys
import types

import jax
import jax.numpy as jnp
import pytest
import treescope

import nnx
from nnx.show.html import display, register
from tests.models import Net
from tests.nnx.show.browser import CHROMIUM, Browser


class Box(nnx.Module):
    """A module with the attributes that it is given."""

    def __init__(self, **attributes):
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.fixture
def model():
    with nnx.scope(0):
        model = Box(
            layer=nnx.Linear(8, 4, kernel_metadata={"axes": ("x", "y")}),
            head=nnx.Linear(4, 8),
            norm=nnx.BatchNorm(4),
            act=jax.nn.relu,
            name="<b>&",
        )
    model.tied = Box(kernel=nnx.get_ref(model.head, "kernel"), layers=[model.layer, model.norm])
    model.tied.parent = model
    return model


def text_of(x):
    register()
    return treescope.render_to_text(x)


def test_a_module_has_its_parts_by_name_and_collection(model):
    text = text_of(model.layer)
    assert text.startswith("Linear(\n  kernel=")
    assert "# params, axes=('x', 'y')" in text and "in_features=8" in text and "bias=" in text
    assert "param_dtype" not in text and "_plain" not in text
    assert "# batch_stats" in text_of(model.norm)


def test_what_is_shared_is_shown_once_and_named(model):
    text = text_of(model)
    for part in (
        "layers=[<same as layer>, <same as norm>]",
        "kernel=<same as head.kernel>",
        "parent=<same as the root>",
        "shared: 2 places",
    ):
        assert part in text
    assert "0x" not in text and "epeated" not in text
    # One drawing leaves nothing behind for the next, also where it fails.
    assert text_of(model) == text
    assert "<same" not in text_of(model.layer)


def test_refs_partitions_and_shapes(model):
    assert "# counters" in text_of(nnx.Ref(jnp.ones(3), "counters"))
    text = text_of(model["batch_stats"])
    assert text.startswith("Partition({") and "'norm.mean':" in text
    shapes = nnx.eval_shape(lambda: nnx.Linear.init(0)(10**6, 10**6))
    assert "1000000" in text_of(shapes)
    both = text_of([model.layer, {"x": model.head}])
    assert both.count("Linear(") == 2


def test_an_error_in_a_part_is_not_kept(model):
    class Fails:
        def __treescope_repr__(self, path, inner):
            raise RuntimeError("no picture")

    model.bad = Fails()
    with pytest.raises(RuntimeError, match="no picture"):
        text_of(model)
    del model.bad
    assert text_of(model.layer).startswith("Linear(\n  kernel=")


def test_the_page_is_whole(model, tmp_path):
    display(model, tmp_path / "model.html")
    page = (tmp_path / "model.html").read_text()
    assert page.startswith("<!doctype html>") and "<title>Box</title>" in page
    assert "src=" not in page.split("<body>")[0] and "https://" not in page
    display(model["params"], str(tmp_path / "params.html"))
    assert "<title>Partition</title>" in (tmp_path / "params.html").read_text()


def test_deep_and_long_models(tmp_path):
    deep = Box(n=0)
    for _ in range(1000):
        deep = Box(child={"a": [deep]})
    display(deep, tmp_path / "deep.html")
    assert (tmp_path / "deep.html").stat().st_size < 10**5
    assert "Box(… display it by itself)" in text_of(deep)
    assert len(text_of(Box(text="x" * 10**5))) < 1000


def test_outside_of_a_notebook_it_is_text(model, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", None)
    display(model.layer)
    assert capsys.readouterr().out == repr(model.layer) + "\n"
    display(model["batch_stats"])
    assert capsys.readouterr().out.startswith("Partition({")


def test_in_a_notebook_treescope_shows_it(monkeypatch):
    shown = []
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: 1))
    monkeypatch.setattr(treescope, "display", lambda x, **options: shown.append((x, options)))
    net = Net()
    display(net)
    assert shown[0][0] is net
    pictures = shown[0][1]["autovisualize"]
    treescope.render_to_text(jnp.ones(1))  # by which treescope learns what JAX's arrays are
    assert pictures(jnp.ones(3), None) is not None and pictures(jnp.ones((0, 3)), None) is None


def test_without_treescope_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "treescope", None)
    with pytest.raises(ImportError, match=r"pip install treescope.*nnx.tabulate"):
        display(Net())


if CHROMIUM is not None:

    def test_in_a_browser(model, tmp_path):
        page = tmp_path / "model.html"
        display(model, page)
        with Browser(page, tmp_path / "profile") as browser:
            inside = "document.querySelector('treescope-container')?.shadowRoot"
            text = browser.wait(
                f"{inside}?.textContent.includes('Linear(') && {inside}.textContent"
            )
            assert "<same as head.kernel>" in text and "axes=('x', 'y')" in text
            # Pictures are drawn when they are first seen.
            assert browser.wait(f"{inside}.querySelectorAll('canvas').length") > 0
            assert browser.run("document.title") == "Box"


def test_arrays_without_values(tmp_path, capsys):
    model = Net()
    model.rows, model.none = nnx.Ref(jnp.zeros((0, 3)), "cache"), jnp.zeros((2, 0))
    display(model, tmp_path / "model.html")
    assert "</html>" in (tmp_path / "model.html").read_text()
    display(model["cache"])
    assert "(0, 3)" in capsys.readouterr().out
