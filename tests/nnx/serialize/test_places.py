"""The places of files: full disks, killed savers, open files, paths of every kind."""

import errno
import io
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading

import jax.numpy as jnp
import pytest

import nnx
from nnx.serialize import places
from tests.models import Dense

KINDS = ["npz", "safetensors"]


@pytest.fixture(params=KINDS)
def path(request, tmp_path):
    path = tmp_path / f"model.{request.param}"
    nnx.save(path, Dense())
    return path


class Table(nnx.Module):
    """A model of 400 kB."""

    def __init__(self):
        self.table = jnp.zeros(100_000)


def unchanged(path):
    """Only the old file is there, complete."""
    assert os.listdir(path.parent) == [path.name]
    assert jnp.array_equal(nnx.load(path).w, Dense().w)


# ---- errors of the system


FULL = """
import resource, signal, sys
import nnx
from tests.nnx.serialize.test_places import Table
model = Table()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for path in sys.argv[1:]:
    try:
        nnx.save(path, model)
    except nnx.SaveError as error:
        print(isinstance(error, OSError), error.errno, error)
"""


def test_a_disk_that_is_full(tmp_path):
    # To a writer, a limit on the file size looks like a full disk: only a part is written.
    paths = [tmp_path / kind / f"model.{kind}" for kind in KINDS]
    for path in paths:
        path.parent.mkdir()
        nnx.save(path, Dense())
    command = [sys.executable, "-c", FULL, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        f"True {errno.EFBIG} {path} cannot be saved: File too large" for path in paths
    ]
    for path in paths:
        unchanged(path)


def test_an_open_file_on_a_full_disk():
    for buffering in (0, -1):
        file = open("/dev/full", "wb", buffering=buffering)  # noqa: SIM115
        with pytest.raises(
            nnx.SaveError, match="^/dev/full cannot be saved: No space left"
        ) as error:
            nnx.save(file, Table())
        assert isinstance(error.value, OSError) and error.value.errno == errno.ENOSPC
        os.close(file.fileno())
        with pytest.raises(OSError):
            file.close()
    # A device is not a file that another could replace.
    with pytest.raises(
        nnx.SaveError, match="/dev/full cannot be saved: it is not an ordinary file"
    ):
        nnx.save("/dev/full", Dense())
    assert not os.path.isfile("/dev/full")


REFUSALS = [
    ("fsync", OSError(errno.ENOSPC, "No space left on device")),
    ("fsync", OSError(errno.EIO, "Input/output error")),
    ("replace", PermissionError(errno.EACCES, "Permission denied")),
    ("chmod", PermissionError(errno.EPERM, "Operation not permitted")),
]


@pytest.mark.parametrize("name, raised", REFUSALS)
def test_what_the_system_refuses(path, monkeypatch, name, raised):
    def refuse(*_, **__):
        raise raised

    with monkeypatch.context() as patch:
        patch.setattr(os, name, refuse)
        with pytest.raises(nnx.SaveError) as error:
            nnx.save(path, Dense(seed=1))
    assert isinstance(error.value, type(raised)) and error.value.errno == raised.errno
    assert str(error.value) == f"{path} cannot be saved: {raised.strerror}"
    assert error.value.filename == str(path)
    unchanged(path)
    again = pickle.loads(pickle.dumps(error.value))
    assert type(again) is type(error.value) and str(again) == str(error.value)


def test_a_folder_without_permission(path, monkeypatch):
    def refuse(*_, **options):
        raise PermissionError(errno.EACCES, "Permission denied", options["dir"])

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", refuse)
        with pytest.raises(nnx.SaveError, match="cannot be saved: Permission denied$") as error:
            nnx.save(path, Dense(seed=1))
    assert isinstance(error.value, PermissionError) and str(path) in str(error.value)
    unchanged(path)


def test_a_folder_that_cannot_be_listed_or_flushed(path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", refuse)
        patch.setattr(places, "sync_folder", refuse)
        # The file is there, so this is not a failure.
        nnx.save(path, Dense(seed=1))
    assert jnp.array_equal(nnx.load(path).w, Dense(seed=1).w)


def test_folders_and_files_that_are_in_the_way(tmp_path, path):
    folder = tmp_path / "run.npz"
    folder.mkdir()
    for call in (lambda: nnx.save(folder, Dense()), lambda: nnx.save(str(tmp_path), Dense())):
        with pytest.raises(nnx.SaveError, match="cannot be saved: it is a folder") as error:
            call()
        assert isinstance(error.value, IsADirectoryError)
    with pytest.raises(nnx.SaveError, match="the folder to save in does not exist"):
        nnx.save(path / "inside.npz", Dense())
    with pytest.raises(nnx.LoadError, match=f"^{folder} cannot be loaded: Is a directory") as error:
        nnx.load(folder)
    assert isinstance(error.value, IsADirectoryError)
    with pytest.raises(nnx.LoadError, match="cannot be loaded: No such file") as error:
        nnx.load_state(tmp_path / "none.npz", into=Dense())
    assert isinstance(error.value, FileNotFoundError)
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, "run.npz"])


@pytest.mark.parametrize("wrong", [3, None, Dense, "a\0b.npz", b"\0"])
def test_what_is_not_a_path(wrong):
    with pytest.raises(
        nnx.SaveError, match="cannot be saved: there is a null|takes a path or an open"
    ):
        nnx.save(wrong, Dense())
    with pytest.raises(
        nnx.LoadError, match="cannot be loaded: there is a null|takes a path or an open"
    ):
        nnx.load(wrong)


def test_paths_of_bytes(path):
    raw = os.fsencode(path)
    nnx.save(raw, Dense(seed=2))
    assert jnp.array_equal(nnx.load(raw).w, Dense(seed=2).w)
    nnx.load_state(raw, into=Dense())
    strange = os.path.join(os.path.dirname(raw), b"\xff\xfe.npz")
    nnx.save(strange, Dense())
    nnx.load(strange)
    with pytest.raises(nnx.SaveError, match=f"{path.parent}/nowhere/x.npz cannot be saved"):
        nnx.save(os.fsencode(path.parent / "nowhere" / "x.npz"), Dense())


# ---- open files


def test_open_files(tmp_path):
    memory = io.BytesIO()
    nnx.save(memory, Dense())
    memory.seek(0)
    assert jnp.array_equal(nnx.load(memory).w, Dense().w)
    memory.seek(0)
    other = Dense(seed=1)
    nnx.load_state(memory, into=other)
    assert jnp.array_equal(other.w, Dense().w)
    for kind in KINDS:
        path = tmp_path / f"m.{kind}"
        with open(path, "wb") as file:
            nnx.save(file, Dense())
        assert jnp.array_equal(nnx.load(path).w, Dense().w)
        with open(path, "rb") as file:
            assert jnp.array_equal(nnx.load(file).w, Dense().w)
        with tempfile.SpooledTemporaryFile() as file:
            nnx.save(file, Dense())
            file.seek(0)
            nnx.load(file)


def test_an_open_file_is_read_from_where_it_is():
    file = io.BytesIO()
    file.write(b"a header of somebody")
    nnx.save(file, Dense())
    file.seek(20)
    assert jnp.array_equal(nnx.load(file).w, Dense().w)


def test_pipes(tmp_path):
    read, write = os.pipe()

    def save():
        with open(write, "wb") as file:
            nnx.save(file, Dense())

    thread = threading.Thread(target=save)
    thread.start()
    with open(read, "rb") as file:
        assert jnp.array_equal(nnx.load(file).w, Dense().w)
    thread.join()


def test_open_files_that_cannot_serve(tmp_path):
    path = tmp_path / "m.npz"
    nnx.save(path, Dense())
    with open(path, "rb") as file, pytest.raises(nnx.SaveError, match="m.npz is open for reading"):
        nnx.save(file, Dense())
    with pytest.raises(nnx.SaveError, match="is closed"):
        nnx.save(file, Dense())
    with pytest.raises(nnx.LoadError, match="m.npz cannot be loaded: it is closed"):
        nnx.load(file)
    with pytest.raises(nnx.SaveError, match="the StringIO is open for text.*'wb'"):
        nnx.save(io.StringIO(), Dense())
    with pytest.raises(nnx.LoadError, match="it is open for text.*'rb'"):
        nnx.load(io.StringIO())
    with open(path, "ab") as file, pytest.raises(nnx.LoadError, match="it is open for writing"):
        nnx.load(file)
    memory = io.BytesIO()
    nnx.save(memory, Dense())
    with pytest.raises(
        nnx.LoadError, match=r"the BytesIO cannot be loaded: nothing .*file\.seek\(0\)"
    ):
        nnx.load(memory)
    with pytest.raises(nnx.LoadError, match="the BytesIO cannot be loaded: it is damaged"):
        nnx.load(io.BytesIO(b"nonsense"))
    # The check for unsaveable objects comes before any writing.
    memory = io.BytesIO()
    with pytest.raises(nnx.SaveError, match="<lambda>"):
        nnx.save(memory, [lambda: 0])
    assert memory.getvalue() == b""


# ---- savers that were killed

KILLED = """
import os, signal, sys
import nnx
from tests.models import Dense
nnx.save(sys.argv[1], Dense(seed=5), progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The file that a killed saver of `model.npz` leaves: its name and its content."""
    path = tmp_path_factory.mktemp("killed") / "model.npz"
    nnx.save(path, Dense())
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)])
    assert done.returncode == -signal.SIGKILL
    unharmed = jnp.array_equal(nnx.load(path).w, Dense().w)
    (left,) = set(os.listdir(path.parent)) - {path.name}
    assert unharmed and left.endswith(".tmp")
    return left, (path.parent / left).read_bytes()


@pytest.fixture
def littered(tmp_path, killed):
    """A path beside which two savers were killed."""
    path = tmp_path / "model.npz"
    nnx.save(path, Dense())
    for name in (killed[0], killed[0].replace(".tmp", "x.tmp")):
        (tmp_path / name).write_bytes(killed[1])
    return path


def test_a_later_save_removes_what_a_killed_one_left(littered):
    other = littered.with_name("other.npz")
    nnx.save(other, Dense())
    # Files that belong to another name are left for the next save to that name.
    assert len(os.listdir(littered.parent)) == 4
    nnx.save(littered, Dense(seed=1))
    assert sorted(os.listdir(littered.parent)) == [littered.name, other.name]
    assert jnp.array_equal(nnx.load(littered).w, Dense(seed=1).w)


def test_a_saver_that_is_alive_keeps_its_file(path):
    inner = []

    def progress(*_):
        if not inner:
            inner.append(True)
            nnx.save(path, Dense(seed=2))
            assert jnp.array_equal(nnx.load(path).w, Dense(seed=2).w)

    nnx.save(path, Dense(seed=3), progress=progress)
    assert inner and jnp.array_equal(nnx.load(path).w, Dense(seed=3).w)
    assert os.listdir(path.parent) == [path.name]


def test_savers_of_one_path_at_the_same_time(path):
    errors = []

    def work(seed):
        try:
            for _ in range(15):
                nnx.save(path, Dense(seed=seed))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert any(jnp.array_equal(nnx.load(path).w, Dense(seed=i).w) for i in range(4))
    assert os.listdir(path.parent) == [path.name]


def test_files_of_others_are_left_alone(littered, killed):
    folder = littered.parent
    for name in (".nnx.tmp", ".nnx.notes.tmp", ".nnx.0.tmp", killed[0].removesuffix(".tmp")):
        (folder / name).write_bytes(b"x")
    # A link with such a name may lead to somebody's file.
    (folder / killed[0]).unlink()
    (folder / killed[0]).symlink_to(folder / ".nnx.tmp")
    nnx.save(littered, Dense())
    assert len(os.listdir(folder)) == 6 and (folder / ".nnx.tmp").read_bytes() == b"x"


def test_without_locks_nothing_is_said_to_be_stale(littered, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(places.fcntl, "flock", refuse)
    nnx.save(littered, Dense(seed=1))
    assert jnp.array_equal(nnx.load(littered).w, Dense(seed=1).w)
    assert len(os.listdir(littered.parent)) == 3
