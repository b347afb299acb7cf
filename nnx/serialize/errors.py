"""The errors of saving and loading."""

from __future__ import annotations

from typing import Any

from refx import RefError

__all__ = ["LoadError", "SaveError"]


class SaveError(RefError, ValueError):
    """Something cannot be saved, and what was there before is as it was.

    It is an `OSError` too where the system says no: a full disk, a missing permission or folder.
    """


class LoadError(RefError, ValueError):
    """A file that cannot be loaded: damaged, foreign, newer, or of classes that are not there.

    It is an `OSError` too where the system says no: there is no such file, or it may not be read.
    """


class _OfSystem(OSError):
    """What the system said, in a sentence that names the file."""

    def __new__(cls, number: int | None, text: str, path: Any) -> Any:
        return OSError.__new__(cls, number, text, path)

    def __str__(self) -> str:
        return str(self.strerror)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.errno, self.strerror, self.filename)


# Each is also the error that Python itself raises, for those who catch that.
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
    """The SaveError of what the system said about a path."""
    kind: Any = next((k for k in _SAVE if isinstance(error, k.__bases__[-1])), SaveOSError)
    return kind(error.errno, f"{path} cannot be saved: {error.strerror or error}", path)


def load_error(error: OSError, path: str) -> LoadError:
    """The LoadError of what the system said about a path."""
    kind: Any = next((k for k in _LOAD if isinstance(error, k.__bases__[-1])), LoadOSError)
    return kind(error.errno, f"{path} cannot be loaded: {error.strerror or error}", path)
