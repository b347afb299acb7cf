"""The README and the docs are run, so that they cannot lie."""

import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_python_block_of_a_page_runs(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "page"}
    for i, block in enumerate(blocks(page)):
        exec(compile(block, f"{page.name}, block {i}", "exec"), scope)


@pytest.mark.parametrize("page", ["looking-inside.md"])
def test_the_outputs_on_a_page_are_those_of_its_code(page, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope, printed, shown = {"__name__": "page"}, "", 0
    text = (ROOT / "docs" / page).read_text()
    for kind, block in re.findall(r"^```(python|text)\n(.*?)^```", text, re.M | re.S):
        if kind == "text":
            assert printed == block
            shown += 1
            continue
        capfd.readouterr()
        exec(compile(block, page, "exec"), scope)
        jax.effects_barrier()
        printed = capfd.readouterr().out
    assert shown > 5


def test_the_quick_start_is_the_example():
    program = (ROOT / "examples" / "readme.py").read_text().split('"""\n\n', 1)[1]
    assert blocks(ROOT / "README.md")[0] == program


def test_the_error_in_the_readme_is_the_one_that_is_raised(capsys):
    scope = {"__name__": "page"}
    for block in blocks(ROOT / "README.md"):
        exec(block, scope)
    out = capsys.readouterr().out
    assert "Ref BatchNorm.mean" in out and "Use nnx.jit" in out
