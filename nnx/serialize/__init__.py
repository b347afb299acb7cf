"""Saving and loading: a model in one file, or a directory, that holds names and numbers, never code."""

# A file names classes, and is read with those that there are: ours have to be.
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
