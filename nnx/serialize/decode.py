"""The inverse of `encode.py`: the tree again, from JSON and named arrays.

The JSON may be anybody's. So each kind is looked up in a table and checked, objects are made without
calling their classes, and nothing is returned unless everything was understood.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import inspect
import types
from collections import OrderedDict
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from nnx.serialize.encode import FORMAT, VERSION, fields_of
from nnx.serialize.errors import LoadError
from nnx.serialize.registry import find, find_module_class, registered_name
from refx import Node, Partition, Ref
from refx.node import attributes, expose
from refx.node import make as make_node
from refx.partition import listed
from refx.ref import check_type
from refx.ref import make as make_ref
from refx.trace import local, trace_ref

__all__: list[str] = []

ReadArray = Callable[[str, str, tuple[int, ...]], np.ndarray]


class Damaged(Exception):
    """A part of the structure that `encode` would not have written; the message says which."""


def check_header(structure: Any) -> None:
    """Raise a LoadError, without the name of the file, for what this version cannot read."""
    if not isinstance(structure, dict) or structure.get("format") != FORMAT:
        raise LoadError("its structure is not one that nnx.save wrote")
    version = structure.get("version")
    if type(version) is not int or version < 1:
        raise LoadError(f"its format version is {version!r}, which there never was")
    if version > VERSION:
        raise LoadError(
            f"its format version is {version}, and this nnx reads versions up to {VERSION}. "
            f"Install a newer nnx"
        )


def decode(structure: Any, read_array: ReadArray) -> Any:
    """Make the tree of a structure.

    Args:
      structure: the parsed JSON.
      read_array: gives the array of a name, dtype and shape, or raises a LoadError.

    Raises:
      LoadError: without the name of the file.
    """
    check_header(structure)
    return _guarded(lambda: _Decoder(structure, read_array).run())


def decode_state(structure: Any, read_array: ReadArray) -> dict[tuple[str, ...], Any]:
    """The values by path: of the Refs of what was saved or, if it is a Partition, of that.

    The classes of modules are not needed, so a file whose classes have changed can be read too.
    """
    check_header(structure)
    decoder = _Decoder(structure, read_array)

    def values() -> dict[tuple[str, ...], Any]:
        root = structure["root"]
        if isinstance(root, dict) and "partition" in root:
            return dict(decoder.value(root))
        return decoder.by_path()

    return _guarded(values)


def _guarded(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except LoadError:
        raise
    except Damaged as error:
        raise LoadError(f"its structure is damaged: {error}") from None
    except RecursionError:
        raise LoadError("its structure is damaged: it is nested without end") from None
    except Exception as error:
        raise LoadError(f"its structure is damaged: {type(error).__name__}: {error}") from error


class _Decoder:
    def __init__(self, structure: dict[str, Any], read_array: ReadArray):
        self._structure = structure
        self._specs: Any = structure.get("objects")
        self._classes: Any = structure.get("classes")
        self._read_array = read_array
        self._arrays: dict[Any, Any] = {}
        self._objects: list[Any] = []
        if not isinstance(self._specs, list) or not isinstance(self._classes, dict):
            raise LoadError("its structure is damaged: it has no objects or no classes")

    def run(self) -> Any:
        self.make_shells()
        self.fill()
        return self.value(self._structure["root"])

    def make_shells(self) -> None:
        """Make every object empty, so that they can refer to each other."""
        frame, trace = local.frame, trace_ref()
        for number, spec in enumerate(self._specs):
            kind, content = _only(spec, f"object {number}")
            if kind == "ref":
                metadata = {_string(k): self.value(v) for k, v in content["metadata"]}
                collection = self.value(content["collection"])
                hash((collection, tuple(metadata.values())))
                obj: Any = make_ref(None, collection, MappingProxyType(metadata), frame, trace)
            elif kind == "module":
                obj = make_node(self._class(content["class"]), frame, trace)
            elif kind in ("list", "dict"):
                obj = [] if kind == "list" else {}
            else:
                raise Damaged(f"object {number} is a {kind!r}")
            self._objects.append(obj)

    def fill(self) -> None:
        """Give every object its content."""
        for spec, obj in zip(self._specs, self._objects, strict=True):
            kind, content = _only(spec, "an object")
            if kind == "ref":
                value = self.value(content["value"])
                check_type(value)
                obj._value = value
            elif kind == "list":
                obj.extend(map(self.value, content))
            elif kind == "dict":
                obj.update((self.value(k), self.value(v)) for k, v in content)
                if len(obj) != len(content):
                    raise Damaged("a dict has a key twice")
            else:
                self._fill_module(obj, content)

    def _fill_module(self, node: Node, content: Any) -> None:
        own = {_string(k): self.value(v) for k, v in content["attributes"]}
        for name, field in type(node)._fields.items():
            if field.is_ref and not isinstance(own.get(name), Ref | None):
                raise Damaged(f"the field {name!r} of a {type(node).__name__} holds no Ref")
        attributes(node).update(own)
        expose(node)

    def by_path(self) -> dict[tuple[str, ...], Any]:
        """The values of Refs and plain arrays by the paths that they were saved with."""
        found = {}
        for spec in self._specs:
            kind, content = _only(spec, "an object")
            if kind == "ref":
                found[tuple(map(_string, content["path"]))] = self.value(content["value"])
        for path, code in self._structure["leaves"]:
            found[tuple(map(_string, path))] = self.value(code)
        return found

    def _class(self, name: Any) -> type[Node]:
        cls = find_module_class(_string(name))
        if cls is None:
            raise LoadError(self._not_imported(name))
        then, now = self._classes.get(name), fields_of(cls)
        if then != now:
            then = then if isinstance(then, dict) else {}
            changes = [f"{f!r} is new" for f in now if f not in then]
            changes += [f"{f!r} is gone" for f in then if f not in now]
            changes += [
                f"{f!r} was {then[f]} and is {now[f]}"
                for f in now
                if f in then and then[f] != now[f]
            ]
            raise LoadError(
                f"the class {name!r} has changed since it was saved: {', '.join(changes)}. "
                f"Construct a model of the present class and read the weights with "
                f"nnx.load_state(path, into=model, strict=False)"
            )
        return cls

    def _not_imported(self, name: str) -> str:
        """The message for all classes that are not there, `name` among them."""
        others = (x for x in map(str, self._classes) if find_module_class(x) is None)
        missing = list(dict.fromkeys([name, *others]))
        text = f"it holds a {name!r}, a module class that this program has not imported"
        if len(missing) > 1:
            text = f"it holds {listed(missing)}, module classes that this program has not imported"
        script = next((x for x in missing if x.startswith("__main__.")), None)
        if script is None:
            return (
                f"{text}. Import the Python modules that define such classes before nnx.load; if a "
                f"class has moved, register it under its old name with @nnx.saveable(name={name!r})"
            )
        cls = script.rpartition(".")[2]
        return (
            f"{text}. A class of a script is called __main__ in the file: define models in a module "
            f"that both programs import. For this file, import the class at the top of the script "
            f"that loads it (from the_script import {cls}), or register it: nnx.saveable(name="
            f"{script!r})({cls}); or construct the model and use nnx.load_state(path, into=model)"
        )

    def value(self, code: Any) -> Any:
        """The value that a code stands for."""
        if code is None or type(code) in (bool, str, int, float):
            return code
        if isinstance(code, dict) and "array" in code:
            return self._array(code)
        kind, content = _only(code, "a value")
        make = _KINDS.get(kind)
        if make is None:
            raise Damaged(f"there is no kind of value named {kind!r}")
        return make(self, content)

    def _array(self, code: Any) -> Any:
        name, shape = _string(code["array"]), tuple(code["shape"])
        # One name is one array, but the two kinds of array that it may be are two objects.
        known = (name, str(sorted(code.items(), key=repr)))
        if known not in self._arrays:
            self._arrays[known] = self._new_array(name, shape, code)
        return self._arrays[known]

    def _new_array(self, name: str, shape: Any, code: Any) -> Any:
        if "key" in code:
            impl = _string(code["key"])
            like = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impl)))
            data = self._read_array(name, "uint32", (*shape, *like.shape))
            return jax.random.wrap_key_data(jnp.asarray(data), impl=impl)
        host = self._read_array(name, _string(code["dtype"]), shape)
        if code.get("numpy"):
            return host
        # Nobody else has the buffer, so the array may be made of it.
        array = jax.device_put(host, may_alias=True)
        if array.dtype != host.dtype:
            raise LoadError(
                f"the array {name!r} is {host.dtype}, which JAX would make {array.dtype}. Allow it "
                f"with jax.config.update('jax_enable_x64', True)"
            )
        return array

    def _all(self, content: Any) -> list[Any]:
        return [self.value(x) for x in content]

    def _object(self, number: Any) -> Any:
        if type(number) is not int or not 0 <= number < len(self._objects):
            raise Damaged(f"there is no object {number!r}")
        return self._objects[number]

    def _saved(self, content: Any) -> Any:
        name, value = content
        known = registered_name(_string(name))
        if known is None or not isinstance(known.obj, type):
            raise LoadError(
                f"it holds a {name!r}, a class that is not registered. Import the Python module "
                f"that registers it with nnx.saveable before nnx.load"
            )
        value = self.value(value)
        if known.load is not None:
            return known.load(value)
        names = {f.name for f in dataclasses.fields(known.obj)}
        if not isinstance(value, dict) or set(value) != names:
            raise LoadError(
                f"the class {name!r} has changed since it was saved: its fields were "
                f"{sorted(value)} and are {sorted(names)}"
            )
        made = object.__new__(known.obj)
        for field, content in value.items():
            object.__setattr__(made, field, content)
        return made

    def _named(self, name: Any) -> Any:
        found = find(_string(name))
        if found is None:
            raise LoadError(
                f"it names {name!r}, a function or class that is not registered. Import the Python "
                f"module that registers it with nnx.saveable before nnx.load"
            )
        return found

    def _namedtuple(self, content: Any) -> Any:
        name, items = content
        cls = self._named(name)
        values = self._all(items)
        fields = getattr(cls, "_fields", None)
        known = isinstance(cls, type) and issubclass(cls, tuple) and fields is not None
        if not known or len(fields or ()) != len(values):
            raise LoadError(
                f"the named tuple {name!r} has changed since it was saved: it had {len(values)} "
                f"fields and has {fields}"
            )
        return tuple.__new__(cls, values)

    def _enum(self, content: Any) -> Any:
        name, member = content
        members = getattr(self._named(name), "__members__", {})
        if member not in members:
            raise LoadError(f"the enum {name!r} has no member {member!r} any more")
        return members[member]

    def _method(self, content: Any) -> Any:
        node, name = self.value(content[0]), _string(content[1])
        found = inspect.getattr_static(type(node), name, None) if isinstance(node, Node) else None
        if not isinstance(found, types.FunctionType):
            raise LoadError(f"the class {type(node).__name__} has no method {name!r} any more")
        return types.MethodType(found, node)

    def _partial(self, content: Any, kind: Any) -> Any:
        fn, args, keywords = content
        fn = self.value(fn)
        if not callable(fn):
            raise Damaged("a partial holds no function")
        named = {_string(k): self.value(v) for k, v in keywords}
        return kind(fn, *self._all(args), **named)

    def _dict(self, content: Any, kind: Any) -> Any:
        return kind((self.value(k), self.value(v)) for k, v in content)

    def _partition(self, content: Any) -> Partition:
        return Partition([(tuple(map(_string, path)), self.value(v)) for path, v in content])


_KINDS: dict[str, Callable[[_Decoder, Any], Any]] = {
    "object": _Decoder._object,
    "float": lambda d, x: {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}[x],
    "tuple": lambda d, x: tuple(d._all(x)),
    "spec": lambda d, x: PartitionSpec(*d._all(x)),
    "namedtuple": _Decoder._namedtuple,
    "frozenset": lambda d, x: frozenset(d._all(x)),
    "complex": lambda d, x: complex(*d._all(x)),
    "bytes": lambda d, x: _data(x),
    "ellipsis": lambda d, x: ...,
    "slice": lambda d, x: slice(*d._all(x)),
    "range": lambda d, x: range(*d._all(x)),
    "dtype": lambda d, x: dtype_of(x),
    "scalar": lambda d, x: np.frombuffer(_data(x[1]), dtype_of(x[0]))[0],
    "enum": _Decoder._enum,
    "ordered": lambda d, x: d._dict(x, OrderedDict),
    "partition": _Decoder._partition,
    "partial": lambda d, x: d._partial(x, functools.partial),
    "Partial": lambda d, x: d._partial(x, jax.tree_util.Partial),
    "method": _Decoder._method,
    "class": _Decoder._class,
    "named": _Decoder._named,
    "saved": _Decoder._saved,
    "list": lambda d, x: d._all(x),
    "dict": lambda d, x: d._dict(x, dict),
}


def dtype_of(name: Any) -> np.dtype:
    """The dtype of a name that `encode.dtype_name` gave."""
    dtype = jnp.dtype(_string(name))
    if dtype.hasobject:
        raise Damaged(f"the dtype {name!r} is one of Python objects")
    return dtype


def _only(code: Any, what: str) -> tuple[str, Any]:
    if not isinstance(code, dict) or len(code) != 1:
        raise Damaged(f"{what} is {str(code)[:80]}")
    return next(iter(code.items()))


def _string(x: Any) -> str:
    if type(x) is not str:
        raise Damaged(f"{str(x)[:80]} should be a string")
    return x


def _data(x: Any) -> bytes:
    return base64.b64decode(_string(x), validate=True)
