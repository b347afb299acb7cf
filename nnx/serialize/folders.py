"""A checkpoint as a directory: where it is written, and how it replaces the previous one.

    run/nnx.json        the structure; it names the folder of its arrays
    run/arrays-…/       the arrays, as Orbax writes them

A save writes a sibling of `run` under a temporary name. If `run` does not exist yet, the sibling is
renamed to it. Otherwise the new arrays are moved into `run`, and then `nnx.json` is replaced. That
one rename makes the new checkpoint valid. Arrays that `nnx.json` does not name are garbage, and the
next save removes them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any

from nnx.serialize.places import fcntl, is_path, sync_folder, try_lock

__all__: list[str] = []

STRUCTURE = "nnx.json"
ARRAYS = "arrays-"


def is_directory(path: Any) -> bool:
    """Whether a save to this path makes a directory: it has no suffix, ends in a slash, or is a directory."""
    if not is_path(path):
        return False
    text = os.fsdecode(path)
    # A pipe or a device is written like a file.
    special = os.path.exists(path) and not (os.path.isdir(path) or os.path.isfile(path))
    return is_there(path) or (not os.path.splitext(text)[1] and not special)


def is_there(path: Any) -> bool:
    """Whether a load from this path reads a directory."""
    if not is_path(path):
        return False
    text = os.fsdecode(path)
    # A folder with a file's name is in the way of a file.
    is_file = text.endswith((".npz", ".safetensors"))
    return text.endswith(("/", os.sep)) or (os.path.isdir(path) and not is_file)


class Sibling:
    """A folder beside `path`, in which the next checkpoint is written.

    Raises:
      OSError: from the operating system, or because `path` cannot become a checkpoint.
    """

    def __init__(self, path: str):
        if "\0" in path:
            raise OSError(errno.EINVAL, "there is a null character in the path")
        self.path = os.path.realpath(path)
        parent, name = os.path.split(self.path)
        if "://" in path:
            raise OSError(
                errno.EINVAL,
                "a directory needs a file system that every process sees; mount the bucket there",
            )
        if not os.path.isdir(parent):
            text = f"the folder to save in does not exist; make it with os.makedirs: {parent!r}"
            raise FileNotFoundError(errno.ENOENT, text)
        if os.path.lexists(self.path) and not os.path.isdir(self.path):
            raise NotADirectoryError(
                errno.ENOTDIR,
                "there is a file of that name; to save a file, give a name that ends in .npz",
            )
        if others := _others(self.path):
            raise IsADirectoryError(
                errno.EISDIR,
                f"it is a folder that holds other things, such as {others[0]!r}; give a name "
                f"inside it, as in {os.path.join(self.path, 'model')!r}",
            )
        prefix = f".nnx.{zlib.crc32(os.fsencode(name)):08x}."
        _remove_stale(parent, prefix)
        self.folder, self._number = _create(parent, prefix)
        self.token = ARRAYS + self.folder.rpartition(".")[0].rpartition(".")[2]

    @property
    def arrays(self) -> str:
        """The folder of the arrays."""
        return os.path.join(self.folder, self.token)

    def commit(self, text: bytes) -> None:
        """Replace the old checkpoint by the new one; `text` is its structure."""
        written = os.path.join(self.folder, STRUCTURE)
        with open(written, "xb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # Temporary folders are private. This one should have the permissions of any other new
        # folder.
        os.chmod(self.folder, 0o777 & ~_umask())
        sync_folder(self.folder)
        if not self._rename():
            with _locked(self.path):
                os.rename(self.arrays, os.path.join(self.path, self.token))
                sync_folder(self.path)
                os.replace(written, os.path.join(self.path, STRUCTURE))
                sync_folder(self.path)
                _remove_unnamed(self.path, self.token)
        with contextlib.suppress(OSError):
            sync_folder(os.path.dirname(self.path))

    def _rename(self) -> bool:
        """Rename the sibling, if nothing has the final name yet."""
        if os.path.isdir(self.path) and os.listdir(self.path):
            return False
        try:
            os.rename(self.folder, self.path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False  # another program was quicker
        return True

    def close(self) -> None:
        """Remove what is left of the sibling."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._number is not None:
            os.close(self._number)


def _others(path: str) -> list[str]:
    """The names of things in a folder that no save has written."""
    if not os.path.isdir(path):
        return []
    names = os.listdir(path)
    return sorted(n for n in names if n != STRUCTURE and not n.startswith(ARRAYS))


def _create(parent: str, prefix: str) -> tuple[str, int | None]:
    """A new folder. It is locked as long as its file descriptor is open."""
    while True:
        folder = tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=parent)
        number = _open(folder)
        if number is None:
            return folder, None
        try_lock(number, wait=True)
        # Another save may have taken it for stale before it was locked.
        if os.path.exists(folder):
            return folder, number
        os.close(number)


def _open(folder: str) -> int | None:
    """The file descriptor of a folder to lock, or None if the system cannot lock folders."""
    if fcntl is None:
        return None
    return os.open(folder, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))


def _remove_stale(parent: str, prefix: str) -> None:
    """Remove what killed programs have left behind when they saved under this name."""
    for name in os.listdir(parent):
        if not (name.startswith(prefix) and name.endswith(".tmp")):
            continue
        stale = os.path.join(parent, name)
        if not os.path.isdir(stale):
            continue
        with contextlib.suppress(OSError):
            number = _open(stale)
            if number is None:
                continue  # nobody can tell whether its saver still lives
            try:
                if try_lock(number):
                    shutil.rmtree(stale, ignore_errors=True)
            finally:
                os.close(number)


def _remove_unnamed(path: str, token: str) -> None:
    for name in os.listdir(path):
        if name.startswith(ARRAYS) and name != token:
            shutil.rmtree(os.path.join(path, name), ignore_errors=True)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Keep other programs from replacing this checkpoint at the same time."""
    number = _open(path)
    try:
        if number is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        if number is not None:
            os.close(number)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
