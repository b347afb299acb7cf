"""Saving and loading. A file or directory holds a model's names and numbers, never code."""

# A file names classes, and loading looks them up among imported ones. So import ours here.
import nnx.layers
import nnx.training  # noqa: F401
from nnx.serialize.directory import Saving
from nnx.serialize.errors import LoadError, SaveError
from nnx.serialize.files import load, load_state, save
from nnx.serialize.fitting import LoadReport
from nnx.serialize.registry import saveable

__all__ = [
    "LoadError",
    "LoadReport",
    "SaveError",
    "Saving",
    "load",
    "load_state",
    "save",
    "saveable",
]
