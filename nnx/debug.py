"""Tools to find out what a program does: why it compiles, and where the first nan comes from."""

from __future__ import annotations

from nnx._nonfinite import NonFinite, find_nonfinite

__all__ = ["NonFinite", "find_nonfinite"]
