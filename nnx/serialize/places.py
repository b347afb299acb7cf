"""Where files are written and read: a path, which a save replaces in one step, or an open file."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from nnx.serialize.errors import LoadError, SaveError
from refx.text import a_kind

try:
    import fcntl
except ImportError:  # Windows lacks fcntl, but there an open file cannot be removed.
    fcntl: Any = None

__all__: list[str] = []


def is_path(x: Any) -> bool:
    """Whether `x` is a path rather than an open file."""
    return isinstance(x, str | bytes | os.PathLike)


def shown(path: Any) -> str:
    """The name of a path or an open file for messages."""
    if is_path(path):
        return os.fsdecode(path)
    name: Any = getattr(path, "name", None)
    return os.fsdecode(name) if is_path(name) else f"the {type(path).__name__}"


# ---- writing


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A file under a temporary name beside `path`. It replaces `path` if nothing is raised.

    Raises:
      OSError: from the operating system, or because `path` is not an ordinary file.
    """
    if "\0" in path:
        raise OSError(errno.EINVAL, "there is a null character in the path")
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "it is a folder; give the name of a file in it")
    if not os.path.isdir(folder):
        text = f"the folder to save in does not exist; make it with os.makedirs: {folder!r}"
        raise FileNotFoundError(errno.ENOENT, text)
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "it is not an ordinary file, so it cannot be replaced")
    prefix = f".nnx.{zlib.crc32(os.fsencode(name)):08x}."
    _remove_stale(folder, prefix)
    file, temporary = _create(folder, prefix)
    try:
        with file:
            yield file
            # Flush before renaming: otherwise a power failure could lose the new file and the old
            # one.
            file.flush()
            os.fsync(file.fileno())
            os.chmod(temporary, _mode(path))
            if fcntl is None:
                file.close()
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    # The new file is already in place, so this failure must not count as a failed save.
    with contextlib.suppress(OSError):
        sync_folder(folder)


def _create(folder: str, prefix: str) -> tuple[BinaryIO, str]:
    """A new file and its name. The file is locked as long as it is open."""
    while True:
        number, temporary = tempfile.mkstemp(prefix=prefix, suffix=".tmp", dir=folder)
        file = open(number, "wb")  # noqa: SIM115 — it stays open
        try_lock(number, wait=True)
        # Another save may have taken it for stale before it was locked.
        if os.path.exists(temporary):
            return file, temporary
        file.close()


def try_lock(number: int, *, wait: bool = False) -> bool:
    """Lock a file, unless somebody else holds the lock. The system releases it when its owner dies.

    With `wait`, wait for a program that is checking whether the file is stale and may remove it.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        # This also happens if the file system has no locks. Then nothing counts as stale.
        return False
    return True


def _remove_stale(folder: str, prefix: str) -> None:
    """Remove what savers of this name have left behind that were killed."""
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        if not (name.startswith(prefix) and name.endswith(".tmp")):
            continue
        stale = os.path.join(folder, name)
        with contextlib.suppress(OSError):
            number = os.open(stale, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
            with open(number, "rb") as file:
                if try_lock(number):
                    if fcntl is None:
                        file.close()
                    os.unlink(stale)


def _mode(path: str) -> int:
    # Temporary files are private. The file should have the permissions of any other new file.
    try:
        return os.stat(path).st_mode & 0o777
    except OSError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask


def sync_folder(folder: str) -> None:
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def check_writable(file: Any) -> None:
    """Raise unless this is an open file that takes bytes."""
    if not hasattr(file, "write"):
        raise SaveError(
            f"nnx.save takes a path or an open binary file, but got {a_kind(type(file))}."
        )
    if isinstance(file, io.TextIOBase):
        raise SaveError(f"{shown(file)} is open for text. Open it for bytes: open(path, 'wb').")
    if getattr(file, "closed", False):
        raise SaveError(f"{shown(file)} is closed.")
    if hasattr(file, "writable") and not file.writable():
        raise SaveError(f"{shown(file)} is open for reading. Open it with open(path, 'wb').")


# ---- reading


@contextlib.contextmanager
def reading(path: Any) -> Iterator[tuple[Any, int]]:
    """A file that can seek, at its beginning, and its size.

    An open file counts from its current position.

    Raises:
      OSError: from the operating system.
      LoadError: `file` is neither a path nor a file. The message does not yet name it.
    """
    if is_path(path):
        if "\0" in os.fsdecode(path):
            raise OSError(errno.EINVAL, "there is a null character in the path")
        with open(path, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size
        return
    if not hasattr(path, "read"):
        raise LoadError("nnx.load takes a path or an open binary file")
    if isinstance(path, io.TextIOBase):
        raise LoadError("it is open for text; open it for bytes: open(path, 'rb')")
    if getattr(path, "closed", False):
        raise LoadError("it is closed")
    if hasattr(path, "readable") and not path.readable():
        raise LoadError("it is open for writing; open it with open(path, 'rb')")
    whole, size = _whole(path)
    if size == 0:
        raise LoadError("nothing is left to read; after writing, call file.seek(0)")
    yield whole, size


def _whole(file: Any) -> tuple[Any, int]:
    if hasattr(file, "readinto") and hasattr(file, "seekable") and file.seekable():
        start = file.tell()
        size = file.seek(0, os.SEEK_END)
        file.seek(start)
        if start == 0:
            return file, size
    data = file.read()
    return io.BytesIO(data), len(data)
