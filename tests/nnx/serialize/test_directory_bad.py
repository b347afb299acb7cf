"""Directories that cannot be loaded: each a LoadError that names the directory and what is wrong."""

import errno
import json
import os
import re
import shutil
import zlib

import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx.serialize import store
from tests.models import Dense


class Sized(nnx.Module):
    """A model whose arrays are large enough to lie in files of their own."""

    def __init__(self):
        self.table = nnx.Ref(jnp.asarray(np.random.default_rng(0).normal(size=(64, 64))), "params")
        self.small = nnx.Ref(jnp.arange(3.0), "params")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "run"
    nnx.save(path, Sized())
    return path


@pytest.fixture
def run(good, tmp_path):
    shutil.copytree(good, tmp_path / "run")
    return tmp_path / "run"


def fails(path, message):
    with pytest.raises(
        nnx.LoadError, match=rf"^{re.escape(str(path))} cannot be loaded: .*{message}"
    ):
        nnx.load(path)
    before = Sized()
    with pytest.raises(nnx.LoadError):
        nnx.load_state(path, into=before)
    assert jnp.array_equal(before.table.value, Sized().table.value)


def arrays_in(path):
    (folder,) = path.glob("arrays-*")
    return folder


def rewrite(path, change, *, honest=True):
    """Change the structure, with the right checksum if `honest`."""
    outer = json.loads((path / "nnx.json").read_text())
    change(outer["structure"])
    if honest:
        text = json.dumps(outer["structure"], separators=(",", ":"))
        outer["crc32"] = zlib.crc32(text.encode())
    (path / "nnx.json").write_text(json.dumps(outer))


def array_code(structure, name):
    found = [s["ref"]["value"] for s in structure["objects"] if "ref" in s]
    return next(code for code in found if code["array"] == name)


def test_half_written(run):
    (run / "nnx.json").unlink()
    fails(run, "it lacks nnx.json, so a save did not finish")
    # Which the next save mends.
    nnx.save(run, Dense())
    assert jnp.array_equal(nnx.load(run).w, Dense().w) and len(os.listdir(run)) == 2


def test_without_its_arrays(run):
    shutil.rmtree(arrays_in(run))
    fails(run, "the folder of its arrays is missing: 'arrays-.*'")


def test_a_directory_of_orbax_and_of_something_else(tmp_path):
    import orbax.checkpoint as ocp

    ocp.PyTreeCheckpointer().save(tmp_path / "orbax", {"a": np.ones(3)})
    with pytest.raises(nnx.LoadError, match="an Orbax directory without the structure of a model"):
        nnx.load(tmp_path / "orbax")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("x")
    with pytest.raises(IsADirectoryError, match="nnx.save did not write it. It holds chapter.txt"):
        nnx.load(tmp_path / "thesis")
    for name in ("thesis", "orbax"):
        before = sorted(os.listdir(tmp_path / name))
        with pytest.raises(nnx.SaveError, match="it is a folder that holds other things"):
            nnx.save(tmp_path / name, Dense())
        assert sorted(os.listdir(tmp_path / name)) == before
    with pytest.raises(FileNotFoundError, match="nowhere"):
        nnx.load(tmp_path / "nowhere/")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        nnx.load(tmp_path / "nowhere")


def test_an_array_that_is_missing_or_of_another_shape(run):
    def rename(structure):
        array_code(structure, "small")["array"] = "other"
        structure["sums"]["other"] = structure["sums"].pop("small")

    def reshape(structure):
        array_code(structure, "table")["shape"] = [64, 63]

    def retype(structure):
        array_code(structure, "table")["dtype"] = "int32"

    original = (run / "nnx.json").read_bytes()
    for change, message in [
        (rename, "its array 'other' is missing"),
        (reshape, r"its array 'table' is float32\[64, 64\], but should be float32\[64, 63\]"),
        (retype, r"its array 'table' is float32\[64, 64\], but should be int32\[64, 64\]"),
        (lambda s: s["sums"].pop("small"), "its checksums are not those of its arrays"),
        (lambda s: s.update(sums=3), "its checksums are not a dict from name to number"),
        (lambda s: s.update(arrays="../other"), "it names '../other' as the folder of its arrays"),
        (
            lambda s: s.update(arrays="arrays-none"),
            "the folder of its arrays is missing: 'arrays-none'",
        ),
        (lambda s: s.update(version=99), "its format version is 99"),
        (lambda s: s.update(format="other"), "its structure is not one that nnx.save wrote"),
        (lambda s: s["sums"].update(small=1), "the checksum of its array 'small' is wrong"),
        (lambda s: s.pop("objects"), "its structure is damaged"),
    ]:
        rewrite(run, change)
        fails(run, message)
        (run / "nnx.json").write_bytes(original)
    rewrite(run, lambda s: s["classes"].clear(), honest=False)
    fails(run, "the checksum of its nnx.json is wrong")
    for text in (b"", b"{", b"[]", b"\xff", original[:-40]):
        (run / "nnx.json").write_bytes(text)
        fails(run, "")


# Orbax leaves tasks of its own behind when it cannot read a file.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_file_that_is_changed_cut_or_gone(good, tmp_path):
    # A change is either of no consequence, or an error.
    names = sorted(p.relative_to(good) for p in good.rglob("*") if p.is_file())
    wrong = 0
    for i, name in enumerate(names):
        for how in ("gone", "cut", "changed"):
            run = tmp_path / f"{i}-{how}"
            shutil.copytree(good, run)
            data = bytearray((run / name).read_bytes())
            if how == "gone":
                (run / name).unlink()
            elif how == "cut":
                (run / name).write_bytes(data[: len(data) // 2])
            else:
                data[len(data) // 2] ^= 0x10
                (run / name).write_bytes(data)
            try:
                loaded = nnx.load(run)
            except nnx.LoadError as error:
                assert str(error).startswith(f"{run} cannot be loaded: ")
                wrong += 1
            else:
                assert jnp.array_equal(loaded.table.value, Sized().table.value)
                assert jnp.array_equal(loaded.small.value, jnp.arange(3.0))
    assert wrong > 8


def test_a_file_in_the_way_and_no_such_folder(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(nnx.SaveError, match="there is a file of that name") as error:
        nnx.save(tmp_path / "run", Dense())
    assert isinstance(error.value, OSError) and error.value.errno == errno.ENOTDIR
    assert (tmp_path / "run").read_text() == "mine"
    with pytest.raises(nnx.SaveError, match="the folder to save in does not exist") as error:
        nnx.save(tmp_path / "a" / "b", Dense())
    assert isinstance(error.value, FileNotFoundError)
    with pytest.raises(nnx.SaveError, match="mount the bucket there"):
        nnx.save("gs://bucket/run", Dense())
    assert os.listdir(tmp_path) == ["run"]


def test_without_orbax(run, monkeypatch):
    import builtins

    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("orbax"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    for call, kind in (
        (lambda: nnx.save(run, Dense()), nnx.SaveError),
        (lambda: nnx.load(run), nnx.LoadError),
    ):
        with pytest.raises(kind, match=r"need Orbax: pip install orbax-checkpoint"):
            call()


def test_one_that_is_replaced_while_it_is_read(run, monkeypatch):
    real = store.Store.read
    replaced = []

    def read(self, shardings):
        if not replaced:
            replaced.append(True)
            nnx.save(run, Dense(seed=4))
        return real(self, shardings)

    monkeypatch.setattr(store.Store, "read", read)
    assert jnp.array_equal(nnx.load(run).w, Dense(seed=4).w)
