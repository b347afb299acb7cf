"""The code in the README and the docs runs, so that they cannot lie."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALL = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# The others are notebooks: test_docs_site.py builds the site, which runs them.
PAGES = [page for page in ALL if "file_format: mystnb" not in page.read_text()]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_python_block_of_a_page_runs(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "page"}
    for i, block in enumerate(blocks(page)):
        exec(compile(block, f"{page.name}, block {i}", "exec"), scope)


def test_the_quick_start_is_the_example():
    program = (ROOT / "examples" / "readme.py").read_text().split('"""\n\n', 1)[1]
    assert blocks(ROOT / "README.md")[0] == program


def test_the_error_in_the_readme_is_the_one_that_is_raised(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "page"}
    for block in blocks(ROOT / "README.md"):
        exec(block, scope)
    out = capsys.readouterr().out
    assert "Ref BatchNorm.mean" in out and "Use nnx.jit" in out
