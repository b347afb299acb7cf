"""The Node: an object with an identity whose attributes are part of the tree. Modules are Nodes."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import numpy as np
from jax.core import Tracer

from refx.errors import StructureError, ValueTypeError
from refx.ref import Ref
from refx.trace import check_structure, check_value, local, trace_ref

__all__ = ["Node"]


class _HasDict:
    pass


_own_dict = _HasDict.__dict__["__dict__"].__get__

# Bumped when a change happened that comparing two dicts does not show; see `Node.__setattr__`.
epoch = [0]

_NUMBERS = (bool, int, float, complex)
_ARRAYS = (jax.Array, np.ndarray, np.generic, *_NUMBERS)


class Node(_HasDict):
    """An object whose attributes are part of the tree that `split` takes apart.

    Ref and array attributes are values, other Nodes and plain lists, tuples, dicts and registered
    pytrees are structure, and everything else is static. Attributes may be set, changed and
    deleted at any time, except where the change could not reach anybody.

    >>> import refx
    >>> class Counter(refx.Node):
    ...     def __init__(self):
    ...         self.count = refx.Ref(0, "counters")
    >>> counter = Counter()
    >>> dagdef, partition = refx.split(counter)
    >>> partition["count"]
    0
    """

    # `_dict` is the dict of the attributes, where it is found faster than by its own name.
    __slots__ = ("_dict", "_exposed", "_frame", "_snapshot", "_trace")

    _is_node: ClassVar[bool] = True
    # The fields of the class by name, and those of them that need a value before `__init__` runs.
    _fields: ClassVar[dict[str, Any]] = {}
    _defaults: ClassVar[tuple[Any, ...]] = ()

    _dict: dict[str, Any]
    _frame: Any
    _trace: Any
    _snapshot: Any
    _exposed: bool

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        node = make(cls, local.frame, trace_ref())
        for field in cls._defaults:
            if field.is_ref:
                field.__set__(node, field.make_default())
            else:
                attributes(node)[field.name] = field.make_default()
        return node

    def __init_subclass__(cls, *, hidden_slots: bool = False, **kwargs: Any) -> None:
        # `hidden_slots` is for what a class of ours keeps beside the structure, as a cache.
        super().__init_subclass__(**kwargs)
        slots = vars(cls).get("__slots__")
        if slots and not hidden_slots:
            raise TypeError(
                f"{cls.__name__} has __slots__ = {slots!r}, but what is in a slot is no part of the "
                f"tree: split, clone, nnx.grad and nnx.jit would pass over it. Leave out __slots__ "
                f"(and slots=True of a dataclass); modules keep their attributes in a dict."
            )
        fields: dict[str, Any] = {}
        for base in reversed(cls.__mro__):
            for name, value in vars(base).items():
                if hasattr(value, "is_field"):
                    fields[name] = value
                else:
                    fields.pop(name, None)
        cls._fields = fields
        cls._defaults = tuple(f for f in fields.values() if f.has_default)
        from refx.pytree import register  # it is built on this file

        register(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(type(value), "is_field"):
            raise _field_in_instance(self, name, value)
        field = type(self)._fields.get(name)
        if field is not None and field.is_ref:
            field.__set__(self, value)
            return
        check_structure(self, f"Attribute {name!r}")
        if isinstance(value, Tracer):
            check_value(None, value)
        if name == "__class__":
            raise StructureError(
                f"The class of a {type(self).__name__} cannot be assigned: compiled programs know "
                f"the module by it. Make a module of the other class, give it the Refs of this one "
                f"(nnx.get_ref), and put it in this one's place."
            )
        if name in _SLOTS:
            raise StructureError(f"The attribute name {name!r} is taken by refx; choose another.")
        old = attributes(self).get(name)
        if type(old) is Ref and isinstance(value, _ARRAYS):
            raise StructureError(
                f"Attribute {name!r} of a {type(self).__name__} is a Ref, which an array cannot "
                f"replace unnoticed: write self.{name}.value = ... to give it a value. To have a "
                f"plain attribute instead, `del self.{name}` first."
            )
        if _may_deceive(old, value):
            expose(self)
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        check_structure(self, f"Attribute {name!r}")
        # The same name may come back in another place, with a number that is equal to this one.
        expose(self)
        field = type(self)._fields.get(name)
        if field is not None:
            field.__delete__(self)
        else:
            object.__delattr__(self, name)

    @property
    def __dict__(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        # Whoever holds this dict can change it in ways that only an item-by-item comparison sees.
        if not self._exposed:
            expose(self)
        return attributes(self)

    def __getstate__(self) -> dict[str, Any]:
        return dict(attributes(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        attributes(self).update(state)
        expose(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (type(self),), self.__getstate__()


def _field_in_instance(node: Node, name: str, field: Any) -> ValueTypeError:
    cls = type(node).__name__
    if not field.is_ref:
        return ValueTypeError(
            f"Attribute {name!r} of a {cls} was assigned a field. A static field is declared in the "
            f"class body; in a method, assign the value itself: self.{name} = ..."
        )
    collection = field.collection
    how = "nnx.param()" if collection == "params" else f"nnx.ref({collection!r})"
    return ValueTypeError(
        f"Attribute {name!r} of a {cls} was assigned a field and not a value. Declare it in the "
        f"class body: `{name}: jax.Array = {how}`, and in __init__ assign the array: self.{name} = "
        f"... For a Ref without a field, assign nnx.Ref(value, {collection!r})."
    )


def _may_deceive(old: Any, new: Any) -> bool:
    # 2 and 2.0 and an array of 2, 0.0 and -0.0: equal, but they compute differently.
    return (
        isinstance(old, _NUMBERS)
        and old is not new
        and (type(new) is not type(old) or isinstance(old, float | complex))
    )


def expose_numbers(node: Node, before: dict[str, Any]) -> None:
    """Expose a Node whose attributes were filled again, if a number became one that may be equal."""
    now = attributes(node)
    if any(name in now and _may_deceive(old, now[name]) for name, old in before.items()):
        expose(node)


_SLOTS = frozenset(Node.__slots__)


def make(cls: type, frame: Any, trace: Any, _new: Any = object.__new__) -> Any:
    """A Node without attributes, at a given level: `__init__` has not run and will not."""
    node = _new(cls)
    _set_dict(node, _own_dict(node))
    _set_frame(node, frame)
    _set_trace(node, trace)
    _set_snapshot(node, None)
    _set_exposed(node, False)
    return node


def _blank(cls: type) -> Any:
    return make(cls, local.frame, trace_ref())


attributes: Callable[[Node], dict[str, Any]] = Node._dict.__get__  # pyright: ignore
"""`attributes(node)` is the live dict of a Node's attributes; `vars(node)` also takes note of it."""

_set_dict = Node._dict.__set__  # pyright: ignore
_set_frame = Node._frame.__set__
_set_trace = Node._trace.__set__
_set_exposed = Node._exposed.__set__  # pyright: ignore
_set_snapshot = Node._snapshot.__set__
set_snapshot = _set_snapshot


def expose(node: Node) -> None:
    """Have every tree that holds `node` compare it item by item from now on."""
    _set_exposed(node, True)
    epoch[0] += 1


def is_identity(x: Any) -> bool:
    """Whether `x` is a Ref or a Node: a thing with an identity that a pytree walk must not enter."""
    return isinstance(x, (Ref, Node))


def _flatten_method(method: types.MethodType) -> tuple[tuple[Any, ...], Any]:
    if isinstance(method.__self__, Node):
        return (method.__self__,), method.__func__
    return (), method


def _unflatten_method(aux: Any, children: Any) -> Any:
    return types.MethodType(aux, children[0]) if children else aux


# A bound method of a module is a value like the module itself, so `jax.jit(f)(model.encode)` works.
jax.tree_util.register_pytree_with_keys(
    types.MethodType,
    lambda method: (
        tuple((jax.tree_util.GetAttrKey("__self__"), x) for x in _flatten_method(method)[0]),
        _flatten_method(method)[1],
    ),
    _unflatten_method,
    _flatten_method,
)
