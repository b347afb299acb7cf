"""Type checking: pyright and mypy over programs of a user."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = [ROOT / "tests/typing" / name for name in ("good.py", "bad.py")]


def pyright(cache):
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run([*command, *PROGRAMS], capture_output=True, text=True, cwd=ROOT)
    for found in json.loads(done.stdout)["generalDiagnostics"]:
        if found["severity"] == "error":
            yield found["file"], found["range"]["start"]["line"] + 1, found["message"]


def mypy(cache):
    options = [
        "--strict",
        "--disable-error-code=import-untyped",
        "--follow-imports=silent",
        "--cache-dir",
        cache,
        "--output=json",
    ]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *PROGRAMS],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    for found in map(json.loads, done.stdout.splitlines()):
        if found["severity"] == "error":
            yield found["file"], found["line"], found["message"]


@pytest.fixture(scope="module", params=[pyright, mypy])
def errors(request):
    cache = str(request.config.cache.mkdir("mypy"))
    found = {program.name: {} for program in PROGRAMS}
    for file, line, message in request.param(cache):
        found[Path(file).name][line] = message
    return found


def test_a_good_program_has_the_types_that_it_says(errors):
    assert not errors["good.py"]


def test_each_mistake_is_found_and_nothing_else(errors):
    lines = PROGRAMS[1].read_text().splitlines()
    marked = {i for i, line in enumerate(lines, 1) if line.endswith("# wrong")}
    assert len(marked) >= 20
    missed = [lines[i - 1] for i in marked - errors["bad.py"].keys()]
    others = {i: errors["bad.py"][i] for i in errors["bad.py"].keys() - marked}
    assert not missed and not others
