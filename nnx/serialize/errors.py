"""The errors of saving and loading."""

from __future__ import annotations

from typing import Any

from refx import RefError

__all__ = ["LoadError", "SaveError"]


class SaveError(RefError, ValueError):
    """Something cannot be saved. What was at the path before is unchanged.

    If the operating system refused, it is also an `OSError`: a full disk, a missing permission or folder.
    """


class LoadError(RefError, ValueError):
    """A file cannot be loaded: it is damaged, foreign or too new, or its classes are missing.

    If the operating system refused, it is also an `OSError`: the file does not exist, or may not be read.
    """


class _OfSystem(OSError):
    """The operating system's error, in a sentence that names the file."""

    def __new__(cls, number: int | None, text: str, path: Any) -> Any:
        return OSError.__new__(cls, number, text, path)

    def __str__(self) -> str:
        return str(self.strerror)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.errno, self.strerror, self.filename)


# Each class is also the error that Python itself would raise, for code that catches that.
class SaveOSError(_OfSystem, SaveError): ...


class SaveFileNotFoundError(_OfSystem, SaveError, FileNotFoundError): ...


class SavePermissionError(_OfSystem, SaveError, PermissionError): ...


class SaveIsADirectoryError(_OfSystem, SaveError, IsADirectoryError): ...


class LoadOSError(_OfSystem, LoadError): ...


class LoadFileNotFoundError(_OfSystem, LoadError, FileNotFoundError): ...


class LoadPermissionError(_OfSystem, LoadError, PermissionError): ...


class LoadIsADirectoryError(_OfSystem, LoadError, IsADirectoryError): ...


_SAVE = (SaveFileNotFoundError, SavePermissionError, SaveIsADirectoryError)
_LOAD = (LoadFileNotFoundError, LoadPermissionError, LoadIsADirectoryError)


def save_error(error: OSError, path: str) -> SaveError:
    """The SaveError for an operating system's error about a path."""
    kind: Any = next((k for k in _SAVE if isinstance(error, k.__bases__[-1])), SaveOSError)
    return kind(error.errno, f"{path} cannot be saved: {error.strerror or error}", path)


def load_error(error: OSError, path: str) -> LoadError:
    """The LoadError for an operating system's error about a path."""
    kind: Any = next((k for k in _LOAD if isinstance(error, k.__bases__[-1])), LoadOSError)
    return kind(error.errno, f"{path} cannot be loaded: {error.strerror or error}", path)
