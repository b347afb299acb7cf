"""The container: an uncompressed `.npz` with the structure as JSON beside the arrays.

`numpy.load(path, allow_pickle=False)` opens it. Arrays are copied in pieces, one array at a time,
so a file may be as large as memory. Files are not trusted: every size is checked against the size
of the file before anything is allocated.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx.serialize.decode import guarded
from nnx.serialize.dtypes import dtype_of
from nnx.serialize.encode import Encoded
from nnx.serialize.errors import LoadError
from nnx.serialize.grammar import clip, parse

__all__: list[str] = []

STRUCTURE = "nnx.json"
Progress = Callable[[int, int], None]

PIECE = 1 << 24


def to_host(x: Any) -> np.ndarray:
    """A NumPy array in C order, with a dtype that the `.npy` format knows."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    host = np.asarray(x)
    # ascontiguousarray would add an axis to a scalar.
    host = np.ascontiguousarray(host).reshape(host.shape)
    stored = stored_dtype(host.dtype)
    return host if stored == host.dtype else host.view(stored)


def stored_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype in the file for a dtype: for bfloat16, float8 and int4, an integer dtype of the same size."""
    # NumPy's format lacks dtypes that other packages have registered (isbuiltin 2).
    if dtype.isbuiltin == 2:
        return np.dtype(f"uint{8 * dtype.itemsize}")
    return np.dtype(dtype.str) if dtype.names is None else dtype


def write(file: Any, encoded: Encoded, progress: Progress | None) -> None:
    """Write a tree into an open file."""
    total = sum(_size(x) for x in encoded.arrays.values())
    done = 0
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        text = json.dumps(encoded.structure, separators=(",", ":"))
        archive.writestr(zipfile.ZipInfo(STRUCTURE), text)
        for name, array in encoded.arrays.items():
            host = to_host(array)
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                facts = np.lib.format.header_data_from_array_1_0(host)
                np.lib.format.write_array_header_1_0(member, facts)
                data: Any = host.reshape(-1).view(np.uint8)
                for start in range(0, len(data), PIECE):
                    piece = data[start : start + PIECE]
                    member.write(memoryview(piece))
                    done += len(piece)
                    if progress is not None:
                        progress(done, total)


def _size(x: Any) -> int:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(x).nbytes
    return x.size * np.dtype(x.dtype).itemsize


def aligned(size: int) -> np.ndarray:
    """This many bytes, aligned so that JAX can use them for an array without a copy."""
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]


class Reader:
    """An open file: gives its structure, and its arrays one by one.

    Args:
      file: a binary file that can seek.
      size: the number of bytes in it.
      progress: called as `progress(bytes_done, bytes_in_all)`.
    """

    def __init__(self, file: Any, size: int, progress: Progress | None):
        self._archive = zipfile.ZipFile(file)
        infos = self._archive.infolist()
        self._members = {info.filename: info for info in infos}
        if len(self._members) != len(infos):
            raise LoadError("two of its parts have the same name")
        if any(i.compress_type != zipfile.ZIP_STORED or i.flag_bits & 1 for i in infos):
            raise LoadError(
                "it is compressed or encrypted, which nnx.save never does; write a file of "
                "np.savez_compressed again with np.savez"
            )
        # Overlapping parts could make a small file expand without limit.
        if sum(i.file_size for i in infos) > size:
            raise LoadError("its parts claim to be larger than the file")
        self._total = sum(i.file_size for i in infos)
        self._done = 0
        self._progress = progress

    @property
    def array_names(self) -> list[str]:
        """The names of the arrays."""
        return [name[:-4] for name in self._members if name.endswith(".npy")]

    def structure(self) -> Any:
        """The parsed JSON, or None if another tool wrote this `.npz`."""
        if STRUCTURE not in self._members:
            return None
        for name in self._members:
            if name != STRUCTURE and not name.endswith(".npy"):
                raise LoadError(f"it has a part {clip(name)}, which nnx.save does not write")
        return guarded(lambda: parse(self._archive.read(STRUCTURE)))

    def read(self, name: str, dtype: str | None, shape: tuple[int, ...] | None) -> np.ndarray:
        """Read an array. If `dtype` and `shape` are given, the array must have them."""
        info = self._members.get(f"{name}.npy")
        if info is None:
            raise LoadError(f"its array {name!r} is missing")
        with self._archive.open(info) as member:
            found_shape, fortran, found = self._header(member, name)
            # Without a dtype, another tool wrote the file and may have used any byte and axis
            # order.
            ours = dtype is not None
            wanted = dtype_of(dtype) if ours else found
            stored = stored_dtype(wanted)
            bad_order = fortran and ours
            if found != stored or bad_order or (shape is not None and found_shape != shape):
                raise LoadError(
                    f"its array {name!r} is {found}{list(found_shape)}, but should be "
                    f"{stored}{list(shape or found_shape)}"
                )
            size = math.prod(found_shape) * found.itemsize
            if size > info.file_size:
                raise LoadError(f"its array {name!r} is shorter than its shape {found_shape}")
            flat = aligned(size)
            self._fill(member, name, flat)
        if ours:
            return flat.view(wanted).reshape(found_shape)
        array = flat.view(wanted).reshape(found_shape, order="F" if fortran else "C")
        return np.ascontiguousarray(array, wanted.newbyteorder("=")).reshape(found_shape)

    def _header(self, member: Any, name: str) -> Any:
        version = np.lib.format.read_magic(member)
        if version != (1, 0):
            raise LoadError(f"its array {name!r} has the .npy format {version}")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        if dtype.hasobject:
            raise LoadError(f"its array {name!r} holds Python objects")
        if dtype.itemsize == 0 or any(type(n) is not int or n < 0 for n in shape):
            raise LoadError(f"its array {name!r} has the dtype {dtype} and the shape {shape}")
        return shape, fortran, dtype

    def _fill(self, member: Any, name: str, data: Any) -> None:
        start = 0
        while start < len(data):
            count = member.readinto(memoryview(data[start : start + PIECE]))
            if not count:
                raise LoadError(f"its array {name!r} ends too early")
            start += count
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total)
        # zipfile compares the checksum when it reaches the end of a part.
        if member.read(1):
            raise LoadError(f"its array {name!r} is longer than its shape")
