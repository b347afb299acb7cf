"""The names that a file may use for functions and classes, and what each of them stands for here.

A file holds names, never code. A name is looked up among what the program has registered or imported
already, so loading a file cannot import a module or run anything that the program did not choose.
"""

from __future__ import annotations

import dataclasses
import enum
import operator
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nnx.transforms.carry import CARRY
from refx import All, InModule, Node, Not, OfType, PathContains, PathMatches
from refx import Any as Any_

__all__ = ["saveable"]

T = TypeVar("T")


class Saved(NamedTuple):
    """What `saveable` knows of one function or class."""

    name: str
    obj: Any
    save: Callable[[Any], Any] | None
    load: Callable[[Any], Any] | None


# Both are filled together. The objects are kept alive, so that an id means one object.
_by_name: dict[str, Saved] = {}
_by_id: dict[int, Saved] = {}


@overload
def saveable(obj: T, *, name: str | None = None, save: Any = None, load: Any = None) -> T: ...
@overload
def saveable(
    obj: None = None, *, name: str | None = None, save: Any = None, load: Any = None
) -> Callable[[T], T]: ...
def saveable(
    obj: Any = None,
    *,
    name: str | None = None,
    save: Callable[[Any], Any] | None = None,
    load: Callable[[Any], Any] | None = None,
) -> Any:
    """Let `nnx.save` write a function or the instances of a class by name, and `nnx.load` find it.

    Modules, enums, named tuples, frozen dataclasses and what is in `jax.nn`, `jax.nn.initializers`,
    `jax.numpy` and `jax.lax` need no registration.

    Args:
      obj: a function, or a class. Instances of a dataclass are saved by their fields; those of
        another class need `save` and `load`. A module class may be registered to give it a name
        that stays when the class moves to another Python module.
      name: what the file calls it; `module.qualified_name` without it.
      save: makes of an instance a value that can be saved: numbers, strings, tuples, lists, dicts.
      load: makes the instance again of that value.

    Returns:
      `obj`, so that this can be a decorator.

    Raises:
      ValueError: the name is taken by another object.
      TypeError: instances of the class cannot be saved without `save` and `load`.

    >>> import nnx
    >>> @nnx.saveable
    ... def double(x):
    ...     return 2 * x
    """
    if obj is None:
        return lambda obj: saveable(obj, name=name, save=save, load=load)
    if not callable(obj):
        raise TypeError(f"nnx.saveable takes a function or a class, but got {obj!r}.")
    if (save is None) != (load is None):
        raise TypeError("nnx.saveable needs both save= and load=, or neither.")
    plain = isinstance(obj, type) and not (
        dataclasses.is_dataclass(obj) or issubclass(obj, Node | enum.Enum | tuple)
    )
    if plain and save is None:
        raise TypeError(
            f"{obj.__name__} is no dataclass, so nnx.saveable does not know what its instances "
            f"hold. Pass save= and load=, or make it a dataclass."
        )
    known = Saved(name or _own_name(obj), obj, save, load)
    old = _by_name.get(known.name)
    # A notebook cell that runs again defines the same thing anew.
    if old is not None and old.obj is not obj and _own_name(old.obj) != _own_name(obj):
        raise ValueError(
            f"The name {known.name!r} is taken by {old.obj!r}. Pass another one: "
            f"nnx.saveable(..., name=...)."
        )
    _by_name[known.name] = _by_id[id(obj)] = known
    return obj


def registered(obj: Any) -> Saved | None:
    """What `saveable` was told about this object."""
    return _by_id.get(id(obj))


def registered_name(name: str) -> Saved | None:
    """What is registered by this name."""
    return _by_name.get(name)


def is_config(obj: Any) -> bool:
    """Whether it is a class of frozen dataclasses, whose instances are what their fields say."""
    if not isinstance(obj, type) or issubclass(obj, Node):
        return False
    # Through the dicts: looking an attribute up may run something.
    found = (vars(cls).get("__dataclass_params__") for cls in obj.__mro__)
    params = next((x for x in found if x is not None), None)
    return params is not None and params.frozen


def _own_name(obj: Any) -> str:
    return f"{obj.__module__}.{obj.__qualname__}"


# What reads or writes files, or calls what it is given, has no place in a model's attributes.
_NOT_NAMED = frozenset(
    {
        *("load", "save", "savez", "fromfile", "frombuffer", "from_dlpack", "frompyfunc"),
        *("fromfunction", "fromiter", "fromstring", "vectorize", "apply_along_axis"),
        *("apply_over_axes", "printoptions", "set_printoptions"),
    }
)


def _public(module: Any, prefix: str) -> dict[str, Any]:
    return {
        f"{prefix}.{name}": obj
        for name, obj in vars(module).items()
        if not name.startswith("_") and callable(obj) and name not in _NOT_NAMED
    }


_names: dict[str, Any] = {}
_names_by_id: dict[int, str] = {}


def _load_public() -> None:
    # The first name of an object is the one that is written.
    found = {
        **_public(jax.nn.initializers, "jax.nn.initializers"),
        **_public(jax.nn, "jax.nn"),
        **_public(jnp, "jax.numpy"),
        **_public(lax, "jax.lax"),
        **_public(jax.checkpoint_policies, "jax.checkpoint_policies"),
        **{f"builtins.{t.__name__}": t for t in (bool, int, float, complex, str, bytes)},
        **{"jax.Array": jax.Array, "numpy.ndarray": np.ndarray},
        **{f"numpy.{t.__name__}": t for t in np.generic.__subclasses__()},
        **{f"numpy.{name}": t for name, t in np.sctypeDict.items() if isinstance(name, str)},
    }
    for name, obj in found.items():
        _names_by_id.setdefault(id(obj), name)
    _names.update(found)


def public_names() -> tuple[dict[str, Any], dict[int, str]]:
    """What needs no registration, by name, and the names by identity."""
    if not _names:
        _load_public()
    return _names, _names_by_id


def name_of(obj: Any) -> str | None:
    """The name that a file uses for a function or a class, or None if it has none."""
    known = registered(obj)
    if known is not None:
        return known.name
    name = public_names()[1].get(id(obj))
    if name is not None:
        return name
    if not isinstance(obj, type | types.FunctionType):
        return None
    if isinstance(obj, type) and issubclass(obj, Node):
        return _public_or_own(obj)
    name = _own_name(obj)
    return name if find(name) is obj else None


def _public_or_own(cls: type) -> str:
    # Our own modules may move from file to file.
    return f"nnx.{cls.__name__}" if _of_nnx(cls.__name__) is cls else _own_name(cls)


def _of_nnx(name: str) -> Any:
    """What `nnx.name` is, or None. Only what the package has loaded already is in its own dict."""
    packages = ("nnx", "nnx.transforms", "nnx.layers", "nnx.training")
    loaded = (vars(sys.modules[p]) for p in packages if p in sys.modules)
    return next((names[name] for names in loaded if name in names), None)


def find(name: str) -> Any:
    """What a name stands for in this program, or None. Nothing is imported and nothing is run."""
    known = registered_name(name)
    if known is not None:
        return known.obj
    if name in public_names()[0]:
        return public_names()[0][name]
    obj = _walk(name)
    if isinstance(obj, type) and (issubclass(obj, Node | enum.Enum | tuple) or is_config(obj)):
        return obj
    if isinstance(obj, types.FunctionType) and obj.__module__.startswith("nnx.layers."):
        return obj
    return None


def _walk(name: str) -> Any:
    parts = name.split(".")
    # Every beginning of a name may be that of a Python module, so a long one would be much work.
    if len(parts) > 50:
        return None
    for i in range(len(parts) - 1, 0, -1):
        module = sys.modules.get(".".join(parts[:i]))
        if module is not None:
            # Through the dicts: looking an attribute up may import or run something.
            obj: Any = module
            if i == 1 and parts[0] == "nnx" and parts[1] not in vars(module):
                obj, i = _of_nnx(parts[1]), 2
            for part in parts[i:]:
                obj = vars(obj).get(part) if isinstance(obj, types.ModuleType | type) else None
            return obj
    return None


class Classes:
    """The module classes of this program by name, those that were made in functions included.

    The latest of a name wins. It is as of the first one that was not found otherwise.
    """

    def __init__(self) -> None:
        self._local: dict[str, type[Node]] | None = None

    def find(self, name: str) -> type[Node] | None:
        """The class of this name, or None."""
        found = find(name)
        if isinstance(found, type) and issubclass(found, Node):
            return found
        if self._local is None:
            self._local = _local_classes()
        return self._local.get(name)


def _local_classes() -> dict[str, type[Node]]:
    todo: list[type[Node]] = [Node]
    latest: dict[str, type[Node]] = {}
    seen: set[type] = set()
    while todo:
        for cls in todo.pop().__subclasses__():
            if cls not in seen:
                seen.add(cls)
                todo.append(cls)
                # A class that stands for another one while `nnx.capture` runs has its name.
                if "_stands_for" not in vars(cls):
                    latest[_public_or_own(cls)] = cls
    return latest


def _exactly(kind: Any, make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A `load` for what `save` has made a value of this type of."""

    def load(value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError(f"{value!r:.80} is none of these: {kind}")
        return make(value)

    return load


_NONE = type(None)
saveable(type(CARRY), name="nnx.CARRY", save=lambda _: None, load=_exactly(_NONE, lambda _: CARRY))
# Filters are attributes of modules too.
for _kind, _name in (
    (PathContains, "part"),
    (PathMatches, "glob"),
    (OfType, "kind"),
    (InModule, "kind"),
):
    saveable(
        _kind,
        name=f"refx.{_kind.__name__}",
        save=operator.attrgetter(_name),
        load=_exactly(type | tuple if _name == "kind" else str, _kind),
    )
for _kind in (All, Any_, Not):
    saveable(
        _kind,
        name=f"refx.{_kind.__name__}",
        save=lambda f: f.filters,
        load=_exactly(tuple, lambda filters, kind=_kind: kind(*filters)),
    )
