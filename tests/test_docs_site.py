"""The site is built with warnings as errors: broken links, broken docstrings, pages in no menu."""

import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    options = [
        "-q",
        "-W",
        "--keep-going",
        "-b",
        "html",
        "-d",
        str(tmp_path_factory.mktemp("trees")),
    ]
    command = [sys.executable, "-m", "sphinx", *options, str(DOCS), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return out


def test_the_site_has_every_page(site):
    pages = [page.relative_to(DOCS).with_suffix(".html") for page in DOCS.rglob("*.md")]
    assert len(pages) > 20 and [page for page in pages if not (site / page).exists()] == []


def test_pictures_and_docstrings_are_in_it(site):
    assert (site / "_images" / "boundary.svg").exists()
    assert 'id="nnx.Linear"' in (site / "api" / "layers.html").read_text()


def test_no_docstring_shows_its_markup(site):
    for page in (site / "api").glob("*.html"):
        assert "&lt;function" not in page.read_text(), f"{page.name}: a default without its source"


def test_every_guide_that_runs_can_be_opened_as_a_notebook(site):
    guides = [page for page in DOCS.glob("*.md") if "file_format: mystnb" in page.read_text()]
    assert len(guides) > 15
    for page in guides:
        assert f"/{page.stem}.ipynb" in (site / f"{page.stem}.html").read_text(), page.name
    assert len(list((site / "_downloads").rglob("*.ipynb"))) == len(guides)


def test_every_activation_and_initializer_has_a_picture(site):
    page = (site / "api" / "activations.html").read_text()
    assert page.count('<dt class="sig sig-object py"') == page.count("<img alt=") > 40
    assert 'id="nnx.initializers.zeros"' in page


def test_a_cell_of_a_table_has_the_head_of_its_column_for_a_narrow_screen(site):
    assert '<span class="label">Equinox</span>' in (site / "why-nnx.html").read_text()


def test_formulas_need_no_download(site):
    page = (site / "api" / "layers.html").read_text()
    assert "<math " in page and "MathJax" not in page
