"""The two errors of saving and loading."""

from __future__ import annotations

from refx import RefError

__all__ = ["LoadError", "SaveError"]


class SaveError(RefError, ValueError):
    """Something in a tree cannot be saved; nothing was written."""


class LoadError(RefError, ValueError):
    """A file that cannot be loaded: damaged, foreign, newer, or of classes that are not there."""
