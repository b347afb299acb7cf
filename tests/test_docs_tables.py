"""The tables of the docs: every line of ours in them runs, and generated pages are up to date.

`UPDATE_DOCS=1 pytest tests/test_docs_tables.py` rewrites `docs/errors.md` and the picture in the tutorial.
"""

import ast
import importlib.util
import os
import re
import sys
import traceback
from collections import Counter
from pathlib import Path

import pytest

import nnx

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TABLES = ["migration.md", "numerics.md", "promises.md"]


def rows(page):
    """The last cells of the rows of a page's tables, with their line numbers."""
    for number, line in enumerate((DOCS / page).read_text().splitlines(), 1):
        # A code span in a table has its pipes escaped.
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and not re.fullmatch(r"-+", cells[0]) and cells[-1].startswith("`"):
            yield number, cells[-1].replace("\\|", "|")


CASES = [(page, number, cell) for page in TABLES for number, cell in rows(page)]


@pytest.fixture(scope="module")
def setups():
    pages = {page: (DOCS / page).read_text() for page in TABLES}
    return {p: re.findall(r"^```python\n(.*?)^```", t, re.M | re.S)[0] for p, t in pages.items()}


@pytest.mark.parametrize("page, number, cell", CASES, ids=lambda x: str(x)[:40])
def test_every_line_of_a_table_runs(page, number, cell, setups, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = re.fullmatch(r"`([^`]+)`", cell)
    assert line, f"{page}:{number}: the last cell of a row is one line of code, not {cell}"
    scope = {"__name__": "page"}
    exec(compile(setups[page], page, "exec"), scope)
    exec(compile(line[1], f"{page}:{number}", "exec"), scope)


def test_every_table_has_rows():
    assert Counter(page for page, *_ in CASES).keys() == set(TABLES)
    assert len(CASES) > 100


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_errors", DOCS / "make_errors.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def errors(maker):
    return [maker.run(mistake) for mistake in maker.MISTAKES]


def test_the_errors_are_those_that_are_raised(maker, errors):
    made = maker.page(errors)
    if os.environ.get("UPDATE_DOCS"):
        maker.PAGE.write_text(made)
    assert maker.PAGE.read_text() == made
    assert made.count("\n## ") == 10


def test_the_tracebacks_of_the_errors_are_short(errors):
    for error in errors:
        # The first frame is the test itself, which a user does not have.
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)][1:]
        assert files[0] == "example.py" and len(files) <= 9, files


def test_the_picture_in_the_tutorial_is_of_its_model():
    page = (DOCS / "tutorial.md").read_text()
    scope = {"nnx": nnx}
    exec(re.search(r"^class Net.*?(?=^```)", page, re.M | re.S)[0], scope)
    drawn = nnx.graph(scope["Net"].init(0)(hidden=128, classes=10)).svg
    picture = DOCS / "images" / "tutorial.svg"
    if os.environ.get("UPDATE_DOCS"):
        picture.write_text(drawn)
    assert picture.read_text() == drawn


DIRECTIVE = r"^(?:\.\. |```{)(?:auto\w+|py:\w+)(?:::|}) (nnx\.[\w.]+)"


def test_every_public_name_is_in_the_reference_once():
    pages = [page.read_text() for page in sorted((DOCS / "api").glob("*.md"))]
    there = Counter(name for page in pages for name in re.findall(DIRECTIVE, page, re.M))
    public = Counter(f"nnx.{name}" for name in nnx.__all__)
    public += Counter(
        f"nnx.metrics.{name}" for name in nnx.metrics.__all__ if name not in nnx.__all__
    )
    public += Counter(f"nnx.bridge.{name}" for name in nnx.bridge.__all__)
    public += Counter(f"nnx.debug.{name}" for name in nnx.debug.__all__)
    aliases = ("Initializer", "xavier", "kaiming")
    drawing = [name for name in dir(nnx.initializers) if not name.startswith(("_", *aliases))]
    public += Counter(f"nnx.initializers.{name}" for name in drawing)
    markers = set(sys.modules["nnx.purify"].__all__) - {"purify"}
    public += Counter(f"nnx.purify.{name}" for name in markers)
    assert there == public


def test_figures_are_those_that_were_measured():
    measured = (ROOT / "benchmarks" / "results" / "results.md").read_text()
    page = (DOCS / "performance.md").read_text()
    table = re.search(r"\| SGD step, time.*?\n\n", page, re.S)
    rows = [re.findall(r"\d+\.\d+", row) for row in table[0].strip().splitlines()[2:]]
    (step,) = re.findall(r"### SGD step\n\n(.*?)\n\n", measured, re.S)
    medians = [re.findall(r"(\d+\.\d+) \(", row) for row in step.splitlines()[3:]]
    assert len(rows) > 4 and rows == medians


def test_what_the_table_of_architectures_names_is_there():
    page = (DOCS / "architectures.md").read_text()
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 12 and len({row[0] for row in rows}) == len(rows)
    for name, paper, file, at, _ in rows:
        (path,) = re.findall(r"^`(examples/\w+\.py)`$", file.strip())
        assert re.search(r"^\[[^]]+ \d{4}\]\(https://[^)]+\)$", paper.strip()), name
        source = ast.parse((ROOT / path).read_text())
        there = {node.name for node in source.body if hasattr(node, "name")}
        assigned = [x for node in source.body if isinstance(node, ast.Assign) for x in node.targets]
        there |= {x.id for x in assigned if isinstance(x, ast.Name)}
        named = re.findall(r"`(\w+)`", at)
        assert named and set(named) <= there, name
        # CI runs the file, or the README does.
        run = (ROOT / ".ci" / "run").read_text()
        assert Path(path).stem in run, name
