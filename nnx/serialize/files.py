"""`nnx.save`, `nnx.load` and `nnx.load_state`: a tree in one file, and back."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from nnx.serialize import npz, tensors
from nnx.serialize.decode import decode, decode_state
from nnx.serialize.encode import encode
from nnx.serialize.errors import LoadError
from refx import RefError, StructureError, UnknownPathError
from refx.dag import dtype_of, find_ref, refs, update
from refx.node import Node, attributes
from refx.partition import Path, dotted, listed
from refx.snapshot import snapshot
from refx.trace import peek

__all__ = ["LoadReport", "load", "load_state", "save"]

Progress = Callable[[int, int], None]


def _container(path: Any) -> Any:
    return tensors if os.fspath(path).endswith(".safetensors") else npz


def save(path: Any, tree: Any, *, progress: Progress | None = None) -> None:
    """Write a model, or any tree of modules, Refs and arrays, into one file.

    The file is an `.npz`, which `numpy.load` opens without pickle, with the structure as JSON beside
    the arrays; or, if the name ends in `.safetensors`, one of that kind (extra `safetensors`). It
    holds the classes by name, hyperparameters, arrays of every dtype, random keys, collections,
    metadata, sharing and cycles. It is written under another name, flushed to the disk, and then
    takes its place: a program that fails or stops half-way leaves what was there before.

    A class of a script is called `__main__.Net` in the file, which another program does not have: define
    models in a module that is imported, or name them, `@nnx.saveable(name="project.Net")`. What holds
    functions that have no name, as an `nnx.Optimizer` holds those of optax, is saved by its values,
    `nnx.save(path, nnx.get_partition((model, optimizer, stream)))`, and read by
    `nnx.load_state(path, into=(model, optimizer, stream))`.

    Args:
      path: the file.
      tree: a module, or a tuple, list or dict of modules, Refs and arrays, or a Partition.
      progress: called as `progress(bytes_done, bytes_in_all)` now and then.

    Raises:
      SaveError: the tree holds something that a file cannot, such as a function that is not
        registered (see `nnx.saveable`); the message has its path, and nothing is written.
      FileNotFoundError: the folder of the file does not exist.

    >>> import jax, nnx, tempfile, os
    >>> model = nnx.Linear.init(jax.random.key(0))(3, 2)
    >>> path = os.path.join(tempfile.mkdtemp(), "model.npz")
    >>> nnx.save(path, model)
    >>> nnx.load(path).kernel.shape
    (3, 2)
    """
    encoded = encode(tree)
    with _replacing(os.path.realpath(os.fspath(path))) as temporary:
        container = _container(path)
        if container is npz:
            with open(temporary, "wb") as file:
                npz.write(file, encoded, progress)
        else:
            tensors.write(temporary, encoded, progress)


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[str]:
    """A temporary name beside `path`, which takes its place if nothing is raised."""
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        what = "there is no such folder to save in; make it with os.makedirs"
        raise FileNotFoundError(errno.ENOENT, what, folder)
    number, temporary = tempfile.mkstemp(prefix=".nnx.", suffix=".tmp", dir=folder)
    try:
        os.close(number)
        yield temporary
        # What is not on the disk when the name changes may be lost with the power, and the old file
        # with it.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, _mode(path))
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(folder)


def _mode(path: str) -> int:
    # Temporary files are private; the file should be as any other that the user writes.
    try:
        return os.stat(path).st_mode & 0o777
    except OSError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask


def _sync_folder(folder: str) -> None:
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


@contextlib.contextmanager
def _reading(path: Any, progress: Progress | None) -> Iterator[Any]:
    """Open a file; whatever is wrong with it becomes one LoadError that names it."""
    path = os.fspath(path)
    try:
        with _container(path).opened(path, progress) as reader:
            yield reader
    except LoadError as error:
        raise LoadError(f"{path} cannot be loaded: {error}.") from error.__cause__
    except (RefError, ImportError):
        raise
    except Exception as error:
        # Only errors of opening the file have its name.
        if isinstance(error, OSError) and error.filename is not None:
            raise
        text = str(error) or type(error).__name__
        raise LoadError(
            f"{path} cannot be loaded: it is damaged, cut short, or no file of nnx.save at all "
            f"({text:.200})."
        ) from error


def load(path: Any, *, progress: Progress | None = None) -> Any:
    """Read what `save` wrote: the same tree, from the file alone.

    Classes and functions are found by name among those that the program has imported; a file never
    causes an import, and no code of it is run. Arrays are put on the default device. `__init__` does
    not run: an attribute that it sets by now, and that is no field of the class, is not there.

    Args:
      path: the file.
      progress: called as `progress(bytes_done, bytes_in_all)` now and then.

    Raises:
      LoadError: the file is damaged, cut short, foreign or newer, or a class is not imported or its
        fields have changed; the message names the file and the part.
      FileNotFoundError: there is no such file.

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
        return decode(structure, reader.read)


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What `load_state` found.

    Attributes:
      loaded: the paths that were read.
      missing: paths of the model that the file does not have.
      unexpected: paths of the file that the model does not have.
      mismatched: paths with the shape and dtype in the file and in the model, where they differ.
    """

    loaded: tuple[Path, ...]
    missing: tuple[Path, ...]
    unexpected: tuple[Path, ...]
    mismatched: dict[Path, tuple[str, str]]

    def __repr__(self) -> str:
        lines = [f"{len(self.loaded)} loaded"]
        if self.missing:
            lines.append(f"missing in the file: {listed(self.missing)}")
        if self.unexpected:
            lines.append(f"unexpected in the file: {listed(self.unexpected)}")
        lines += [
            f"{dotted(path)!r} is {there} in the file and {here} in the model"
            for path, (there, here) in self.mismatched.items()
        ]
        return f"LoadReport({'; '.join(lines)})"


def load_state(
    path: Any, *, into: Any, strict: bool = True, progress: Progress | None = None
) -> LoadReport:
    """Read the values of a file into a model that is there already, by path.

    The file may be one of a whole model, of a Partition (`nnx.save(path, model["params"])`), or an
    uncompressed `.npz` or a `.safetensors` of another tool whose names are paths joined by dots.
    Values go to where the model's own values are, shardings included.

    Args:
      path: the file.
      into: the model, or another tree that holds Refs.
      strict: whether it is an error if a path is missing, unexpected, or of another shape or
        dtype. Without it, what fits is read, and the report says what did not.
      progress: called as `progress(bytes_done, bytes_in_all)` now and then.

    Returns:
      A LoadReport.

    Raises:
      LoadError: the file cannot be read or, with `strict`, does not fit; the call is inside a
        transformation. Nothing is changed then.

    >>> import jax, nnx, tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "weights.npz")
    >>> nnx.save(path, nnx.Linear.init(0)(3, 2)["params"])
    >>> nnx.load_state(path, into=nnx.Linear.init(1)(3, 2))
    LoadReport(2 loaded)
    """
    _check_outside(into)
    with _reading(path, progress) as reader:
        structure = reader.structure()
        if structure is None:
            names = reader.array_names
            values = {tuple(n.split(".")): reader.read(n, None, None) for n in names}
        else:
            values = decode_state(structure, reader.read)
    fitting = _Fitting(into)
    # A path of tuples that is there comes before one that only reads the same with dots.
    for given in sorted(values, key=lambda path: path not in fitting.paths):
        fitting.add(given, values[given])
    report = fitting.report()
    if strict and (report.missing or report.unexpected or report.mismatched):
        raise LoadError(
            f"{os.fspath(path)} does not fit, and nothing was changed: {report!r}. Pass "
            f"strict=False to read what fits."
        )
    fitting.write()
    return report


def _check_outside(tree: Any) -> None:
    for path, cell in refs(tree).items():
        value = peek(cell)
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(value)):
            raise LoadError(
                f"The value at {dotted(path)!r} is a tracer: nnx.load_state was called inside a "
                f"transformation, which would keep what the file has now. Call it outside, before "
                f"the step."
            )


class _Fitting:
    """What of a file's values fits into a tree."""

    def __init__(self, tree: Any):
        self._tree = tree
        self._cells = refs(tree)
        self.paths = self._cells.keys()
        kept = snapshot(tree)
        self._arrays = dict(zip(kept.dagdef.leaf_paths, kept.leaves(), strict=True))
        self._new: dict[Path, Any] = {}
        self._new_arrays: dict[Path, Any] = {}
        self._unexpected: list[Path] = []
        self._mismatched: dict[Path, tuple[str, str]] = {}

    def add(self, given: Path, value: Any) -> None:
        if given in self._arrays:
            self._compare(given, value, self._arrays[given], self._new_arrays)
            return
        try:
            exact = given in self._cells
            path, cell = find_ref(self._tree, given if exact else dotted(given), self._cells)
        except UnknownPathError:
            self._unexpected.append(given)
            return
        if path in self._new:
            self._unexpected.append(given)
        else:
            self._compare(path, value, peek(cell), self._new)

    def _compare(self, path: Path, value: Any, old: Any, into: dict[Path, Any]) -> None:
        new_leaves, new_tree = jax.tree.flatten(value)
        old_leaves, old_tree = jax.tree.flatten(old)
        there, here = _text(new_leaves), _text(old_leaves)
        fits = there in (here, _text(map(_canonical, old_leaves)))
        if new_tree != old_tree and fits:
            there, here = str(new_tree), str(old_tree)
        if new_tree != old_tree or not fits:
            self._mismatched[path] = (there, here)
            return
        placed = [_like(a, b) for a, b in zip(new_leaves, old_leaves, strict=True)]
        into[path] = jax.tree.unflatten(old_tree, placed)

    def report(self) -> LoadReport:
        known = {*self._new, *self._mismatched}
        missing = [p for p in self._cells if p not in known]
        missing += [p for p in self._arrays if p not in (*self._new_arrays, *known)]
        return LoadReport(
            (*self._new, *self._new_arrays),
            tuple(missing),
            tuple(self._unexpected),
            self._mismatched,
        )

    def write(self) -> None:
        places = [(self._place(path), value) for path, value in self._new_arrays.items()]
        update(self._tree, self._new)
        for (holder, name), value in places:
            if isinstance(holder, Node):
                setattr(holder, name, value)
            else:
                holder[name] = value

    def _place(self, path: Path) -> tuple[Any, Any]:
        at = self._tree
        for name in path[:-1]:
            at = _child(at, name)
        if isinstance(at, Node):
            return at, path[-1]
        if isinstance(at, list):
            return at, int(path[-1])
        if isinstance(at, dict):
            return at, next(key for key in at if str(key) == path[-1])
        raise StructureError(
            f"The array at {dotted(path)!r} is in a {type(at).__name__}, where it cannot be "
            f"replaced. Keep it in an attribute, a list or a dict, or make it a Ref."
        )


def _child(at: Any, name: str) -> Any:
    if isinstance(at, Node):
        return attributes(at)[name]
    if isinstance(at, list | tuple):
        return at[getattr(at, "_fields", ()).index(name) if not name.isdecimal() else int(name)]
    return {str(key): value for key, value in at.items()}[name]


def _canonical(x: Any) -> Any:
    # A step would make it that: NumPy's float64 becomes float32.
    return jax.ShapeDtypeStruct(x.shape, dtype_of(x)) if isinstance(x, np.ndarray) else x


def _text(leaves: Iterable[Any]) -> str:
    shapes = []
    for x in leaves:
        if isinstance(x, int | float | complex):
            # It is what JAX would make of it: a counter may begin as a Python number.
            shapes.append(f"{jnp.result_type(x)}[]")
        elif hasattr(x, "dtype"):
            shapes.append(f"{x.dtype}[{','.join(map(str, np.shape(x)))}]")
        else:
            shapes.append(type(x).__name__)
    return ", ".join(shapes) or "nothing"


def _like(new: Any, old: Any) -> Any:
    """The new value where the old one is: on its devices, or in NumPy."""
    if isinstance(old, jax.Array):
        return jax.device_put(new, old.sharding if old.committed else None)
    if isinstance(old, jax.ShapeDtypeStruct) and old.sharding is not None:
        return jax.device_put(new, old.sharding)
    return np.asarray(new) if isinstance(old, np.ndarray) else new
