"""Every error of refx: one class for each thing that a user can do wrong."""

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
    """The base of every error that refx, and what is built on it, raises itself.

    >>> import refx
    >>> issubclass(refx.UnknownPathError, refx.RefError)
    True
    """

    # KeyError prints the repr of its argument, which would put the message in quotes.
    __str__ = Exception.__str__


class TraceLevelError(RefError):
    """A Ref or a module was written inside a JAX transformation that it was not made in."""


class ReadOnlyError(RefError):
    """A value copy, which JAX rebuilt around tracers, was written; the write could reach nobody."""


class ForeignTracerError(RefError):
    """A Ref was given a value that holds a tracer of another, or of an ended, transformation."""


class EndedTraceError(RefError):
    """A Ref was used after the transformation that it was made in has ended."""


class ClosureError(RefError):
    """A program would go on with an old Ref: a plain `jax` one bakes in values, or it is out of sight."""


class DonationError(RefError, RuntimeError):
    """A buffer that cannot be donated, or that was donated before and is gone."""


class NotMutableError(RefError):
    """A Ref was written that the surrounding `mutable` does not allow to be written."""


class StructureError(RefError):
    """The structure of a tree was changed where the change cannot reach the caller."""


class UnhashableStaticError(RefError, TypeError):
    """A static value cannot be hashed, so it cannot be part of a compiled program's key."""


class UnpicklableStaticError(RefError, pickle.PicklingError):
    """A static value that pickle cannot write, such as a lambda, is part of a pickled structure."""


class UnknownPathError(RefError, KeyError):
    """A partition names a path that the tree does not have."""


class MissingPathError(RefError, KeyError):
    """A partition lacks a path that is needed."""


class UnmatchedPathError(RefError, ValueError):
    """`split` found values that no filter selects."""


class ShapeError(RefError, ValueError):
    """A new value has another shape than the value it replaces."""


class DtypeError(RefError, TypeError):
    """A new value has another dtype than the value it replaces."""


class ValueTypeError(RefError, TypeError):
    """A Ref was given a value that is not a pytree of arrays, or a pytree with another structure."""


class FilterError(RefError, TypeError):
    """A value is not a filter, or a filter selects nothing, or needs something that is missing here."""


class UnsetFieldError(RefError, AttributeError):
    """A field was read before it was set."""
