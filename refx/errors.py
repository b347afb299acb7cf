"""All errors of refx: one class for each mistake that a user can make."""

from __future__ import annotations

import pickle

__all__ = [
    "ClosureError",
    "DonationError",
    "DtypeError",
    "EndedTraceError",
    "FilterError",
    "ForeignTracerError",
    "MissingPathError",
    "NotMutableError",
    "ReadOnlyError",
    "RefError",
    "ShapeError",
    "StructureError",
    "TraceLevelError",
    "UnhashableStaticError",
    "UnknownPathError",
    "UnmatchedPathError",
    "UnpicklableStaticError",
    "UnsetFieldError",
    "ValueTypeError",
]


class RefError(Exception):
    """The base of all errors that refx and the libraries on top of it raise.

    >>> import refx
    >>> issubclass(refx.UnknownPathError, refx.RefError)
    True
    """

    # KeyError prints the repr of its argument, which would put the message in quotes.
    __str__ = Exception.__str__


class TraceLevelError(RefError):
    """A Ref or a module was written inside a JAX transformation, but it was made outside of it."""


class ReadOnlyError(RefError):
    """A Ref or a module is read-only: JAX rebuilt it around tracers, it is frozen, or it is exported."""


class ForeignTracerError(RefError):
    """A Ref was given a value with a tracer of another transformation, or of one that has ended."""


class EndedTraceError(RefError):
    """A Ref was used after the transformation in which it was made had ended."""


class ClosureError(RefError):
    """A compiled program would keep an old value of a closed-over Ref, or cannot see which Ref it is."""


class DonationError(RefError, RuntimeError):
    """A buffer cannot be donated, or it was donated before and is gone."""


class NotMutableError(RefError):
    """A Ref or a module was changed, but the surrounding `mutable` does not allow it."""


class StructureError(RefError):
    """The structure of a tree was changed where the change cannot reach the caller, or is not allowed."""


class UnhashableStaticError(RefError, TypeError):
    """A static value cannot be hashed, so it cannot be part of a compiled program's key."""


class UnpicklableStaticError(RefError, pickle.PicklingError):
    """A pickled structure contains a static value that pickle cannot write, such as a lambda."""


class UnknownPathError(RefError, KeyError):
    """A path does not exist in the tree or the partition."""


class MissingPathError(RefError, KeyError):
    """A partition lacks a path that the structure needs."""


class UnmatchedPathError(RefError, ValueError):
    """`split` found values that no filter selects."""


class ShapeError(RefError, ValueError):
    """The shape of a new value differs from that of the old value."""


class DtypeError(RefError, TypeError):
    """The dtype of a new value differs from that of the old value."""


class ValueTypeError(RefError, TypeError):
    """A Ref was given a value that is not a pytree of arrays, or whose structure differs."""


class FilterError(RefError, TypeError):
    """A value is not a filter, or a filter selects nothing, or it needs something that is missing."""


class UnsetFieldError(RefError, AttributeError):
    """A field was read before it was set."""
