"""The other container: `.safetensors`, which other tools can read too.

The structure is in the metadata, so a file is complete. Dtypes that the format lacks (float8, int4,
complex128) are written as bytes along one more axis, and read back here in their own dtype.
"""

from __future__ import annotations

import json
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx.serialize.decode import guarded
from nnx.serialize.dtypes import dtype_of
from nnx.serialize.encode import Encoded
from nnx.serialize.errors import LoadError
from nnx.serialize.grammar import Damaged, clip, parse
from nnx.serialize.npz import PIECE, STRUCTURE, Progress, aligned, to_host

__all__: list[str] = []

CHECKSUM = "nnx.crc32"

_KNOWN = frozenset(
    {
        *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
        *("float16", "bfloat16", "float32", "float64", "complex64"),
    }
)
# The format's names for dtypes.
_CODES = {
    **{"BOOL": "bool", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"},
    **{f"{kind[0].upper()}{n}": f"{kind}{n}" for kind in ("int", "uint") for n in (8, 16, 32, 64)},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
    "C64": "complex64",
}
_NAMES = {name: code for code, name in _CODES.items()}


def write(file: Any, encoded: Encoded, progress: Progress | None) -> None:
    """Write a tree into an open file."""
    # Write arrays with the largest items first, so that each array is aligned.
    names = sorted(encoded.arrays, key=lambda name: -_facts(encoded.arrays[name])[1])
    header: dict[str, Any] = {}
    sums: dict[str, int] = {}
    total = 0
    for name in names:
        array = encoded.arrays[name]
        dtype, itemsize, shape = _facts(array)
        size = math.prod(shape) * itemsize
        code = _NAMES[dtype]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [total, total + size]}
        sums[name] = zlib.crc32(_bytes(array))
        total += size
    text = json.dumps({**encoded.structure, "sums": sums})
    metadata = {STRUCTURE: text, CHECKSUM: _text_sum(text)}
    head = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    file.write(len(head).to_bytes(8, "little"))
    file.write(head)
    done = 0
    for name in names:
        data = _bytes(encoded.arrays[name])
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            file.write(piece)
            done += len(piece)
            if progress is not None:
                progress(done, total)


def _facts(array: Any) -> tuple[str, int, list[int]]:
    """The dtype, the size of an item and the shape as written in the file."""
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, array)
        return "uint32", 4, list(data.shape)
    dtype = np.dtype(array.dtype)
    # Only the structure records the byte order.
    if dtype.name in _KNOWN and dtype.isnative:
        return dtype.name, dtype.itemsize, list(array.shape)
    return "uint8", 1, [*array.shape, dtype.itemsize]


def _bytes(array: Any) -> memoryview:
    return memoryview(to_host(array).reshape(-1).view(np.uint8))  # pyright: ignore[reportArgumentType]


class Reader:
    """An open file: gives its structure, and its arrays one by one. Takes the arguments of `npz.Reader`."""

    def __init__(self, file: Any, size: int, progress: Progress | None):
        self._file = file
        self._progress = progress
        self._done = 0
        length = int.from_bytes(_exactly(file, 8), "little")
        if length > size - 8:
            raise LoadError("its header claims to be larger than the file")
        header = guarded(lambda: parse(_exactly(file, length)))
        if not isinstance(header, dict):
            raise LoadError("its header is not a JSON object")
        self._metadata = header.pop("__metadata__", {})
        self._start = 8 + length
        self._parts = guarded(lambda: _parts(header, size - self._start))
        self._total = size - self._start
        # The format lacks checksums. Ours are in the structure, and the structure's own is beside
        # it.
        self._sums: dict[str, Any] | None = None

    @property
    def array_names(self) -> list[str]:
        """The names of the arrays."""
        return list(self._parts)

    def structure(self) -> Any:
        """The parsed JSON, or None if another tool wrote this file."""
        metadata = self._metadata
        if not isinstance(metadata, dict) or any(type(x) is not str for x in metadata.values()):
            raise LoadError("its metadata is not a JSON object of strings")
        text, known = metadata.get(STRUCTURE), metadata.get(CHECKSUM)
        if text is None and known is None:
            return None
        if text is None or known != _text_sum(text):
            raise LoadError("the checksum of its structure is wrong")
        structure = guarded(lambda: parse(text.encode()))
        sums = structure.pop("sums", None) if isinstance(structure, dict) else None
        if not isinstance(sums, dict) or sums.keys() != self._parts.keys():
            raise LoadError("its checksums are not those of its arrays")
        self._sums = sums
        return structure

    def read(self, name: str, dtype: str | None, shape: tuple[int, ...] | None) -> np.ndarray:
        """Read an array. If `dtype` and `shape` are given, the array must have them."""
        if name not in self._parts:
            raise LoadError(f"its array {name!r} is missing")
        found = self._aligned(name)
        if self._sums is not None and self._sums[name] != _sum(found):
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
        return found

    def _aligned(self, name: str) -> np.ndarray:
        dtype, shape, start, size = self._parts[name]
        flat = aligned(size)
        self._file.seek(self._start + start)
        at = 0
        while at < size:
            piece: Any = flat[at : at + PIECE]
            count = self._file.readinto(memoryview(piece))
            if not count:
                raise LoadError(f"its array {name!r} ends too early")
            at += count
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total)
        return flat.view(dtype).reshape(shape)


def _exactly(file: Any, count: int) -> bytes:
    found = file.read(count)
    if len(found) != count:
        raise LoadError("it is cut short")
    return found


def _parts(header: dict[str, Any], size: int) -> dict[str, Any]:
    """The dtype, shape, position and size of each array. Together they must fill the rest of the file."""
    parts: dict[str, Any] = {}
    for name, facts in header.items():
        if not isinstance(facts, dict) or facts.keys() != {"dtype", "shape", "data_offsets"}:
            raise Damaged(f"its array {clip(name)} is {clip(facts)}")
        code, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
        if type(code) is not str or code not in _CODES:
            raise Damaged(
                f"its array {clip(name)} has the dtype {clip(code)}, which NumPy does not have"
            )
        if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
            raise Damaged(f"its array {clip(name)} is {clip(facts)}")
        dtype = jnp.dtype(_CODES[code])
        start, end = offsets
        if end - start != math.prod(shape) * dtype.itemsize:
            raise Damaged(f"its array {clip(name)} is not as large as its shape")
        parts[name] = (dtype, tuple(shape), start, end - start)
    at = 0
    for _, _, start, length in sorted(parts.values(), key=lambda part: part[2:]):
        if start != at:
            raise Damaged("its arrays overlap, or have gaps between them")
        at += length
    if at != size:
        raise Damaged("its arrays are not as large as the file")
    return parts


def _are_sizes(x: Any) -> bool:
    return isinstance(x, list) and len(x) <= 64 and all(type(n) is int and n >= 0 for n in x)


def _text_sum(text: str) -> str:
    return str(zlib.crc32(text.encode()))


def _sum(array: np.ndarray) -> int:
    return zlib.crc32(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))  # pyright: ignore


def _from_bytes(found: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    if found.dtype != np.uint8 or found.shape[-1:] != (dtype.itemsize,):
        raise LoadError(f"its array {name!r} does not hold the bytes of {dtype}")
    return np.ascontiguousarray(found).reshape(-1).view(dtype).reshape(found.shape[:-1])
