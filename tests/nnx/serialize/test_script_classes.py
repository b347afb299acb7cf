"""A file from a script calls its classes `__main__`, and another program can still load it."""

import subprocess
import sys
import types

import pytest

import nnx

SCRIPT = """
import nnx

class Inner(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(2, 2)

class Outer(nnx.Module):
    def __init__(self):
        self.inner = Inner()

if __name__ == "__main__":
    nnx.save("outer.npz", Outer.init(0)())
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    # The script runs in another folder, but can import the same modules.
    setup = f"import sys, runpy; sys.path[:] = {sys.path!r}; runpy.run_path('script.py', run_name='__main__')"
    subprocess.run([sys.executable, "-c", setup], cwd=tmp_path, check=True)
    return tmp_path / "outer.npz"


def test_the_error_names_all_classes_and_its_advice_works(file, monkeypatch):
    script = types.ModuleType("the_script")
    exec(SCRIPT, vars(script))
    with pytest.raises(nnx.LoadError) as raised:
        nnx.load(file)
    text = str(raised.value)
    assert "'__main__.Outer', '__main__.Inner', module classes that this program has not" in text
    assert "define models in a module that both programs import" in text
    assert "nnx.saveable(name='__main__.Outer')(Outer)" in text

    report = nnx.load_state(file, into=script.Outer.init(1)())
    assert len(report.loaded) == 2

    monkeypatch.setattr(sys.modules["__main__"], "Outer", script.Outer, raising=False)
    with pytest.raises(nnx.LoadError, match="it holds a '__main__.Inner', a module class that"):
        nnx.load(file)
    monkeypatch.setattr(sys.modules["__main__"], "Inner", script.Inner, raising=False)
    assert type(nnx.load(file)) is script.Outer
