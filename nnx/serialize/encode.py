"""A tree as JSON and named arrays.

Objects with an identity (Refs, modules, lists, dicts) are in one flat list, and references to them
are numbers. So sharing and cycles need no special case, and depth has no limit. Everything else is
written in place: as a JSON value, or as a JSON object with one key that names its kind, such as
`{"tuple": [...]}`. `decode.py` is the inverse and has the same kinds.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import functools
import inspect
import json
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

from nnx._layer_names import method_of
from nnx.serialize.classes import fields_of, why_not
from nnx.serialize.dtypes import dtype_name, has_bad_bits
from nnx.serialize.errors import SaveError
from nnx.serialize.grammar import (
    CONTEXTS,
    DEPTH,
    DIGITS,
    FORMAT,
    VERSION,
    Damaged,
    check,
    check_distinct,
    entered,
)
from nnx.serialize.registry import is_config, name_of, registered
from nnx.serialize.unsaveable import at, unsaveable
from refx import EndedTraceError, Node, Partition, Ref
from refx.access import peek
from refx.node import attributes, is_array
from refx.partition import Name, Path, dotted
from refx.snapshot import snapshot
from refx.text import a_kind
from refx.trace import EVAL, current_trace

__all__: list[str] = []


class Encoded(NamedTuple):
    """A tree in written form: the structure, and the arrays by the names that the structure uses."""

    structure: dict[str, Any]
    arrays: dict[str, Any]


def encode(tree: Any, *, spread: bool = False) -> Encoded:
    """Take a tree apart.

    Args:
      tree: the tree.
      spread: whether a process may hold only a part of an array.

    Raises:
      SaveError: the tree holds something that cannot be named or rebuilt. The message has its path.
    """
    return _Encoder(tree, spread).run()


def is_spread(x: Any) -> bool:
    """Whether an array is on devices of several processes."""
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def is_identity(x: Any) -> bool:
    """Whether `x` is written once and referred to by number."""
    return isinstance(x, Node | Ref) or type(x) in (list, dict)


class _Encoder:
    def __init__(self, tree: Any, spread: bool):
        self._tree = tree
        self._spread = spread
        self._objects: list[Any] = []
        self._paths: list[Path] = []
        self._numbers: dict[int, int] = {}
        self._arrays: dict[str, Any] = {}
        self._array_names: dict[int, str] = {}
        # The names of the arrays in lower case, because some file systems ignore case.
        self._taken: set[str] = set()
        self._classes: dict[str, Any] = {}
        self._class_names: dict[type, str] = {}
        # The grammar's context of the value that is being written, and its nesting depth.
        self._context = "free"
        self._depth = 0
        try:
            kept = snapshot(tree)
        except Exception as error:
            raise SaveError(f"The tree cannot be saved: {error}") from error
        # A shared Ref is named by its canonical path.
        self._canonical = dict(zip(map(id, kept.refs), kept.dagdef.ref_paths, strict=True))
        self._leaves = list(zip(kept.dagdef.leaf_paths, kept.leaves(), strict=True))

    def run(self) -> Encoded:
        root = self._code(self._tree, ())
        specs = []
        # The list of objects grows during this loop.
        for obj, path in zip(self._objects, self._paths, strict=False):
            specs.append(self._spec(obj, path))
        for path, x in self._leaves:
            if not is_array(x):
                raise SaveError(
                    f"{at(path)} is {a_kind(type(x))} instead of an array, perhaps from "
                    "jax.tree.map. Save the original model, or a dict of these values."
                )
        # For readers who want the values by path and not the tree.
        leaves = [[list(map(str, path)), self._code(x, path)] for path, x in self._leaves]
        structure = {
            "format": FORMAT,
            "version": VERSION,
            "root": root,
            "objects": specs,
            "leaves": leaves,
            "classes": self._classes,
        }
        try:
            check(structure).check_used()
        except Damaged as error:
            raise SaveError(f"The tree cannot be saved: {error}.") from None
        return Encoded(structure, self._arrays)

    def _spec(self, obj: Any, path: Path) -> dict[str, Any]:
        if isinstance(obj, Ref):
            return {"ref": self._ref(obj, path)}
        if type(obj) is list:
            return {"list": self._all(obj, path)}
        if type(obj) is dict:
            return {"dict": self._pairs(obj, path)}
        for name in attributes(obj):
            reason = why_not(type(obj), name)
            if reason is not None:
                raise SaveError(
                    f"{at(path)} has the attribute {name!r}, {reason}. Give it another name."
                )
        name = self._class(type(obj), path)
        named = [[k, self._code(v, (*path, k))] for k, v in attributes(obj).items()]
        return {"module": {"class": name, "attributes": named}}

    def _ref(self, ref: Ref[Any], path: Path) -> dict[str, Any]:
        path = self._canonical.get(id(ref), path)
        if id(ref) not in self._canonical:
            raise SaveError(f"{at(path)} holds a Ref that is not part of the tree.")
        try:
            value = peek(ref)
        except EndedTraceError as error:
            raise SaveError(f"{at(path)} cannot be saved. {error}") from error
        facts = ref.metadata.items()
        return {
            "path": list(map(str, path)),
            "collection": self._within("key", ref.collection, path),
            "metadata": [[k, self._within("key", v, (*path, k))] for k, v in facts],
            "value": self._within("content", value, path),
        }

    def _class(self, cls: type[Node], path: Path) -> str:
        name = self._class_names.get(cls)
        if name is None:
            name = name_of(cls)
            assert name is not None
            self._class_names[cls] = name
            self._classes[name] = fields_of(cls)
        return name

    def _pairs(self, mapping: Any, path: Path) -> list[Any]:
        try:
            check_distinct(mapping, "it")
        except Damaged as error:
            raise SaveError(f"{at(path)} cannot be saved: {error}.") from None
        return [
            [self._within("key", k, path), self._code(v, (*path, str(k)))]
            for k, v in mapping.items()
        ]

    def _all(self, items: Any, path: Path) -> list[Any]:
        return [self._code(x, (*path, str(i))) for i, x in enumerate(items)]

    def _within(self, slot: str, x: Any, path: Path) -> Any:
        """The code of a value, in another context of the grammar."""
        outer, self._context = self._context, entered(self._context, slot)
        try:
            return self._code(x, path)
        finally:
            self._context = outer

    def _code(self, x: Any, path: Path) -> Any:
        if isinstance(x, Name):
            x = str(x)
        kind = type(x)
        if x is None or kind is bool:
            return x
        if kind is int:
            if x.bit_length() > 3 * DIGITS:
                raise SaveError(f"{at(path)} is an integer of more than {DIGITS} digits.")
            return x
        if kind is str:
            # Two surrogate halves next to each other would be read back as one character.
            if not x.isascii() and json.loads(json.dumps(x)) != x:
                raise SaveError(f"{at(path)} is a text that is not valid Unicode: {x!r:.80}.")
            return x
        if kind is float:
            return x if math.isfinite(x) else {"float": repr(x)}
        if self._depth > DEPTH:
            raise SaveError(
                f"{at(path)[:200]} is nested more than {DEPTH} levels deep. Replace some of the "
                "tuples by lists."
            )
        self._depth += 1
        try:
            return self._part(x, path)
        finally:
            self._depth -= 1

    def _part(self, x: Any, path: Path) -> Any:
        kind = type(x)
        allowed = CONTEXTS[self._context]
        if kind is list and "list" in allowed:
            return {"list": self._all(x, path)}
        if kind is dict and "dict" in allowed:
            return {"dict": self._pairs(x, path)}
        if is_identity(x):
            return {"object": self._object(x, path)}
        if isinstance(x, jax.Array | np.ndarray):
            return self._array(x, path)
        return self._other(x, path)

    def _object(self, x: Any, path: Path) -> int:
        kind = (
            "ref" if isinstance(x, Ref) else "module" if isinstance(x, Node) else type(x).__name__
        )
        if f"object {kind}" not in CONTEXTS[self._context]:
            raise SaveError(
                f"{at(path)} holds {a_kind(type(x))} in a key, in metadata or in the value of a "
                "Ref. It can be saved only in an attribute, a list, a tuple or a dict."
            )
        number = self._numbers.get(id(x))
        if number is None:
            number = self._numbers[id(x)] = len(self._objects)
            self._objects.append(x)
            self._paths.append(path)
        return number

    def _other(self, x: Any, path: Path) -> Any:
        kind: type = type(x)
        known = registered(kind)
        if known is not None and not isinstance(x, enum.Enum):
            value = known.save(x) if known.save is not None else _fields(x, path)
            return {"saved": [known.name, self._within("inner", value, path)]}
        exact = _KINDS.get(kind)
        if exact is not None:
            return {exact[0]: exact[1](self, x, path)}
        if isinstance(x, np.dtype):
            return {"dtype": self._dtype(x, path)}
        if isinstance(x, np.generic):
            return {"scalar": [self._dtype(x.dtype, path), _text(x.tobytes())]}
        if isinstance(x, types.MethodType) and isinstance(x.__self__, Node):
            return {"method": self._method(x, path)}
        if isinstance(x, type) and issubclass(x, Node):
            return {"class": self._class(x, path)}
        name = name_of(x if callable(x) else kind)
        if name is None:
            raise unsaveable(x, path)
        if callable(x):
            return {"named": name}
        if isinstance(x, enum.Enum) and _has_names(x):
            return {"enum": [name, x.name]}
        if isinstance(x, tuple) and hasattr(kind, "_fields"):
            return {"namedtuple": [name, self._all(x, path)]}
        if is_config(kind):
            return {"saved": [name, self._within("inner", _fields(x, path), path)]}
        raise unsaveable(x, path)

    def _partition(self, x: Partition, path: Path) -> Any:
        # Nothing inside a value of a Partition has an identity, as in the value of a Ref.
        return [[list(map(str, p)), self._within("content", v, (*path, *p))] for p, v in x.items()]

    def _partial(self, x: Any, path: Path) -> Any:
        named = [[k, self._code(v, (*path, k))] for k, v in x.keywords.items()]
        return [self._code(x.func, path), self._all(x.args, path), named]

    def _method(self, x: types.MethodType, path: Path) -> Any:
        name = x.__func__.__name__
        if method_of(type(x.__self__), name) is not x.__func__:
            raise SaveError(
                f"{at(path)} is a method {name!r}, but its class {type(x.__self__).__name__} has "
                "no method of that name. Define it in the class."
            )
        return [self._within("node", x.__self__, path), name]

    def _dtype(self, dtype: np.dtype, path: Path) -> str:
        if dtype.hasobject or dtype.names is not None or dtype.subdtype is not None:
            raise SaveError(f"{at(path)} has a dtype with fields or of Python objects: {dtype}.")
        return dtype_name(dtype)

    def _array(self, x: Any, path: Path) -> Any:
        if isinstance(x, Tracer) and current_trace(()) is EVAL:
            raise SaveError(
                f"{at(path)} is a tracer of a transformation that has ended, so it has no value. "
                "Return the value, or its module, from the transformed function."
            )
        if isinstance(x, Tracer):
            raise SaveError(
                f"{at(path)} is a tracer: nnx.save was called inside a transformation. Call it "
                f"outside, after the step."
            )
        if isinstance(x, jax.Array) and x.is_deleted():
            raise SaveError(
                f"{at(path)} is a deleted array: it was probably donated to a compiled function. "
                "Save the model that the function returned."
            )
        name = self._array_names.get(id(x))
        if name is None:
            name = self._array_names[id(x)] = self._member(path)
            self._arrays[name] = x
        if not self._spread and isinstance(x, jax.Array) and not _is_whole(x):
            raise SaveError(
                f"{at(path)} is spread over the devices of several processes, so no process can "
                "write it into one file. Save into a directory, in every process: "
                "nnx.save('run/', tree)."
            )
        code: dict[str, Any] = {"array": name, "shape": list(x.shape)}
        if isinstance(x, np.ndarray):
            if x.dtype.hasobject:
                raise SaveError(
                    f"{at(path)} is a NumPy array of Python objects. Make it a tuple, or an array "
                    f"of numbers or strings."
                )
            if type(x) is not np.ndarray:
                raise SaveError(f"{at(path)} is {a_kind(type(x))}; np.asarray(x) can be saved.")
            if x.dtype.names is not None:
                raise SaveError(
                    f"{at(path)} is a NumPy array with named fields. Save a dict of its fields."
                )
            self._check_bits(x, path)
            if x.dtype.itemsize == 0:
                raise SaveError(
                    f"{at(path)} is a NumPy array of empty strings. Save a list of them."
                )
            return code | {"dtype": dtype_name(x.dtype), "numpy": True}
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return code | {"key": str(jax.random.key_impl(x))}
        self._check_bits(x, path)
        return code | {"dtype": dtype_name(x.dtype)}

    def _check_bits(self, x: Any, path: Path) -> None:
        if isinstance(x, jax.Array) and not _is_whole(x):
            return
        if np.dtype(x.dtype).kind in "bUV" and has_bad_bits(np.asarray(x)):
            raise SaveError(
                f"{at(path)} has bits that are not a valid {x.dtype}. Make the array again."
            )

    def _member(self, path: Path) -> str:
        # A name that every file system accepts, in case somebody unpacks the file.
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
    frozenset: (
        "frozenset",
        lambda e, x, path: sorted((e._within("key", v, path) for v in x), key=repr),
    ),
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


def _is_whole(x: jax.Array) -> bool:
    """Whether this process holds all of an array."""
    return x.is_fully_addressable or x.is_fully_replicated


def _has_names(x: enum.Enum) -> bool:
    """Whether the name of an enum value identifies its member, or the members of a flag."""
    members = type(x).__members__
    parts = x.name.split("|") if isinstance(x, enum.Flag) and x.name else [x.name]
    return x.name in members or all(part in members for part in parts)


def _fields(x: Any, path: Path) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(x)]
    for name in getattr(x, "__dict__", {}):
        cached = inspect.getattr_static(type(x), name, None)
        if name not in names and not isinstance(cached, functools.cached_property):
            raise SaveError(
                f"{at(path)} is a {type(x).__qualname__}, a dataclass that holds {name!r}, which "
                "is not one of its fields and would be lost. Make it a field: field(init=False)."
            )
    return {name: getattr(x, name) for name in names}


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
