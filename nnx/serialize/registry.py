"""The names that a file may use for functions and classes, and what they mean in this program.

A file holds names, never code. Names are looked up among things that the program has already
registered or imported. So loading a file cannot import a module, or run anything that the program
did not choose.
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
    """What `saveable` knows about a function or class."""

    name: str
    obj: Any
    save: Callable[[Any], Any] | None
    load: Callable[[Any], Any] | None


# The two are filled together. They keep the objects alive, so that an id stays unique.
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
    """Let `nnx.save` write a function, or the instances of a class, by name; `nnx.load` finds it again.

    You do not need to register modules, enums, named tuples, frozen dataclasses, or anything in
    `jax.nn`, `jax.nn.initializers`, `jax.numpy` and `jax.lax`.

    Args:
      obj: a function or a class. Instances of a dataclass are saved by their fields. Other classes
        need `save` and `load`. Register a module class to give it a name that stays valid when the
        class moves to another Python module.
      name: the name in the file. The default is `module.qualified_name`.
      save: turns an instance into a value that can be saved: numbers, strings, tuples, lists, dicts.
      load: turns that value back into an instance.

    Returns:
      `obj`, so this also works as a decorator.

    Raises:
      ValueError: another object has the name.
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
            f"{obj.__name__} is not a dataclass, so nnx.saveable does not know what its instances "
            "hold. Pass save= and load=, or make it a dataclass."
        )
    known = Saved(name or _own_name(obj), obj, save, load)
    old = _by_name.get(known.name)
    # A notebook cell that runs again defines the same thing again.
    if old is not None and old.obj is not obj and _own_name(old.obj) != _own_name(obj):
        raise ValueError(
            f"The name {known.name!r} is taken by {old.obj!r}. Pass another one: "
            f"nnx.saveable(..., name=...)."
        )
    _by_name[known.name] = _by_id[id(obj)] = known
    return obj


def registered(obj: Any) -> Saved | None:
    """The entry that `saveable` made for this object."""
    return _by_id.get(id(obj))


def registered_name(name: str) -> Saved | None:
    """The entry with this name."""
    return _by_name.get(name)


def is_config(obj: Any) -> bool:
    """Whether a class is a frozen dataclass, so that the fields describe an instance completely."""
    if not isinstance(obj, type) or issubclass(obj, Node):
        return False
    # Look in the dicts: looking up an attribute may run code.
    found = (vars(cls).get("__dataclass_params__") for cls in obj.__mro__)
    params = next((x for x in found if x is not None), None)
    return params is not None and params.frozen


def _own_name(obj: Any) -> str:
    return f"{obj.__module__}.{obj.__qualname__}"


# Functions that read or write files, or call their arguments, do not belong in a model's
# attributes.
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
    # `save` writes the first name of an object.
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
    """Objects that need no registration by name, and their names by identity."""
    if not _names:
        _load_public()
    return _names, _names_by_id


def name_of(obj: Any) -> str | None:
    """The name that a file uses for a function or a class, or None."""
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
    # nnx's own modules may move from file to file.
    return f"nnx.{cls.__name__}" if _of_nnx(cls.__name__) is cls else _own_name(cls)


def _of_nnx(name: str) -> Any:
    """The object `nnx.name`, or None. The package's dict holds only what is loaded already."""
    packages = ("nnx", "nnx.transforms", "nnx.layers", "nnx.training")
    loaded = (vars(sys.modules[p]) for p in packages if p in sys.modules)
    return next((names[name] for names in loaded if name in names), None)


def find(name: str) -> Any:
    """The object that a name means in this program, or None. Nothing is imported or run."""
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
    # Every prefix of a name may be a Python module, so a long name would take much work.
    if len(parts) > 50:
        return None
    for i in range(len(parts) - 1, 0, -1):
        module = sys.modules.get(".".join(parts[:i]))
        if module is not None:
            # Look in the dicts: looking up an attribute may import or run code.
            obj: Any = module
            if i == 1 and parts[0] == "nnx" and parts[1] not in vars(module):
                obj, i = _of_nnx(parts[1]), 2
            for part in parts[i:]:
                obj = vars(obj).get(part) if isinstance(obj, types.ModuleType | type) else None
            return obj
    return None


class Classes:
    """The module classes of this program by name, including those made inside functions.

    The newest class of a name wins. The list is built when a class is first not found in another way.
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
                # While `nnx.capture` runs, stand-in classes have the names of the originals.
                if "_stands_for" not in vars(cls):
                    latest[_public_or_own(cls)] = cls
    return latest


def _exactly(kind: Any, make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A `load` function for a `save` function that returns values of this type."""

    def load(value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError(f"{value!r:.80} is none of these: {kind}")
        return make(value)

    return load


_NONE = type(None)
saveable(type(CARRY), name="nnx.CARRY", save=lambda _: None, load=_exactly(_NONE, lambda _: CARRY))
# Filters can be attributes of modules, too.
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
