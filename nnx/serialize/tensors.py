"""The other container: `.safetensors`, which other tools read too, by the library of that name.

The structure is in the metadata, so that a file is complete. What the format's NumPy side does not know
(float8, int4, complex128) is written as bytes along one more axis, and read back by its own dtype here.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from nnx.serialize.decode import dtype_of
from nnx.serialize.encode import Encoded
from nnx.serialize.errors import LoadError
from nnx.serialize.npz import PIECE, STRUCTURE, Progress, aligned, to_host

__all__: list[str] = []

CHECKSUM = "nnx.crc32"

_KNOWN = frozenset(
    {
        *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
        *("float16", "bfloat16", "float32", "float64", "complex64"),
    }
)


def _library() -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError(
            "A file whose name ends in .safetensors needs the package of that name: pip install "
            "'nnx[safetensors]'. An .npz needs nothing."
        ) from None
    return safetensors


def write(path: str, encoded: Encoded, progress: Progress | None) -> None:
    """Write a tree into the file of this name."""
    library = _library()
    parts: dict[str, Any] = {}
    sums: dict[str, int] = {}
    for name, array in encoded.arrays.items():
        host = to_host(array)
        exact = np.asarray(array).dtype if host.dtype.name not in _KNOWN else host.dtype
        bits = str(getattr(array, "dtype", exact))
        if bits in _KNOWN and host.dtype.name != bits:
            host = host.view(dtype_of(bits))
        elif bits not in _KNOWN and not bits.startswith("key<"):
            host = np.frombuffer(host.tobytes(), np.uint8).reshape(*host.shape, host.itemsize)
        parts[name] = host
        sums[name] = _sum(host)
    text = json.dumps({**encoded.structure, "sums": sums})
    library.numpy.save_file(parts, path, {STRUCTURE: text, CHECKSUM: _text_sum(text)})
    if progress is not None:
        total = sum(x.nbytes for x in parts.values())
        progress(total, total)


class Reader:
    """An open file: its structure, and its arrays one by one."""

    def __init__(self, file: Any, progress: Progress | None):
        self._file = file
        self._progress = progress
        self._names = frozenset(file.keys())
        self._done = 0
        # The format has no checksums, so ours are in the structure, which has one beside it.
        self._sums: dict[str, Any] = {}

    @property
    def array_names(self) -> list[str]:
        """The names of the arrays."""
        return list(self._file.keys())

    def structure(self) -> Any:
        """The parsed JSON, or None if this is a file of somebody else."""
        metadata = self._file.metadata() or {}
        text, known = metadata.get(STRUCTURE), metadata.get(CHECKSUM)
        if text is None and known is None:
            return None
        if text is None or known != _text_sum(text):
            raise LoadError("the checksum of its structure is wrong")
        structure = json.loads(text)
        self._sums = structure["sums"]
        return structure

    def read(self, name: str, dtype: str | None, shape: tuple[int, ...] | None) -> np.ndarray:
        """An array. `dtype` and `shape`, where they are known, must be those of the array."""
        if name not in self._names:
            raise LoadError(f"its array {name!r} is missing")
        found = self._aligned(name)
        if self._sums and self._sums.get(name) != _sum(found):
            raise LoadError(f"the checksum of its array {name!r} is wrong")
        if dtype is not None and dtype not in _KNOWN:
            found = _from_bytes(found, dtype_of(dtype), name)
        if (dtype is not None and found.dtype != dtype_of(dtype)) or shape not in (
            None,
            found.shape,
        ):
            raise LoadError(
                f"its array {name!r} is {found.dtype}{list(found.shape)}, but should be "
                f"{dtype}{list(shape or ())}"
            )
        self._done += found.nbytes
        if self._progress is not None:
            # The sizes of those to come are not known without reading them.
            self._progress(self._done, self._done)
        return found

    def _aligned(self, name: str) -> np.ndarray:
        # By rows, so that a large array is not in memory twice.
        part = self._file.get_slice(name)
        shape = tuple(part.get_shape())
        if not shape or 0 in shape:
            return self._file.get_tensor(name)
        first = part[0:1]
        whole = aligned(first.nbytes * shape[0]).view(first.dtype).reshape(shape)
        rows = max(1, PIECE // max(1, first.nbytes))
        for start in range(0, shape[0], rows):
            stop = min(start + rows, shape[0])
            whole[start:stop] = part[start:stop]
        return whole


def _text_sum(text: str) -> str:
    return str(zlib.crc32(text.encode()))


def _sum(array: np.ndarray) -> int:
    return zlib.crc32(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))  # pyright: ignore


def _from_bytes(found: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    if found.dtype != np.uint8 or found.shape[-1:] != (dtype.itemsize,):
        raise LoadError(f"its array {name!r} does not hold the bytes of {dtype}")
    return np.ascontiguousarray(found).reshape(-1).view(dtype).reshape(found.shape[:-1])


@contextmanager
def opened(path: Any, progress: Progress | None) -> Iterator[Reader]:
    """Open a file for reading."""
    # The library's own message would name neither the file nor what is wrong with it.
    with open(path, "rb"):
        pass
    library = _library()
    with library.safe_open(path, framework="np") as file:
        yield Reader(file, progress)
