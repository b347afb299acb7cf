"""The arrays of a checkpoint in a directory. Orbax stores them by name; each process writes its own shards.

Arrays are stored as they are. Random keys are stored as their data, and dtypes that the files do
not know as the bits of another dtype. The structure holds the original dtype names; see
`dtypes.py`.
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Sharding

from nnx.serialize.dtypes import dtype_of
from nnx.serialize.errors import LoadError
from nnx.serialize.sums import checksum
from nnx.sharding.putting import data_sharding, is_key, put_keys

__all__: list[str] = []

# JAX dtypes that the files do not know, each with a known dtype of the same bits.
_BITS = {"uint2": "uint8", "uint4": "uint8", "float8_e4m3": "uint8"}


def need_orbax(path: str, error: type[Exception]) -> Any:
    """The module `orbax.checkpoint`, or an error that says how to get it."""
    try:
        import orbax.checkpoint as ocp
    except ImportError as cause:
        raise error(
            f"{path} is a directory, and checkpoints in directories need Orbax: pip install "
            "orbax-checkpoint. A single file such as 'model.npz' does not."
        ) from cause
    return ocp


def is_stored(x: Any) -> bool:
    """Whether an array has any data to store."""
    return x.size > 0


def to_store(x: Any, *, copy: bool) -> Any:
    """An array in the form in which it is stored."""
    if not isinstance(x, jax.Array):
        host = np.array(x) if copy else x
        host = np.ascontiguousarray(host).reshape(x.shape)
        return host if _is_plain(host.dtype) else host.reshape(*x.shape, 1).view(np.uint8)
    if is_key(x):
        x = jax.random.key_data(x)
    bits = _BITS.get(x.dtype.name)
    if bits is not None:
        same = jnp.dtype(bits).itemsize == x.dtype.itemsize and "float" in x.dtype.name
        x = lax.bitcast_convert_type(x, bits) if same else x.astype(bits)
    if jax.process_count() > 1 and x.is_fully_addressable:
        # An array that is local to each process. The first process writes it, and all read that
        # one.
        return np.asarray(x)
    return x


def _is_plain(dtype: np.dtype) -> bool:
    """Whether NumPy arrays of this dtype are stored as they are."""
    return (
        dtype.isnative and dtype.isbuiltin == 1 and dtype.kind in "biufc" and dtype.itemsize <= 16
    )


def start(folder: str, arrays: Mapping[str, Any], ocp: Any) -> Callable[[], None]:
    """Begin to write arrays into an existing folder. The values are copied before this returns.

    Returns:
      A function that waits until this process has written its part.
    """
    if not arrays:
        return lambda: None
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True)
    args = ocp.args.PyTreeSave(dict(arrays))
    futures = _run(lambda: asyncio.run(handler.async_save(_epath(folder), args=args)))

    def wait() -> None:
        for future in futures or ():
            future.result()

    return wait


def finish(folder: str, ocp: Any) -> None:
    """Join the parts that all processes have written. The first process does it, when all are done."""
    if os.listdir(folder):
        ocp.PyTreeCheckpointHandler(use_ocdbt=True).finalize(_epath(folder))


def _epath(folder: str) -> Any:
    from etils import epath  # it comes with Orbax, whose paths are of its kind

    return epath.Path(folder)


def _run(function: Callable[[], Any]) -> Any:
    """Run it in a new thread, because in a notebook this thread already has an event loop."""
    result: list[Any] = []
    error: list[BaseException] = []

    def target() -> None:
        try:
            result.append(function())
        except BaseException as e:
            error.append(e)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if error:
        raise error[0]
    return result[0]


class Store:
    """The arrays in a folder.

    Args:
      folder: the folder.
      codes: the structure's description of each array, by name.
      sums: the checksum of each array in its stored form, by name.
      ocp: the module `orbax.checkpoint`.

    Raises:
      LoadError: an array is missing, or its shape or dtype differs from the structure.
    """

    def __init__(self, folder: str, codes: Mapping[str, Any], sums: Mapping[str, int], ocp: Any):
        self._folder, self._codes, self._sums, self._ocp = folder, codes, sums, ocp
        self._handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True)
        self._likes = {name: _like(code) for name, code in codes.items()}
        stored = {name for name, like in self._likes.items() if math.prod(like.shape)}
        if stored != sums.keys():
            raise LoadError("its checksums are not those of its arrays")
        found: Mapping[str, Any] = {}
        if stored:
            found = self._metadata()
        for name in sorted(stored - found.keys()):
            raise LoadError(f"its array {name!r} is missing")
        for name in sorted(found.keys() - stored):
            raise LoadError(f"nothing refers to its array {name!r:.80}")
        for name in stored:
            there, like = found[name], self._likes[name]
            shape, dtype = getattr(there, "shape", None), getattr(there, "dtype", None)
            if shape != like.shape or dtype != like.dtype:
                raise LoadError(
                    f"its array {name!r} is {dtype}{list(shape or ())}, but should be "
                    f"{like.dtype}{list(like.shape)}"
                )

    def _metadata(self) -> Mapping[str, Any]:
        try:
            tree = self._handler.metadata(_epath(self._folder)).tree
        except Exception as error:
            text = f"Orbax's description of its arrays is missing or damaged: {_first(error)}"
            raise LoadError(text) from error
        if not isinstance(tree, dict):
            raise LoadError("Orbax's description of its arrays is not a dict")
        return tree

    def read(self, shardings: Mapping[str, Sharding | None]) -> dict[str, Any]:
        """The arrays with these names, each where its sharding says. Without a sharding, it is on the host.

        Random keys with a sharding come back as keys. Arrays on the host come in their stored form.
        """
        numpy = self._ocp.RestoreArgs(restore_type=np.ndarray)
        names = [name for name in shardings if math.prod(self._likes[name].shape)]
        how = dict.fromkeys(names, numpy)
        for name in names:
            sharding = shardings[name]
            if sharding is not None:
                where = data_sharding(sharding) if "key" in self._codes[name] else sharding
                how[name] = self._ocp.ArrayRestoreArgs(sharding=where)
        values: dict[str, Any] = {}
        if names:
            args = self._ocp.args.PyTreeRestore(
                item=dict.fromkeys(names, 0), restore_args=how, partial_restore=True
            )
            try:
                values = dict(self._handler.restore(_epath(self._folder), args=args))
            except Exception as error:
                raise LoadError(f"its arrays are damaged or cut short: {_first(error)}") from error
        # Start all reads before waiting for the first.
        sums = {name: checksum(x) for name, x in values.items()}
        for name, found in sums.items():
            if int(found) != self._sums[name]:
                raise LoadError(f"the checksum of its array {name!r} is wrong")
        for name in shardings.keys() - values.keys():
            like, sharding = self._likes[name], shardings[name]
            values[name] = np.zeros(like.shape, like.dtype)
            if sharding is not None:
                values[name] = jax.jit(
                    lambda like=like: jnp.zeros(like.shape, like.dtype), out_shardings=sharding
                )()
        return {name: self._finished(name, values[name]) for name in shardings}

    def _finished(self, name: str, x: Any) -> Any:
        code = self._codes[name]
        if isinstance(x, jax.Array):
            return x if "key" in code else _from_bits(x, code["dtype"])
        if "key" in code:
            return x
        dtype = dtype_of(code["dtype"])
        if dtype.name in _BITS and "numpy" not in code:
            return x.view(dtype) if "float" in dtype.name else x.astype(dtype)
        if x.dtype != dtype:
            x = np.ascontiguousarray(x).reshape(-1).view(dtype).reshape(code["shape"])
        return x


def wrapped(data: Any, code: Any, sharding: Sharding | None) -> jax.Array:
    """Make random keys from the data that a Store has read."""
    return put_keys(data, code["key"], sharding)


def _from_bits(x: jax.Array, name: str) -> jax.Array:
    if name not in _BITS:
        return x
    dtype = dtype_of(name)
    return lax.bitcast_convert_type(x, dtype) if "float" in name else x.astype(dtype)


def _like(code: Any) -> Any:
    """The shape and dtype of an array in its stored form, from its description."""
    shape = tuple(code["shape"])
    if "key" in code:
        keys = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=code["key"])))
        return jax.ShapeDtypeStruct((*shape, *keys.shape), keys.dtype)
    dtype = dtype_of(code["dtype"])
    if "numpy" in code and not _is_plain(dtype):
        return _Like((*shape, dtype.itemsize), np.dtype(np.uint8))
    if dtype.name in _BITS and "numpy" not in code:
        dtype = np.dtype(_BITS[dtype.name])
    return _Like(shape, dtype)


class _Like:
    # Not a ShapeDtypeStruct, which would turn float64 into float32.
    def __init__(self, shape: tuple[int, ...], dtype: np.dtype):
        self.shape, self.dtype = shape, dtype


def _first(error: BaseException) -> str:
    """The beginning of a library's message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
