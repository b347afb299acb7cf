"""A checkpoint as a directory: the structure as in a single file, the arrays through Orbax."""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401 — imported first, so that its exit handler runs after ours
import contextlib
import errno
import functools
import json
import os
import sys
import threading
import zlib
from collections.abc import Callable
from typing import Any

import jax

from nnx.serialize import hosts
from nnx.serialize.decode import guarded
from nnx.serialize.encode import Encoded
from nnx.serialize.errors import LoadError, SaveError, save_error
from nnx.serialize.folders import ARRAYS, STRUCTURE, Sibling
from nnx.serialize.grammar import Damaged, check, check_header, clip, parse
from nnx.serialize.store import Store, finish, is_stored, need_orbax, start, to_store
from nnx.serialize.sums import checksum

__all__ = ["Saving"]


class Saving:
    """A save that continues in the background: `nnx.save(path, tree, wait=False)`.

    Training may continue and may donate the saved arrays: the values were copied before `nnx.save`
    returned. The next save to a directory waits for this one, and so does a load from a directory.
    A program does not end before its saves have ended.

    >>> import jax, nnx, tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "run")
    >>> saving = nnx.save(path, nnx.Linear.init(0)(3, 2), wait=False)
    >>> saving.wait()
    >>> saving.done()
    True
    """

    def __init__(self, path: str, finish: Callable[[], None]):
        self._path = path
        self._finish = finish
        self._error: BaseException | None = None
        self._told = False
        _wait_at_end()
        self._thread = threading.Thread(target=self._run, name=f"nnx.save {path}")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._finish()
        except BaseException as error:
            self._error = error
        finally:
            del self._finish

    def done(self) -> bool:
        """Whether the save has ended, successfully or not."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the save has ended.

        Raises:
          SaveError: the save failed, and what was at the path before is unchanged.
        """
        self._thread.join()
        self._told = True
        if self._error is not None:
            raise self._error

    def __repr__(self) -> str:
        state = "failed" if self._error else "done" if self.done() else "writing"
        return f"Saving({self._path!r}, {state})"


# The previous save, and the lock to begin one: a process writes one directory at a time.
_last: list[Saving] = []
_saves = threading.Lock()


@functools.cache
def _wait_at_end() -> None:
    """Make the program wait for the last save before it ends."""
    # An ordinary atexit handler runs too late: by then, executors refuse the remaining work of Orbax.
    getattr(threading, "_register_atexit", atexit.register)(_settle_at_end)


def _settle_at_end() -> None:
    try:
        settle()
    except SaveError as error:
        print(error, file=sys.stderr)


def settle() -> None:
    """Wait for the previous save, if one is still running.

    Raises:
      SaveError: that save failed, and nobody has been told so far.
    """
    for saving in list(_last):
        saving._thread.join()
        if not saving._told:
            saving.wait()


def save_directory(
    path: str, encoded: Encoded, *, wait: bool, timeout: float, progress: Any
) -> Saving | None:
    """Write a tree into a directory.

    Raises:
      SaveError: the tree cannot be written. Nothing has changed.
    """
    ocp = need_orbax(path, SaveError)
    with _saves:
        settle()
        saving = Saving(path, _begin(path, encoded, ocp, copy=not wait, timeout=timeout))
        _last[:] = [saving]
    if not wait:
        return saving
    saving.wait()
    if progress is not None:
        total = sum(x.size * x.dtype.itemsize for x in encoded.arrays.values())
        progress(total, total)
    return None


def _begin(
    path: str, encoded: Encoded, ocp: Any, *, copy: bool, timeout: float
) -> Callable[[], None]:
    """Copy the values and begin to write. The returned function waits for the writing and commits."""
    text = json.dumps(encoded.structure, separators=(",", ":"))
    hosts.meet(hosts.key_of(path, text), path, timeout, ocp)
    sibling, said = None, {}
    if hosts.is_first():
        try:
            sibling = Sibling(path)
            os.mkdir(sibling.arrays)
            said = {"arrays": sibling.arrays, "path": sibling.path}
        except OSError as error:
            said = {"error": str(error.strerror or error), "number": error.errno}
            if sibling is not None:
                sibling.close()
    said = json.loads(hosts.from_first(json.dumps(said)))
    if "error" in said:
        raise save_error(OSError(said["number"], said["error"]), path)
    folder = said["arrays"]
    failure: BaseException | None = None
    sums: dict[str, Any] = {}

    def nothing() -> None: ...

    written = nothing
    try:
        if not os.path.isdir(folder):
            raise SaveError(
                f"{path} cannot be saved: process {jax.process_index()} does not see the folder "
                f"that process 0 made, {os.path.dirname(folder)!r}. All processes must share one "
                "file system."
            )
        stored = {
            name: to_store(x, copy=copy) for name, x in encoded.arrays.items() if is_stored(x)
        }
        sums = {name: checksum(x) for name, x in stored.items()}
        written = start(folder, stored, ocp)
        sums = {name: int(x) for name, x in sums.items()}
    except BaseException as error:
        # The other processes wait at the next barrier.
        failure = error
    if failure is not None and jax.process_count() == 1:
        assert sibling is not None
        sibling.close()
        raise _told(failure, path)

    def finish_up() -> None:
        _finish(path, said, failure, written, sibling, ocp, timeout, _document(encoded, sums, said))

    return finish_up


def _document(encoded: Encoded, sums: dict[str, Any], said: dict[str, Any]) -> bytes:
    """The text of the structure, with its own checksum."""
    structure = {**encoded.structure, "arrays": os.path.basename(said["arrays"]), "sums": sums}
    text = json.dumps(structure, separators=(",", ":"))
    return f'{{"crc32":{zlib.crc32(text.encode())},"structure":{text}}}\n'.encode()


def _finish(
    path: str,
    said: dict[str, Any],
    failure: BaseException | None,
    written: Callable[[], None],
    sibling: Sibling | None,
    ocp: Any,
    timeout: float,
    document: bytes,
) -> None:
    folder, token = said["arrays"], os.path.basename(said["arrays"])
    mark = os.path.join(os.path.dirname(folder), "written.")
    try:
        try:
            written()
            if failure is None and jax.process_count() > 1:
                with open(f"{mark}{jax.process_index()}", "xb"):
                    pass
        except BaseException as error:
            failure = failure or error
        hosts.meet(f"{token}.written", path, timeout, ocp)
        if sibling is not None and failure is None:
            try:
                _check_marks(path, mark)
                finish(folder, ocp)
                sibling.commit(document)
            except BaseException as error:
                failure = error
        hosts.meet(f"{token}.committed", path, timeout, ocp)
        if failure is not None:
            raise _told(failure, path)
        if sibling is None and not _is_committed(said["path"], token):
            raise SaveError(
                f"{path} cannot be saved: another process could not write its part; the error there "
                "says why. The old checkpoint is unchanged. This is process "
                f"{jax.process_index()}."
            )
    finally:
        if sibling is not None:
            sibling.close()


def _check_marks(path: str, mark: str) -> None:
    if jax.process_count() == 1:
        return
    for process in range(jax.process_count()):
        if not os.path.exists(f"{mark}{process}"):
            raise SaveError(
                f"{path} cannot be saved: process {process} could not write its part; the error "
                "there says why. The old checkpoint is unchanged."
            )
        os.unlink(f"{mark}{process}")


def _is_committed(path: str, token: str) -> bool:
    with contextlib.suppress(OSError), open(os.path.join(path, STRUCTURE), "rb") as file:
        return token.encode() in file.read()
    return False


def _told(error: BaseException, path: str) -> BaseException:
    """Turn an error of another library into one that a user understands."""
    if isinstance(error, SaveError) or not isinstance(error, Exception):
        return error
    if isinstance(error, OSError):
        made = save_error(error, path)
    else:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        made = SaveError(f"{path} cannot be saved: {text}")
    made.__cause__ = error
    return made


class Reader:
    """A directory to read: its structure and its arrays.

    Args:
      path: the directory.

    Raises:
      LoadError: the message does not yet name the directory.
    """

    def __init__(self, path: str):
        ocp = need_orbax(path, LoadError)
        text = _read_structure(path)
        outer = parse(text)
        if not isinstance(outer, dict) or outer.keys() != {"crc32", "structure"}:
            raise LoadError(f"its {STRUCTURE} is not one that nnx.save wrote")
        self.structure = outer["structure"]
        again = json.dumps(self.structure, separators=(",", ":")).encode()
        if zlib.crc32(again) != outer["crc32"]:
            raise LoadError(f"the checksum of its {STRUCTURE} is wrong")
        check_header(self.structure)
        token, sums = self.structure.pop("arrays", None), self.structure.pop("sums", None)
        if (
            type(token) is not str
            or not token.startswith(ARRAYS)
            or os.path.basename(token) != token
        ):
            raise Damaged(f"it names {clip(token)} as the folder of its arrays")
        if not isinstance(sums, dict) or any(type(x) is not int for x in sums.values()):
            raise Damaged("its checksums are not a dict from name to number")
        self.token, self._sums, self._ocp = token, sums, ocp
        # The Store checks that the names of the arrays are those in the folder.
        self.names = list(guarded(lambda: check(self.structure)).arrays)
        self._folder = os.path.join(os.path.realpath(path), token)
        if not os.path.isdir(self._folder):
            raise LoadError(f"the folder of its arrays is missing: {token!r}")

    def store(self, codes: dict[str, Any]) -> Store:
        """The arrays. `codes` are their descriptions in the structure."""
        return Store(self._folder, codes, self._sums, self._ocp)


def token_of(path: str) -> str | None:
    """The folder of arrays that a directory names at the moment."""
    with contextlib.suppress(LoadError, Damaged, OSError, ValueError):
        return Reader(path).token
    return None


def _read_structure(path: str) -> bytes:
    try:
        with open(os.path.join(path, STRUCTURE), "rb") as file:
            return file.read()
    except FileNotFoundError:
        if not os.path.isdir(path):
            raise
    names = os.listdir(path)
    if any(name.startswith(ARRAYS) for name in names):
        raise LoadError(f"it lacks {STRUCTURE}, so a save did not finish")
    inside = ", ".join(sorted(names)[:4]) or "nothing"
    text = f"Is a directory without {STRUCTURE}, so nnx.save did not write it. It holds {inside}."
    if any(n in names for n in ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt")):
        text = (
            f"Is an Orbax directory without the structure of a model ({STRUCTURE}). Construct the "
            "model, and read the directory with Orbax into nnx.get_partition(model)."
        )
    raise IsADirectoryError(errno.EISDIR, text)
