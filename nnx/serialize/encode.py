"""A tree as JSON and named arrays.

What has an identity (Refs, modules, lists, dicts) is in one flat list of objects and is referred to by
number, so that sharing and cycles are nothing special and depth has no limit. Everything else is written
in place, as a JSON value or as a JSON object with one key that says what it is, such as
`{"tuple": [...]}`. `decode.py` is the inverse and has the same kinds.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import functools
import math
import re
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec

from nnx.serialize.errors import SaveError
from nnx.serialize.registry import name_of, registered
from refx import Node, Partition, Ref
from refx.node import attributes
from refx.partition import Path, dotted
from refx.snapshot import snapshot
from refx.trace import peek

__all__: list[str] = []

FORMAT = "nnx"
VERSION = 1


class Encoded(NamedTuple):
    """A tree as it is written: the structure, and the arrays by the names that it uses."""

    structure: dict[str, Any]
    arrays: dict[str, Any]


def encode(tree: Any) -> Encoded:
    """Take a tree apart.

    Raises:
      SaveError: it holds something that has no name or no inverse; the message has its path.
    """
    return _Encoder(tree).run()


def is_identity(x: Any) -> bool:
    """Whether `x` is written once and referred to by number."""
    return isinstance(x, Node | Ref) or type(x) in (list, dict)


class _Encoder:
    def __init__(self, tree: Any):
        self._tree = tree
        self._objects: list[Any] = []
        self._paths: list[Path] = []
        self._numbers: dict[int, int] = {}
        self._arrays: dict[str, Any] = {}
        self._array_names: dict[int, str] = {}
        # The names of the arrays, without regard to case: some file systems have none.
        self._taken: set[str] = set()
        self._classes: dict[str, Any] = {}
        self._in_place = False
        try:
            kept = snapshot(tree)
        except Exception as error:
            raise SaveError(f"The tree cannot be saved: {error}") from error
        # Where a Ref is shared, its canonical path is what names it.
        self._canonical = dict(zip(map(id, kept.refs), kept.dagdef.ref_paths, strict=True))
        self._leaves = list(zip(kept.dagdef.leaf_paths, kept.leaves(), strict=True))

    def run(self) -> Encoded:
        root = self._code(self._tree, ())
        specs = []
        # The list of objects grows while it is walked.
        for obj, path in zip(self._objects, self._paths, strict=False):
            specs.append(self._spec(obj, path))
        # For those who want the values by path and not the tree.
        leaves = [[list(path), self._code(x, path)] for path, x in self._leaves]
        structure = {
            "format": FORMAT,
            "version": VERSION,
            "root": root,
            "objects": specs,
            "leaves": leaves,
            "classes": self._classes,
        }
        return Encoded(structure, self._arrays)

    def _spec(self, obj: Any, path: Path) -> dict[str, Any]:
        if isinstance(obj, Ref):
            path = self._canonical[id(obj)]
            return {
                "ref": {
                    "path": list(path),
                    "collection": self._code(obj.collection, path),
                    "metadata": self._pairs(obj.metadata, path),
                    "value": self._inline(peek(obj), path),
                }
            }
        if type(obj) is list:
            return {"list": [self._code(x, (*path, str(i))) for i, x in enumerate(obj)]}
        if type(obj) is dict:
            return {"dict": self._pairs(obj, path)}
        name = self._class(type(obj), path)
        return {"module": {"class": name, "attributes": self._pairs(attributes(obj), path)}}

    def _class(self, cls: type[Node], path: Path) -> str:
        name = name_of(cls)
        assert name is not None
        self._classes.setdefault(name, fields_of(cls))
        return name

    def _pairs(self, mapping: Any, path: Path) -> list[Any]:
        return [[self._code(k, path), self._code(v, (*path, str(k)))] for k, v in mapping.items()]

    def _all(self, items: Any, path: Path) -> list[Any]:
        return [self._code(x, (*path, str(i))) for i, x in enumerate(items)]

    def _code(self, x: Any, path: Path) -> Any:
        kind = type(x)
        if x is None or kind is bool or kind is str or kind is int:
            return x
        if kind is float:
            return x if math.isfinite(x) else {"float": repr(x)}
        if self._in_place and kind in (list, dict):
            return {"list": self._all(x, path)} if kind is list else {"dict": self._pairs(x, path)}
        if is_identity(x):
            number = self._numbers.get(id(x))
            if number is None:
                number = self._numbers[id(x)] = len(self._objects)
                self._objects.append(x)
                self._paths.append(path)
            return {"object": number}
        if isinstance(x, jax.Array | np.ndarray):
            return self._array(x, path)
        return self._other(x, path)

    def _other(self, x: Any, path: Path) -> Any:
        kind: type = type(x)
        known = registered(kind)
        if known is not None and not isinstance(x, enum.Enum):
            value = known.save(x) if known.save is not None else _fields(x)
            return {"saved": [known.name, self._inline(value, path)]}
        exact = _KINDS.get(kind)
        if exact is not None:
            return {exact[0]: exact[1](self, x, path)}
        if isinstance(x, np.dtype):
            return {"dtype": dtype_name(x)}
        if isinstance(x, np.generic):
            return {"scalar": [dtype_name(x.dtype), _text(x.tobytes())]}
        if isinstance(x, types.MethodType) and isinstance(x.__self__, Node):
            return {"method": [self._code(x.__self__, path), x.__func__.__name__]}
        if isinstance(x, type) and issubclass(x, Node):
            return {"class": self._class(x, path)}
        name = name_of(x if callable(x) else kind)
        if name is None:
            raise _unsaveable(x, path)
        if callable(x):
            return {"named": name}
        if isinstance(x, enum.Enum) and x.name is not None:
            return {"enum": [name, x.name]}
        if isinstance(x, tuple) and hasattr(kind, "_fields"):
            return {"namedtuple": [name, self._all(x, path)]}
        raise _unsaveable(x, path)

    def _partition(self, x: Partition, path: Path) -> Any:
        return [[list(p), self._code(v, (*path, *p))] for p, v in x.items()]

    def _partial(self, x: Any, path: Path) -> Any:
        return [self._code(x.func, path), self._all(x.args, path), self._pairs(x.keywords, path)]

    def _inline(self, x: Any, path: Path) -> Any:
        """The code of a value in which lists and dicts are written in place.

        The value of a Ref has no identity inside it, and can be read without what is around it.
        What `load` gets must be complete when it is called.
        """
        outer, self._in_place = self._in_place, True
        try:
            return self._code(x, path)
        finally:
            self._in_place = outer

    def _array(self, x: Any, path: Path) -> Any:
        if isinstance(x, Tracer):
            raise SaveError(
                f"{_at(path)} is a tracer: nnx.save was called inside a transformation. Call it "
                f"outside, after the step."
            )
        if isinstance(x, jax.Array) and x.is_deleted():
            raise SaveError(
                f"{_at(path)} is an array that was deleted, as arrays are that were donated to a "
                f"compiled function. Save the model that came out of it."
            )
        name = self._array_names.get(id(x))
        if name is None:
            name = self._array_names[id(x)] = self._member(path)
            self._arrays[name] = x
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            raise SaveError(
                f"{_at(path)} is spread over the devices of several processes. Gather it first, "
                f"as with jax.experimental.multihost_utils.process_allgather, or use orbax."
            )
        code: dict[str, Any] = {"array": name, "shape": list(x.shape)}
        if isinstance(x, np.ndarray):
            if x.dtype.hasobject:
                raise SaveError(
                    f"{_at(path)} is a NumPy array of Python objects. Make it a tuple, or an array "
                    f"of numbers or strings."
                )
            if type(x) is not np.ndarray:
                raise SaveError(f"{_at(path)} is a {type(x).__name__}; np.asarray(x) can be saved.")
            if x.dtype.names is not None:
                raise SaveError(
                    f"{_at(path)} is a NumPy array with named fields. Save a dict of its fields."
                )
            return code | {"dtype": dtype_name(x.dtype), "numpy": True}
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return code | {"key": str(jax.random.key_impl(x))}
        return code | {"dtype": dtype_name(x.dtype)}

    def _member(self, path: Path) -> str:
        # A name that every file system takes, should somebody unpack the file.
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", dotted(path)).strip(".")[:120] or "value"
        chosen, n = name, 1
        while chosen.lower() in self._taken:
            n += 1
            chosen = f"{name}~{n}"
        self._taken.add(chosen.lower())
        return chosen


_Kind = Callable[[_Encoder, Any, Path], Any]
_KINDS: dict[type, tuple[str, _Kind]] = {
    tuple: ("tuple", _Encoder._all),
    PartitionSpec: ("spec", _Encoder._all),
    frozenset: ("frozenset", lambda e, x, path: sorted(e._all(x, path), key=repr)),
    complex: ("complex", lambda e, x, path: e._all((x.real, x.imag), path)),
    bytes: ("bytes", lambda e, x, path: _text(x)),
    type(...): ("ellipsis", lambda e, x, path: None),
    slice: ("slice", lambda e, x, path: e._all((x.start, x.stop, x.step), path)),
    range: ("range", lambda e, x, path: e._all((x.start, x.stop, x.step), path)),
    OrderedDict: ("ordered", _Encoder._pairs),
    Partition: ("partition", _Encoder._partition),
    functools.partial: ("partial", _Encoder._partial),
    jax.tree_util.Partial: ("Partial", _Encoder._partial),
}


def fields_of(cls: type[Node]) -> dict[str, Any]:
    """What a class declares of its instances, to notice when it has changed."""
    fields = {
        name: f"ref {f.collection!r}" if f.is_ref else "static" for name, f in cls._fields.items()
    }
    if dataclasses.is_dataclass(cls):
        fields |= {f.name: "attribute" for f in dataclasses.fields(cls) if f.name not in fields}
    return fields


def dtype_name(dtype: Any) -> str:
    """A dtype as text: its name where that says all."""
    name = dtype.name
    try:
        return name if jnp.dtype(name) == dtype else dtype.str
    except TypeError:
        return dtype.str


def _fields(x: Any) -> dict[str, Any]:
    return {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _at(path: Path) -> str:
    return f"The value at {dotted(path)!r}" if path else "What was to be saved"


def _unsaveable(x: Any, path: Path) -> SaveError:
    kind = type(x)
    if isinstance(x, jax.ShapeDtypeStruct):
        return SaveError(
            f"{_at(path)} is a shape without values, as nnx.eval_shape gives. Make the model itself."
        )
    if callable(x) and not isinstance(x, type):
        what = getattr(x, "__qualname__", repr(x))
        return SaveError(
            f"{_at(path)} is {what}, a function that has no name in a file, which holds no code. "
            f"Register it with @nnx.saveable where it is defined, use one of jax.nn, or save the "
            f"values alone: nnx.save(path, nnx.get_partition(tree, ...)), to be read with "
            f"nnx.load_state(path, into=tree)."
        )
    what = f"the class {x.__qualname__}" if isinstance(x, type) else f"a {kind.__qualname__}"
    return SaveError(
        f"{_at(path)} is {what}, which nnx.save does not know. Register the class with "
        f"@nnx.saveable (with save= and load= if it is no dataclass)."
    )
