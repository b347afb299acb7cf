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
