"""The errors of purify: one class for each kind of mistake."""

from __future__ import annotations

from refx import RefError

__all__ = [
    "DuplicateNameError",
    "MarkerError",
    "MissingNameError",
    "PurifyError",
    "UnexpectedNameError",
]


class PurifyError(RefError, ValueError):
    """The base class of the errors that only purify raises.

    >>> from nnx.purify.errors import MissingNameError, PurifyError
    >>> issubclass(MissingNameError, PurifyError)
    True
    """


class MissingNameError(PurifyError):
    """A purified function was called without a value for one of its names."""


class UnexpectedNameError(PurifyError):
    """A purified function was given a name that it does not have."""


class DuplicateNameError(PurifyError):
    """One name was declared by two marker calls."""


class MarkerError(PurifyError):
    """A marker was given something that it cannot take, or is called where it cannot get its value."""
