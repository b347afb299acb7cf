"""`nnx.save`, `nnx.load` and `nnx.load_state`: a tree in one file or a directory, and back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, overload

import numpy as np

from nnx.serialize import npz, tensors
from nnx.serialize.decode import decode, decode_state
from nnx.serialize.directory import Reader as DirectoryReader
from nnx.serialize.directory import Saving, save_directory, settle, token_of
from nnx.serialize.encode import encode, is_spread
from nnx.serialize.errors import LoadError, SaveError, load_error, save_error
from nnx.serialize.fitting import Fitting, LoadReport
from nnx.serialize.folders import is_directory, is_there
from nnx.serialize.hosts import is_first
from nnx.serialize.npz import Progress
from nnx.serialize.places import check_writable, is_path, reading, replacing, shown
from nnx.serialize.plan import Plan, plan_state, plan_tree
from refx import RefError
from refx.filters import Filter
from refx.partition import Path, listed
from refx.text import a_kind

__all__ = ["load", "load_state", "save"]

T = TypeVar("T")


def _container(path: Any) -> Any:
    return tensors if shown(path).endswith(".safetensors") else npz


def save(
    path: Any,
    tree: Any,
    *,
    progress: Progress | None = None,
    wait: bool = True,
    timeout: float = 300,
) -> Saving | None:
    """Write a model, or any tree of modules, Refs and arrays, into one file or a directory.

    The file is an `.npz` with the structure as JSON beside the arrays; `numpy.load` opens it
    without pickle. If the name ends in `.safetensors`, it is a safetensors file. It holds class
    names, hyperparameters, arrays of every dtype, random keys, collections, metadata, sharing and
    cycles. It is written under a temporary name, flushed to the disk, and then renamed. So a
    program that fails or stops half-way leaves the old file in place. The next save to the same
    path removes the temporary files of killed programs.

    A class of a script gets the name `__main__.Net` in the file, which another program does not
    have. So define models in a module that programs import, or name them:
    `@nnx.saveable(name="project.Net")`. An `nnx.Optimizer` holds functions of optax, which have no
    name in a file. For objects like that, save only the values,
    `nnx.save(path, nnx.get_partition((model, optimizer, stream)))`, and read them with
    `nnx.load_state(path, into=(model, optimizer, stream))`.

    A path without a suffix, such as `"run/"`, becomes a directory: the same structure in
    `nnx.json`, and the arrays through Orbax (`pip install orbax-checkpoint`). After a crash it
    holds either the old checkpoint or the new one. In a program of several processes, every process
    calls `save` with the same tree and writes its own shards. All of them must share one file
    system.

    If several processes save one file and arrays are spread over them, process 0 writes the file
    and the others return at once. Every array must be replicated, so that process 0 holds all of
    it.

    Args:
      path: the path of the file or directory, or a file that is open for bytes, such as an `io.BytesIO`.
      tree: a module, or a tuple, list or dict of modules, Refs and arrays, or a Partition.
      progress: called as `progress(bytes_done, bytes_in_all)` from time to time; for a directory,
        only at the end.
      wait: for a directory, whether to wait until it is written. With `wait=False` the values are
        copied, and the rest continues in the background.
      timeout: for a directory, how many seconds to wait for the other processes.

    Returns:
      With `wait=False` a `Saving`, which has `wait()` and `done()`. Otherwise None.

    Raises:
      SaveError: the tree holds something that a file cannot hold, such as a function that is not
        registered (see `nnx.saveable`). The message has its path, and nothing is written. Or
        another process did not save in time. Or the previous save, with `wait=False`, failed. If
        the operating system refused (full disk, no permission), it is also that `OSError`, and what
        was at the path is unchanged.

    >>> import jax, nnx, tempfile, os
    >>> model = nnx.Linear.init(jax.random.key(0))(3, 2)
    >>> path = os.path.join(tempfile.mkdtemp(), "model.npz")
    >>> nnx.save(path, model)
    >>> nnx.load(path).kernel.shape
    (3, 2)
    """
    if is_directory(path):
        encoded = encode(tree, spread=True)
        name = os.fsdecode(path)
        return save_directory(name, encoded, wait=wait, timeout=timeout, progress=progress)
    if not wait:
        raise SaveError(
            f"wait=False is for directories, but {shown(path)} is a single file. Give a path "
            "without a suffix, such as 'run/'."
        )
    if not is_path(path):
        check_writable(path)
    encoded = encode(tree)
    if not is_first() and any(is_spread(x) for x in encoded.arrays.values()):
        return None
    container = _container(path)
    try:
        if not is_path(path):
            container.write(path, encoded, progress)
            if hasattr(path, "flush"):
                path.flush()
            return None
        with replacing(os.fsdecode(path)) as file:
            container.write(file, encoded, progress)
    except OSError as error:
        raise save_error(error, shown(path)) from error
    return None


@contextlib.contextmanager
def _explained(path: Any) -> Iterator[None]:
    """Turn any problem with a file into a LoadError that names the file."""
    name = shown(path)
    try:
        yield
    except LoadError as error:
        if isinstance(error, OSError):
            raise
        raise LoadError(f"{name} cannot be loaded: {error}.") from error.__cause__
    except (RefError, ImportError):
        raise
    except OSError as error:
        raise load_error(error, name) from error
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise LoadError(
            f"{name} cannot be loaded: it is damaged, cut short, or not a file of nnx.save "
            f"({text:.200})."
        ) from error


@contextlib.contextmanager
def _reading(path: Any, progress: Progress | None, container: Any = None) -> Iterator[Any]:
    """Open a file. Turn any problem with it into a LoadError that names the file."""
    with _explained(path), reading(path) as (file, size):
        yield (container or _container(path)).Reader(file, size, progress)


@overload
def load(
    path: Any,
    kind: type[T],
    *,
    only: Filter = ...,
    specs: Any = None,
    axes: Any = None,
    mesh: Any = None,
    progress: Progress | None = None,
) -> T: ...
@overload
def load(
    path: Any,
    kind: None = None,
    *,
    only: Filter = ...,
    specs: Any = None,
    axes: Any = None,
    mesh: Any = None,
    progress: Progress | None = None,
) -> Any: ...
def load(
    path: Any,
    kind: Any = None,
    *,
    only: Filter = ...,
    specs: Any = None,
    axes: Any = None,
    mesh: Any = None,
    progress: Progress | None = None,
) -> Any:
    """Rebuild the tree that `save` wrote, from the file or directory alone.

    Classes and functions are looked up by name among those that the program has imported. A file
    never causes an import and never runs code. `__init__` does not run. So if `__init__` has gained
    an attribute since the save, and it is not a field of the class, the loaded model lacks it.

    Arrays go to the default device. With `mesh`, `specs` or `axes` they go where `nnx.shardings`
    says, whatever mesh and however many processes saved them. From a directory, each device reads
    its own part. A single file is read by every process.

    Args:
      path: the path of the file or directory, or a file that is open for bytes, which is read from
        its current position.
      kind: the class of the saved object, if you know it. Any other class is an error, and to editors
        and type checkers the result has that class: `nnx.load("net.npz", Net)` is a `Net`.
      only: a filter that selects the values to read. All others become `jax.ShapeDtypeStruct`s.
        With `None` that is all of them, so no device holds anything.
      specs: a dict from filter to PartitionSpec, or a callable `(path, ref) -> PartitionSpec`, such as
        `nnx.fsdp("data")`; it wins over the `sharding` metadata.
      axes: rules from logical axis names in the metadata to axes of the mesh.
      mesh: the mesh. The default is that of `jax.set_mesh`.
      progress: called as `progress(bytes_done, bytes_in_all)` from time to time, but not for a directory.

    Raises:
      LoadError: the file is damaged, cut short, foreign or newer; a class is not imported, or its
        fields have changed; or the file does not hold a `kind`. The message names the file and the part.
        If the file does not exist or may not be read, the error is also the matching `OSError`.

    >>> import jax, jax.numpy as jnp, nnx, tempfile, os
    >>> shared = nnx.Ref(jnp.ones(3), "params")
    >>> path = os.path.join(tempfile.mkdtemp(), "two.npz")
    >>> nnx.save(path, (shared, shared))
    >>> a, b = nnx.load(path)
    >>> a is b
    True
    >>> nnx.load(path, only=None)[0].value
    ShapeDtypeStruct(shape=(3,), dtype=float32)
    """
    if is_there(path):
        return _in_directory(
            path, lambda reader: _of_kind(kind, _load_directory(reader, only, specs, axes, mesh))
        )
    with _reading(path, progress) as reader:
        structure = reader.structure()
        if structure is None:
            raise LoadError(
                f"it holds arrays ({listed(reader.array_names, 4)}), but no structure from "
                "nnx.save. Construct the model and use nnx.load_state(path, into=model)"
            )
        plan = plan_tree(structure, reader.array_names, only, specs, axes, mesh)
        return _of_kind(kind, decode(structure, reader.array_names, plan.from_file(reader.read)))


def _of_kind(kind: Any, found: Any) -> Any:
    if kind is None or isinstance(found, kind):
        return found
    wanted = getattr(kind, "__name__", repr(kind))
    raise LoadError(f"it holds {a_kind(type(found))}, not a {wanted}")


def load_state(
    path: Any,
    *,
    into: Any,
    only: Filter = ...,
    strict: bool = True,
    progress: Progress | None = None,
) -> LoadReport:
    """Read the values of a file or directory into an existing model, by path.

    The file may hold a whole model or a Partition (`nnx.save(path, model["params"])`). It may also
    be an uncompressed `.npz` or a `.safetensors` of another tool, if its names are paths joined by
    dots. Values go where the model's own values are, shardings included. A tied weight is loaded
    under any of its paths; if the file has it under several, they must agree.

    Args:
      path: the path of the file or directory, or a file that is open for bytes, which is read from
        its current position.
      into: the model, or another tree that holds Refs.
      only: a filter that selects the values of the model to read, as in `only="params"`. The others
        stay as they are, and other values in the file are ignored.
      strict: if True, a path that is missing, unexpected, or of another shape or dtype is an error.
        If False, everything that fits is read, and the report lists the rest.
      progress: called as `progress(bytes_done, bytes_in_all)` from time to time, but not for a directory.

    Returns:
      A LoadReport.

    Raises:
      LoadError: the file cannot be read or, with `strict`, does not fit; or the call is inside a
        transformation. (An array in a tuple never fits, because a tuple cannot change.) If it
        raises, nothing has changed.

    >>> import jax, nnx, tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "weights.npz")
    >>> nnx.save(path, nnx.Linear.init(0)(3, 2)["params"])
    >>> nnx.load_state(path, into=nnx.Linear.init(1)(3, 2))
    LoadReport(2 loaded)
    """
    fitting = Fitting(into, only)
    if is_there(path):
        values = _in_directory(path, lambda reader: _state_of_directory(reader, fitting))
    else:
        values = _state_of_file(path, progress)
    fitting.add_all(values)
    report = fitting.report()
    if strict and (report.missing or report.unexpected or report.mismatched):
        raise LoadError(
            f"{shown(path)} does not fit, and nothing was changed: {report!r}. Pass strict=False to "
            f"read what fits."
        )
    fitting.write()
    return report


def _state_of_file(path: Any, progress: Progress | None) -> dict[Path, Any]:
    with _reading(path, progress) as reader:
        structure = reader.structure()
        if structure is None:
            names = reader.array_names
            return {tuple(n.split(".")): reader.read(n, None, None) for n in names}
        return decode_state(structure, reader.array_names, Plan().from_file(reader.read))


def _in_directory(path: Any, use: Callable[[DirectoryReader], Any]) -> Any:
    """Call `use` on a directory. Call it again if a new checkpoint replaces the directory meanwhile."""
    settle()
    name = os.fsdecode(path)
    token = None
    while True:
        try:
            with _explained(path):
                reader = DirectoryReader(name)
                token = reader.token
                return use(reader)
        except LoadError:
            if token is None or token_of(name) in (token, None):
                raise


def _load_directory(reader: DirectoryReader, only: Any, specs: Any, axes: Any, mesh: Any) -> Any:
    structure, names = reader.structure, reader.names
    plan = plan_tree(structure, names, only, specs, axes, mesh)
    return decode(structure, names, plan.from_directory(reader))


def _state_of_directory(reader: DirectoryReader, fitting: Fitting) -> dict[Path, Any]:
    structure, names = reader.structure, reader.names
    plan = plan_state(structure, names, fitting)
    values = decode_state(structure, names, plan.from_directory(reader))
    return {path: value for path, value in values.items() if fitting.wants(path)}


def arrays_of(path: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The name and the array of each part of any safetensors file."""
    with _reading(path, None, tensors) as reader:
        for name in reader.array_names:
            yield name, reader.read(name, None, None)
