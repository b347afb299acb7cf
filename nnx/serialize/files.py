"""`nnx.save`, `nnx.load` and `nnx.load_state`: a tree in one file, and back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from nnx.serialize import npz, tensors
from nnx.serialize.decode import decode, decode_state
from nnx.serialize.encode import encode
from nnx.serialize.errors import LoadError, load_error, save_error
from nnx.serialize.fitting import Fitting, LoadReport
from nnx.serialize.npz import Progress
from nnx.serialize.places import check_writable, is_path, reading, replacing, shown
from refx import RefError
from refx.partition import listed

__all__ = ["load", "load_state", "save"]


def _container(path: Any) -> Any:
    return tensors if shown(path).endswith(".safetensors") else npz


def save(path: Any, tree: Any, *, progress: Progress | None = None) -> None:
    """Write a model, or any tree of modules, Refs and arrays, into one file.

    The file is an `.npz`, which `numpy.load` opens without pickle, with the structure as JSON beside
    the arrays; or, if the name ends in `.safetensors`, one of that kind. It holds the classes by
    name, hyperparameters, arrays of every dtype, random keys, collections, metadata, sharing and
    cycles. It is written under another name, flushed to the disk, and then takes its place: a
    program that fails or stops half-way leaves what was there before. What a saver that was killed
    has left, the next save to that path removes.

    A class of a script is called `__main__.Net` in the file, which another program does not have: define
    models in a module that is imported, or name them, `@nnx.saveable(name="project.Net")`. What holds
    functions that have no name, as an `nnx.Optimizer` holds those of optax, is saved by its values,
    `nnx.save(path, nnx.get_partition((model, optimizer, stream)))`, and read by
    `nnx.load_state(path, into=(model, optimizer, stream))`.

    Args:
      path: the path of the file, or a file that is open for bytes, such as an `io.BytesIO`.
      tree: a module, or a tuple, list or dict of modules, Refs and arrays, or a Partition.
      progress: called as `progress(bytes_done, bytes_in_all)` now and then.

    Raises:
      SaveError: the tree holds something that a file cannot, such as a function that is not
        registered (see `nnx.saveable`); the message has its path, and nothing is written. Where
        the system says no, as with a full disk or without permission, it is also the `OSError` that
        it is, and what was at the path is as it was.

    >>> import jax, nnx, tempfile, os
    >>> model = nnx.Linear.init(jax.random.key(0))(3, 2)
    >>> path = os.path.join(tempfile.mkdtemp(), "model.npz")
    >>> nnx.save(path, model)
    >>> nnx.load(path).kernel.shape
    (3, 2)
    """
    if not is_path(path):
        check_writable(path)
    encoded = encode(tree)
    container = _container(path)
    try:
        if not is_path(path):
            container.write(path, encoded, progress)
            if hasattr(path, "flush"):
                path.flush()
            return
        with replacing(os.fsdecode(path)) as file:
            container.write(file, encoded, progress)
    except OSError as error:
        raise save_error(error, shown(path)) from error


@contextlib.contextmanager
def _reading(path: Any, progress: Progress | None, container: Any = None) -> Iterator[Any]:
    """Open a file; whatever is wrong with it becomes one LoadError that names it."""
    name = shown(path)
    try:
        with reading(path) as (file, size):
            yield (container or _container(path)).Reader(file, size, progress)
    except LoadError as error:
        raise LoadError(f"{name} cannot be loaded: {error}.") from error.__cause__
    except (RefError, ImportError):
        raise
    except OSError as error:
        raise load_error(error, name) from error
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise LoadError(
            f"{name} cannot be loaded: it is damaged, cut short, or no file of nnx.save at all "
            f"({text:.200})."
        ) from error


def load(path: Any, *, progress: Progress | None = None) -> Any:
    """Read what `save` wrote: the same tree, from the file alone.

    Classes and functions are found by name among those that the program has imported; a file never
    causes an import, and no code of it is run. Arrays are put on the default device. `__init__` does
    not run: an attribute that it sets by now, and that is no field of the class, is not there.

    Args:
      path: the path of the file, or a file that is open for bytes, read from where it is.
      progress: called as `progress(bytes_done, bytes_in_all)` now and then.

    Raises:
      LoadError: the file is damaged, cut short, foreign or newer, or a class is not imported or its
        fields have changed; the message names the file and the part. Where there is no such file,
        or it may not be read, it is also the `OSError` that it is.

    >>> import jax, jax.numpy as jnp, nnx, tempfile, os
    >>> shared = nnx.Ref(jnp.ones(3), "params")
    >>> path = os.path.join(tempfile.mkdtemp(), "two.npz")
    >>> nnx.save(path, (shared, shared))
    >>> a, b = nnx.load(path)
    >>> a is b
    True
    """
    with _reading(path, progress) as reader:
        structure = reader.structure()
        if structure is None:
            raise LoadError(
                f"it holds arrays ({listed(reader.array_names, 4)}), but no structure of nnx.save. "
                f"Construct the model and use nnx.load_state(path, into=model)"
            )
        return decode(structure, reader.array_names, reader.read)


def load_state(
    path: Any, *, into: Any, strict: bool = True, progress: Progress | None = None
) -> LoadReport:
    """Read the values of a file into a model that is there already, by path.

    The file may be one of a whole model, of a Partition (`nnx.save(path, model["params"])`), or an
    uncompressed `.npz` or a `.safetensors` of another tool whose names are paths joined by dots.
    Values go to where the model's own values are, shardings included. A tied weight is loaded by any
    of its paths; if the file has several, they must agree.

    Args:
      path: the path of the file, or a file that is open for bytes, read from where it is.
      into: the model, or another tree that holds Refs.
      strict: whether it is an error if a path is missing, unexpected, or of another shape or
        dtype. Without it, what fits is read, and the report says what did not.
      progress: called as `progress(bytes_done, bytes_in_all)` now and then.

    Returns:
      A LoadReport.

    Raises:
      LoadError: the file cannot be read or, with `strict`, does not fit (an array in a tuple does
        not, since a tuple cannot change); the call is inside a transformation. Nothing is changed
        then.

    >>> import jax, nnx, tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "weights.npz")
    >>> nnx.save(path, nnx.Linear.init(0)(3, 2)["params"])
    >>> nnx.load_state(path, into=nnx.Linear.init(1)(3, 2))
    LoadReport(2 loaded)
    """
    fitting = Fitting(into)
    with _reading(path, progress) as reader:
        structure = reader.structure()
        if structure is None:
            names = reader.array_names
            values = {tuple(n.split(".")): reader.read(n, None, None) for n in names}
        else:
            values = decode_state(structure, reader.array_names, reader.read)
    fitting.add_all(values)
    report = fitting.report()
    if strict and (report.missing or report.unexpected or report.mismatched):
        raise LoadError(
            f"{shown(path)} does not fit, and nothing was changed: {report!r}. Pass strict=False to "
            f"read what fits."
        )
    fitting.write()
    return report


def arrays_of(path: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The name and the array of each part of a safetensors file, whoever wrote it."""
    with _reading(path, None, tensors) as reader:
        for name in reader.array_names:
            yield name, reader.read(name, None, None)
