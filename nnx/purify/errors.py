"""The errors of purify: one class for each thing that a user can do wrong."""

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
    """The base of the errors that are purify's own.

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
    """A marker was given what it cannot take, or stands where its value cannot be told."""
