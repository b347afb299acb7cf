"""The files around the code agree with each other."""

import importlib
import re
import tomllib
from pathlib import Path

import nnx
import refx

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_stands_in_one_place():
    assert "version" in PROJECT["project"]["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", nnx.__version__)
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {nnx.__version__}\n" in citation


def test_the_tests_run_with_what_the_project_says_it_supports():
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    tested = set(re.findall(r'python: "([\d.]+)"', workflow)) - {None}
    prefix = "Programming Language :: Python :: 3."
    claimed = {
        c.removeprefix("Programming Language :: Python :: ")
        for c in PROJECT["project"]["classifiers"]
        if c.startswith(prefix)
    }
    assert tested == claimed
    (oldest,) = (d.split(">=")[1] for d in PROJECT["project"]["dependencies"] if d[:5] == "jax>=")
    assert f'jax: "{oldest}"' in workflow and oldest in (ROOT / "README.md").read_text()


def test_nothing_sends_a_reader_to_the_other_package_of_this_name():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.py")]
    pages += [*(ROOT / "nnx").rglob("*.py"), *(ROOT / "refx").rglob("*.py")]
    for page in pages:
        for line in page.read_text().splitlines():
            if re.search(r"(pip|uv)( add| install)( -\S+)* [\"']?nnx\b", line):
                assert "another project" in line or "does not install this one" in line, page


def test_every_public_name_of_a_file_of_refx_is_one_of_refx():
    files = [importlib.import_module(f"refx.{path.stem}") for path in ROOT.glob("refx/[!_]*.py")]
    names = {name for file in files for name in getattr(file, "__all__", ())}
    assert names | {"filters"} == set(refx.__all__)
    assert all(getattr(refx, name) is not None for name in refx.__all__)
