"""The Node: an object with an identity whose attributes are part of the tree. Modules are Nodes."""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import jax
import numpy as np
from jax.core import Tracer

from refx.access import VALUES, check_structure, check_value
from refx.access import is_identity as is_identity
from refx.errors import StructureError, ValueTypeError
from refx.frame import local, note_made
from refx.ref import Ref
from refx.static import SIMPLE, WITH_IDENTITY, Static
from refx.text import ALTERNATIVES, ours
from refx.trace import trace_ref

__all__ = ["Node"]


class _HasDict:
    pass


_own_dict = _HasDict.__dict__["__dict__"].__get__

# Counts the changes of classes of Nodes. After a change, every structure is checked again.
class_changes = [0]


class Book:
    """The records of a Node about itself, apart from its attributes.

    `snapshot` is the remembered structure of the tree below it. `watchers` are weak references to all
    snapshots that this Node is part of; it tells them when it changes. `exposed` means that the dict of
    its attributes was handed out, so it can change without telling. `marks` are the names of attributes
    that are leaves whatever they hold (see `mark` in build.py).
    """

    __slots__ = ("_limit", "exposed", "marks", "snapshot", "watchers")

    def __init__(self) -> None:
        self.snapshot: Any = None
        self.watchers: list[weakref.ref[Any]] = []
        self.exposed = False
        self.marks: dict[Any, Any] | None = None
        self._limit = 8

    def watch(self, watcher: weakref.ref[Any]) -> None:
        """Register a snapshot to be told of changes."""
        if len(self.watchers) >= self._limit:
            self.watchers = [w for w in self.watchers if w() is not None]
            self._limit = 2 * len(self.watchers) + 8
        self.watchers.append(watcher)

    def tell(self) -> None:
        """Tell the snapshots that the Node has changed, which makes them invalid."""
        watchers, self.watchers = self.watchers, []
        for watcher in watchers:
            snapshot = watcher()
            if snapshot is not None:
                snapshot.stands = False


if TYPE_CHECKING:
    from abc import ABCMeta as _Meta
else:
    # So that a class may inherit from Node and from a Protocol or an ABC.
    _Meta = type(Protocol)


class NodeType(_Meta):
    """The class of Node classes. It counts the changes of each class, since each needs a new program."""

    _revision: int

    # ABC's versions are slow, and Nodes do not use its registry.
    __instancecheck__ = type.__instancecheck__
    __subclasscheck__ = type.__subclasscheck__

    def __setattr__(cls, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name not in _NO_BEHAVIOUR:
            _class_changed(cls)

    def __delattr__(cls, name: str) -> None:
        super().__delattr__(name)
        _class_changed(cls)


# Python sets these while it creates a class.
_NO_BEHAVIOUR = frozenset(
    {"__abstractmethods__", "__annotations__", "__doc__", "__match_args__", "__module__"}
    | {"__orig_bases__", "__parameters__", "__protocol_attrs__", "__qualname__"}
)


def _class_changed(cls: type) -> None:
    """Count a change of a class. It also counts for all classes that inherit from it."""
    todo = [cls]
    while todo:
        at = todo.pop()
        set_on_class(at, "_revision", at._revision + 1)  # pyright: ignore
        todo += type.__subclasses__(at)
    class_changes[0] += 1


set_on_class: Callable[[type, str, Any], None] = type.__setattr__
"""`set_on_class(cls, name, value)` sets an attribute of ours on a class. This is not a change of it."""


on_subclass: list[Callable[[type], None]] = []
"""These are called with each new class of Nodes, for example to register it with JAX."""


class Node(_HasDict, metaclass=NodeType):
    """An object whose attributes are part of the tree that `split` takes apart.

    Ref and array attributes are values. Other Nodes, plain lists, tuples, dicts and registered pytrees
    are structure. Everything else is static. You may set, change and delete attributes at any time,
    unless the change would be lost.

    >>> import refx
    >>> class Counter(refx.Node):
    ...     def __init__(self):
    ...         self.count = refx.Ref(0, "counters")
    >>> counter = Counter()
    >>> dagdef, partition = refx.split(counter)
    >>> partition["count"]
    0
    """

    # `_dict` is the dict of the attributes: a slot is faster than `__dict__`.
    __slots__ = ("_book", "_dict", "_frame", "_trace")

    _revision: ClassVar[int] = 0
    # The fields of the class by name, and the fields that need a value before `__init__` runs.
    _fields: ClassVar[dict[str, Any]] = {}
    _defaults: ClassVar[tuple[Any, ...]] = ()

    _dict: dict[str, Any]
    _frame: Any
    _trace: Any
    _book: Book | None

    if not TYPE_CHECKING:
        # Type checkers take the signature from `__init__`.
        def __new__(cls, *args, **kwargs):
            node = make(cls, local.frame, trace_ref())
            for field in cls._defaults:
                if field.is_ref:
                    field.__set__(node, field.make_default())
                else:
                    attributes(node)[field.name] = field.make_default()
            return node

    def __init_subclass__(cls, *, hidden_slots: bool = False, **kwargs: Any) -> None:
        # `hidden_slots` is for classes of ours that keep something beside the structure, such as a cache.
        super().__init_subclass__(**kwargs)
        slots = vars(cls).get("__slots__")
        if slots and not hidden_slots:
            raise TypeError(
                f"{cls.__name__} has __slots__ = {slots!r}, but the content of a slot is not part of the "
                f"tree: split, clone{ALTERNATIVES['would pass over it']} would miss it. Leave out "
                f"__slots__ (and slots=True of a dataclass): modules keep their attributes in a dict."
            )
        fields: dict[str, Any] = {}
        for base in reversed(cls.__mro__):
            for name, value in vars(base).items():
                if hasattr(value, "is_field"):
                    fields[name] = value
                else:
                    fields.pop(name, None)
        set_on_class(cls, "_fields", fields)
        set_on_class(cls, "_defaults", tuple(f for f in fields.values() if f.has_default))
        WITH_IDENTITY.add(cls)
        for register in on_subclass:
            register(cls)

    def _setattr(self, name: str, value: Any) -> None:
        if hasattr(type(value), "is_field"):
            raise _field_in_instance(self, name, value)
        field = type(self)._fields.get(name)
        if field is not None and field.is_ref:
            field.__set__(self, value)
            return
        if name == "__orig_class__":
            # `G[int]()` stores its alias here, and ignores an AttributeError. As an attribute it would
            # make the structure of `G[int]()` differ from that of `G()`.
            raise AttributeError(f"{type(self).__name__} does not keep {name}.")
        check_structure(self, f"Attribute {name!r}")
        if isinstance(value, Tracer):
            check_value(None, value)
        if name == "__class__":
            raise StructureError(
                f"The class of a {type(self).__name__} cannot be assigned, because compiled programs "
                f"depend on it. Make a module of the other class, give it the Refs of this one "
                f"({ours('get_ref')}), and put it in this one's place."
            )
        if name in _SLOTS:
            raise StructureError(
                f"refx uses the attribute name {name!r} itself. Choose another name."
            )
        old = attributes(self).get(name, _NOTHING)
        if type(old) is Ref and isinstance(value, VALUES):
            raise StructureError(
                f"Attribute {name!r} of a {type(self).__name__} is a Ref, so you cannot assign an array "
                f"to it. To write its value: self.{name}.value = ... To have a plain attribute instead, "
                f"`del self.{name}` first."
            )
        object.__setattr__(self, name, value)
        own = self._book
        if own is not None and not _are_alike(old, value):
            if own.marks is not None and isinstance(value, (Ref, Node)):
                own.marks = {n: mark for n, mark in own.marks.items() if n != name}
            own.tell()

    def _delattr(self, name: str) -> None:
        check_structure(self, f"Attribute {name!r}")
        field = type(self)._fields.get(name)
        if field is not None:
            field.__delete__(self)
        else:
            object.__delattr__(self, name)
        tell(self)

    if not TYPE_CHECKING:
        # If type checkers knew of these, they would accept any attribute.
        __setattr__ = _setattr
        __delattr__ = _delattr

    @property
    def __dict__(self) -> dict[str, Any]:  # pyright: ignore
        # The caller can now change this dict without the Node noticing.
        if self._book is None or not self._book.exposed:
            mark_exposed(self)
        return attributes(self)

    def __getstate__(self) -> dict[str, Any]:
        return dict(attributes(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        attributes(self).update(state)
        tell(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        marks = None if self._book is None else self._book.marks
        return _restore, (type(self), marks), self.__getstate__()


WITH_IDENTITY.add(Node)


def _field_in_instance(node: Node, name: str, field: Any) -> ValueTypeError:
    cls = type(node).__name__
    if not field.is_ref:
        return ValueTypeError(
            f"Attribute {name!r} of a {cls} was assigned a field. Declare a static field in the "
            f"class body; in a method, assign the value itself: self.{name} = ..."
        )
    collection = field.collection
    how = ALTERNATIVES["param" if collection == "params" else "field"].format(collection)
    return ValueTypeError(
        f"Attribute {name!r} of a {cls} was assigned a field instead of a value. Declare it in the "
        f"class body: `{name}: jax.Array = {how}`, and in __init__ assign the array: self.{name} = "
        f"... For a Ref without a field, assign {ours('Ref')}(value, {collection!r})."
    )


_NOTHING: Any = object()


def _are_alike(old: Any, new: Any) -> bool:
    """Whether replacing `old` by `new` in an attribute leaves the structure unchanged."""
    if old is new or (is_array(old) and is_array(new)):
        return True
    return type(old) in SIMPLE and Static(old) == Static(new)


def is_array(x: Any) -> bool:
    """Whether `x` is an array. A ShapeDtypeStruct counts: it stands for an array in `eval_shape`."""
    return isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


_SLOTS = frozenset(Node.__slots__)


def make(cls: type, frame: Any, trace: Any) -> Any:
    """Make a Node without attributes at a given level. `__init__` does not run."""
    node = blank(cls, frame, trace)
    note_made(node)
    return node


def blank(cls: type, frame: Any, trace: Any, _new: Any = object.__new__) -> Any:
    """`make` for `build`, which reports all new objects together."""
    node = _new(cls)
    _set_dict(node, _own_dict(node))
    _set_frame(node, frame)
    _set_trace(node, trace)
    _set_book(node, None)
    return node


def _restore(cls: type, marks: dict[Any, Any] | None = None) -> Any:
    node = make(cls, local.frame, trace_ref())
    if marks is not None:
        book(node).marks = marks
    return node


attributes: Callable[[Node], dict[str, Any]] = Node._dict.__get__  # pyright: ignore
"""`attributes(node)` is the live dict of a Node's attributes. `vars(node)` also marks it as exposed."""

_set_dict = Node._dict.__set__  # pyright: ignore
_set_frame = Node._frame.__set__
_set_trace = Node._trace.__set__
_set_book = Node._book.__set__  # pyright: ignore
_book_lock = threading.Lock()


def book(node: Node) -> Book:
    """The Book of a Node, made on first use."""
    found = node._book
    if found is None:
        # Two threads must not make two Books: the watchers of one would never be told.
        with _book_lock:
            found = node._book
            if found is None:
                found = Book()
                _set_book(node, found)
    return found


def tell(node: Node) -> None:
    """Tell every tree that holds `node` that it has changed."""
    if node._book is not None:
        node._book.tell()


def mark_exposed(node: Node) -> None:
    """From now on, compare `node` item by item in every tree that holds it."""
    book(node).exposed = True
    tell(node)


def is_exposed(node: Node) -> bool:
    """Whether the attributes of `node` may change without its noticing."""
    cls = type(node)
    return (
        (node._book is not None and node._book.exposed)
        or cls.__setattr__ is not Node.__setattr__
        or cls.__delattr__ is not Node.__delattr__
    )


def _flatten_method(method: types.MethodType) -> tuple[tuple[Any, ...], Any]:
    if isinstance(method.__self__, Node):
        return (method.__self__,), method.__func__
    # JAX sees nothing of any other object, so its content is a constant of each program.
    return (), Static(method)


def _unflatten_method(aux: Any, children: Any) -> Any:
    return types.MethodType(aux, children[0]) if children else aux.value


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
