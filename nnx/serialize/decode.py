"""The inverse of `encode.py`: rebuilds the tree from JSON and named arrays.

The JSON is not trusted: anybody may have written it. So all of it is checked against the grammar
first. Objects are made without calling their classes. Nothing is returned unless everything was
understood.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import functools
import operator
import types
from collections import OrderedDict
from collections.abc import Callable, Collection
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from nnx._layer_names import method_of
from nnx.serialize.classes import fields_of, why_not
from nnx.serialize.dtypes import dtype_of, has_bad_bits
from nnx.serialize.errors import LoadError
from nnx.serialize.grammar import Check, Damaged, check, check_distinct, check_header, clip, kind_of
from nnx.serialize.paths import check_paths
from nnx.serialize.registry import Classes, find, is_config, registered_name
from refx import Node, Partition, Ref
from refx.access import leaves_of
from refx.frame import local
from refx.node import attributes, tell
from refx.node import make as make_node
from refx.partition import Path, listed
from refx.ref import make as make_ref
from refx.text import a_kind
from refx.trace import trace_ref
from refx.walk import walk

__all__: list[str] = []

NewArray = Callable[[str, Any], Any]


def decode(structure: Any, names: Collection[str], new_array: NewArray) -> Any:
    """Build the tree that a structure describes.

    Args:
      structure: the parsed JSON.
      names: the names of the available arrays.
      new_array: takes a name and the structure's description of the array; returns the array or
        raises a LoadError.

    Raises:
      LoadError: the message does not yet name the file.
    """
    check_header(structure)
    return guarded(lambda: _Decoder(structure, new_array).tree(names))


def decode_state(structure: Any, names: Collection[str], new_array: NewArray) -> dict[Path, Any]:
    """The values by path: those of the saved Refs or, if a Partition was saved, its values.

    It does not need the classes of the modules, so it can also read files whose classes have
    changed. Arguments and errors are those of `decode`.
    """
    check_header(structure)
    return guarded(lambda: _Decoder(structure, new_array).by_path(names))


def guarded(make: Callable[[], Any]) -> Any:
    """Call a function, and turn whatever it raises into a LoadError."""
    try:
        return make()
    except LoadError:
        raise
    except Damaged as error:
        raise LoadError(f"its structure is damaged: {error}") from None
    except RecursionError:
        raise LoadError("its structure is damaged: it is nested without end") from None
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise LoadError(f"its structure is damaged: {text:.300}") from error


class _Decoder:
    def __init__(self, structure: dict[str, Any], new_array: NewArray):
        self._facts: Check = check(structure)
        self._structure = structure
        self._specs = [kind_of(spec, "an object") for spec in structure["objects"]]
        self._new_array = new_array
        self._arrays: dict[str, Any] = {}
        self._objects: list[Any] = []
        self._known_classes = Classes()
        self._checked: dict[str, type[Node]] = {}

    def tree(self, names: Collection[str]) -> Any:
        """The whole tree."""
        self._make_shells(lambda kind: True)
        self._fill()
        tree = self.value(self._structure["root"])
        self._check_used(names)
        # No program could have saved a tree that a walk cannot enter.
        found = walk(tree)
        paths = {
            id(obj): spec["path"]
            for obj, (kind, spec) in zip(self._objects, self._specs, strict=True)
            if kind == "ref"
        }
        leaves = [(path, self.value(code)) for path, code in self._structure["leaves"]]
        check_paths(found, paths, leaves)
        return tree

    def by_path(self, names: Collection[str]) -> dict[Path, Any]:
        """The values of Refs and plain arrays, by their paths when they were saved."""
        self._check_used(names)
        root = self._structure["root"]
        if isinstance(root, dict) and "partition" in root:
            # In older files, lists and dicts in a Partition are objects.
            self._make_shells(lambda kind: kind in ("list", "dict"))
            self._fill()
            return dict(self.value(root))
        specs = [spec for kind, spec in self._specs if kind == "ref"]
        codes = [(spec["path"], spec["value"]) for spec in specs] + self._structure["leaves"]
        check_distinct([tuple(path) for path, _ in codes], "the list of its paths")
        return {tuple(path): self.value(code) for path, code in codes}

    def _make_shells(self, wanted: Callable[[str], bool]) -> None:
        """Make every object, still empty, so that objects can refer to each other."""
        frame, trace = local.frame, trace_ref()
        for kind, content in self._specs:
            if not wanted(kind):
                obj: Any = None
            elif kind == "ref":
                metadata = dict(self._pairs(content["metadata"], "the metadata of a Ref"))
                collection = self.value(content["collection"])
                hash((collection, tuple(metadata.values())))
                obj = make_ref(None, collection, MappingProxyType(metadata), frame, trace)
            elif kind == "module":
                obj = make_node(self._class(content["class"]), frame, trace)
            else:
                obj = [] if kind == "list" else {}
            self._objects.append(obj)

    def _fill(self) -> None:
        """Fill every object."""
        for (kind, content), obj in zip(self._specs, self._objects, strict=True):
            if obj is None:
                continue
            if kind == "ref":
                value = self.value(content["value"])
                leaves_of(value)
                obj._value = value
            elif kind == "list":
                obj.extend(map(self.value, content))
            elif kind == "dict":
                obj.update(self._pairs(content, "a dict"))
            else:
                self._fill_module(obj, content)

    def _fill_module(self, node: Node, content: Any) -> None:
        cls = type(node)
        own = dict(self._pairs(content["attributes"], a_kind(cls)))
        for name, value in own.items():
            reason = why_not(cls, name)
            if reason is not None:
                raise Damaged(f"{a_kind(cls)} has the attribute {clip(name)}, {reason}")
            field = cls._fields.get(name)
            if field is not None and field.is_ref and not isinstance(value, Ref | None):
                raise Damaged(f"the field {name!r} of {a_kind(cls)} does not hold a Ref")
        attributes(node).update(own)
        tell(node)

    def _pairs(self, content: Any, what: str) -> list[tuple[Any, Any]]:
        pairs = [(self.value(k), self.value(v)) for k, v in content]
        check_distinct([k for k, _ in pairs], what)
        return pairs

    def _check_used(self, names: Collection[str]) -> None:
        self._facts.check_used()
        given = set(names)
        for name in sorted(given - self._facts.arrays.keys()):
            raise Damaged(f"nothing refers to its array {clip(name)}")
        for name in sorted(self._facts.arrays.keys() - given):
            raise LoadError(f"its array {clip(name)} is missing")

    def _class(self, name: str) -> type[Node]:
        if name not in self._checked:
            self._checked[name] = self._find_class(name)
        return self._checked[name]

    def _find_class(self, name: str) -> type[Node]:
        cls = self._known_classes.find(name)
        if cls is None:
            raise LoadError(self._not_imported(name))
        then, now = self._structure["classes"].get(name), fields_of(cls)
        if then != now:
            then = then or {}
            changes = [f"{f!r} is new" for f in now if f not in then]
            changes += [f"{clip(f)} is gone" for f in then if f not in now]
            changes += [
                f"{f!r} was {then[f]:.80} and is now {now[f]}"
                for f in now
                if f in then and then[f] != now[f]
            ]
            raise LoadError(
                f"the class {name!r} has changed since it was saved: {', '.join(changes[:8])}. "
                "Construct a model of the current class and read the weights with "
                "nnx.load_state(path, into=model, strict=False)"
            )
        return cls

    def _not_imported(self, name: str) -> str:
        """The error for all missing classes, `name` among them."""
        # A file may name any number of classes. It is enough to list the first ones.
        others = list(self._structure["classes"])[:100]
        others = [x for x in others if self._known_classes.find(x) is None]
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
            f"{text}. Classes of a script have the name __main__ in a file, so define models in a "
            "module that both programs import. For this file, import the class at the top of the "
            f"script that loads it (from the_script import {cls}), or register it: "
            f"nnx.saveable(name={script!r})({cls}); or construct the model and use "
            "nnx.load_state(path, into=model)"
        )

    def value(self, code: Any) -> Any:
        """The value that a code stands for."""
        if code is None or type(code) in (bool, str, int, float):
            return code
        if "array" in code:
            return self._array(code)
        kind, content = kind_of(code, "a value")
        return _KINDS[kind](self, content)

    def _array(self, code: Any) -> Any:
        name = code["array"]
        if name not in self._arrays:
            self._arrays[name] = self._new_array(name, code)
        return self._arrays[name]

    def _all(self, content: Any) -> list[Any]:
        return [self.value(x) for x in content]

    def _object(self, number: int) -> Any:
        if self._objects[number] is None:
            raise Damaged(f"a Partition holds its object {number}, which is not a value")
        return self._objects[number]

    def _saved(self, content: Any) -> Any:
        name, value = content
        known = registered_name(name)
        cls = find(name) if known is None else known.obj
        if not isinstance(cls, type) or (known is None and not is_config(cls)):
            raise LoadError(
                f"it holds a {name!r}, a class that is not registered. Import the Python module "
                f"that defines it, or registers it with nnx.saveable, before nnx.load"
            )
        value = self.value(value)
        if known is not None and known.load is not None:
            return known.load(value)
        names = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(value, dict) or set(value) != names:
            raise LoadError(
                f"the class {name!r} has changed since it was saved: its fields were "
                f"{sorted(map(str, value))} and are now {sorted(names)}"
            )
        # Do not run __init__ or __post_init__: a file never causes a call.
        made = object.__new__(cls)
        for field, content in value.items():
            object.__setattr__(made, field, content)
        return made

    def _named(self, name: str) -> Any:
        found = find(name)
        if found is None:
            raise LoadError(
                f"it names {name!r}, a function or class that is not registered. Import the Python "
                f"module that registers it with nnx.saveable before nnx.load"
            )
        if isinstance(found, type) and issubclass(found, Node):
            raise Damaged(f"it uses the module class {name!r} as if it were not a module class")
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
                f"fields and now has {fields}"
            )
        return tuple.__new__(cls, values)

    def _enum(self, content: Any) -> Any:
        name, member = content
        cls = self._named(name)
        members = getattr(cls, "__members__", {})
        parts = [member] if member in members else member.split("|")
        is_flag = isinstance(cls, type) and issubclass(cls, enum.Flag)
        if any(part not in members for part in parts) or (len(parts) > 1 and not is_flag):
            raise LoadError(f"the enum {name!r} no longer has the member {clip(member)}")
        return functools.reduce(operator.or_, (members[part] for part in parts))

    def _method(self, content: Any) -> Any:
        node, name = self.value(content[0]), content[1]
        found = method_of(type(node), name)
        if not isinstance(found, types.FunctionType):
            raise LoadError(f"the class {type(node).__name__} no longer has the method {name!r}")
        return types.MethodType(found, node)

    def _partial(self, content: Any, kind: Any) -> Any:
        fn, args, keywords = content
        fn = self.value(fn)
        if not callable(fn):
            raise Damaged("a partial does not hold a function")
        return kind(fn, *self._all(args), **dict(self._pairs(keywords, "a partial")))

    def _frozenset(self, content: Any) -> frozenset[Any]:
        items = self._all(content)
        check_distinct(items, "a frozenset")
        if content != sorted(content, key=repr):
            raise Damaged("the items of a frozenset are not in the order in which save writes them")
        return frozenset(items)

    def _scalar(self, content: Any) -> Any:
        dtype, data = dtype_of(content[0]), _data(content[1])
        if dtype.itemsize != len(data):
            raise Damaged(f"a number of the dtype {dtype} has {len(data)} bytes")
        number = np.frombuffer(data, dtype)
        if has_bad_bits(number):
            raise Damaged(f"a number has bits that are not a valid {dtype}")
        return number[0]

    def _partition(self, content: Any) -> Partition:
        pairs = [(tuple(path), self.value(v)) for path, v in content]
        check_distinct([path for path, _ in pairs], "a Partition")
        return Partition(pairs)


_KINDS: dict[str, Callable[[_Decoder, Any], Any]] = {
    "object": _Decoder._object,
    "float": lambda d, x: float(x),
    "tuple": lambda d, x: tuple(d._all(x)),
    "spec": lambda d, x: PartitionSpec(*d._all(x)),
    "namedtuple": _Decoder._namedtuple,
    "frozenset": _Decoder._frozenset,
    "complex": lambda d, x: complex(*d._all(x)),
    "bytes": lambda d, x: _data(x),
    "ellipsis": lambda d, x: ...,
    "slice": lambda d, x: slice(*d._all(x)),
    "range": lambda d, x: range(*x),
    "dtype": lambda d, x: dtype_of(x),
    "scalar": _Decoder._scalar,
    "enum": _Decoder._enum,
    "ordered": lambda d, x: OrderedDict(d._pairs(x, "an OrderedDict")),
    "partition": _Decoder._partition,
    "partial": lambda d, x: d._partial(x, functools.partial),
    "Partial": lambda d, x: d._partial(x, jax.tree_util.Partial),
    "method": _Decoder._method,
    "class": _Decoder._class,
    "named": _Decoder._named,
    "saved": _Decoder._saved,
    "list": lambda d, x: d._all(x),
    "dict": lambda d, x: dict(d._pairs(x, "a dict")),
}


def _data(x: str) -> bytes:
    data = base64.b64decode(x, validate=True)
    if base64.b64encode(data).decode() != x:
        raise Damaged(f"{clip(x)} is not valid base64")
    return data
