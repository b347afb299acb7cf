"""Fields: class-level specifiers whose attribute reads the value of a Ref and writes it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from refx.access import check_structure, check_value, read, write
from refx.buffers import CONCRETE
from refx.errors import UnsetFieldError, ValueTypeError
from refx.frame import local
from refx.node import Node, attributes, tell
from refx.ref import Ref
from refx.trace import EVAL, current_trace

__all__ = ["MISSING", "RefField", "StaticField", "get_ref"]


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"

    def __reduce__(self) -> str:
        return "MISSING"


MISSING: Any = _Missing()


class Field:
    """What the two kinds of field share: a name, a default, and how a dataclass treats them."""

    # Other classes, of JAX too, have an `is_ref`.
    is_field = True
    is_ref = False

    def __init__(
        self,
        *,
        default: Any = MISSING,
        default_factory: Callable[[], Any] | None = None,
        init: bool = True,
        kw_only: bool = False,
    ):
        if default is not MISSING and default_factory is not None:
            raise ValueError("A field takes a default or a default_factory, not both.")
        for option, value in (("init", init), ("kw_only", kw_only)):
            if not isinstance(value, bool):
                raise TypeError(
                    f"{option} of a field says whether it is an argument of a generated __init__, so "
                    f"it is a bool, but got a {type(value).__name__}. To make a first value with an "
                    f"initializer, assign it in __init__, or say default_factory=."
                )
        if isinstance(default, (list, dict, set)):
            raise ValueError(
                f"A {type(default).__name__} as the default of a field would be shared by every "
                f"instance. Use default_factory=lambda: {default!r}."
            )
        self.default = default
        self.default_factory = default_factory
        self.init = init
        self.kw_only = kw_only
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @property
    def has_default(self) -> bool:
        return self.default is not MISSING or self.default_factory is not None

    def make_default(self) -> Any:
        return self.default_factory() if self.default_factory is not None else self.default

    def __reduce__(self) -> tuple[Any, ...]:
        # Classes that are pickled by value, as cloudpickle does, are rebuilt without __set_name__.
        return _restore, (type(self), dict(vars(self)))

    def _unset(self, node: Any) -> UnsetFieldError:
        cls = type(node).__name__
        return UnsetFieldError(
            f"{cls}.{self.name} was read before it was set. Assign it in __init__, as in "
            f"self.{self.name} = ..., or give the field a default; for a field without a Ref, "
            f"assign None."
        )


class RefField(Field):
    """A field whose value lives in a Ref: reading gives the value, writing writes the Ref.

    Assigning a Ref ties the field to that Ref, and assigning None leaves the field without one. It
    is not a `property`: decorators of classes (beartype) take those apart and make plain ones.
    """

    is_ref = True

    def __init__(
        self,
        collection: Hashable = None,
        *,
        metadata: Any = None,
        converter: Callable[[Any], Any] | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        self.converter = converter
        self.collection = collection
        self.metadata = metadata or {}

    def __get__(
        self,
        node: Any,
        owner: Any = None,
        # Everything that a read needs is a local variable: it is the hottest code of all.
        local: Any = local,
        current: Any = current_trace,
        concrete: Any = CONCRETE,
    ) -> Any:
        try:
            ref = node._dict[self.name]
            frame = local.frame
            if ref._frame is frame:
                value = ref._value
                if frame is None:
                    # Others are looked at by `read`: they may hold arrays.
                    alive = type(value) in concrete and not value.is_deleted()
                    if alive and current(()) is EVAL:
                        return value
                elif current(()) is frame.trace():
                    return value
        except (KeyError, AttributeError):
            if node is None:
                return self
            ref = attributes(node).get(self.name, MISSING)
            if ref is MISSING:
                raise self._unset(node) from None
            if not isinstance(ref, Ref):
                return ref
        return read(ref, node)

    def __set__(self, node: Any, value: Any) -> None:
        cell = attributes(node).get(self.name)
        if self.converter is not None and value is not None and not isinstance(value, Ref):
            value = self.converter(value)
        if isinstance(value, Ref) or value is None:
            if value is not cell or self.name not in attributes(node):
                check_structure(node, f"Attribute {self.name!r}")
                attributes(node)[self.name] = value
                tell(node)
        elif cell is None:
            check_structure(node, f"Attribute {self.name!r}")
            try:
                new = Ref(value, self.collection, **self.metadata)
            except ValueTypeError:
                # Again, to say which it is.
                check_value(None, value, f"{type(node).__name__}.{self.name}")
                raise
            attributes(node)[self.name] = new
            tell(node)
        else:
            write(cell, value, node)

    def __delete__(self, node: Any) -> None:
        check_structure(node, f"Attribute {self.name!r}")
        if attributes(node).pop(self.name, MISSING) is MISSING:
            raise self._unset(node)
        tell(node)

    def __repr__(self) -> str:
        return f"field {self.name!r} of collection {self.collection!r}"


class StaticField(Field):
    """A field whose value is part of the structure, whatever it is; it must be hashable."""

    # No data descriptor: an attribute that is set is found by Python in the instance, in C.
    def __get__(self, node: Any, owner: Any = None) -> Any:
        if node is None:
            return self
        raise self._unset(node)

    def __repr__(self) -> str:
        return f"static field {self.name!r}"


def _restore(kind: type[Field], state: dict[str, Any]) -> Field:
    field = kind.__new__(kind)
    vars(field).update(state)
    field.__set_name__(Node, field.name)
    return field


def get_ref(node: Node, name: str) -> Ref[Any]:
    """The Ref behind an attribute, to tie it elsewhere or to look at its collection.

    Raises:
      UnsetFieldError: the node has no such attribute.
      ValueTypeError: the attribute holds no Ref.

    >>> import jax.numpy as jnp, refx
    >>> class Embed(refx.Node):
    ...     table: jax.Array = refx.RefField("params")
    ...     def __init__(self):
    ...         self.table = jnp.ones((3, 2))
    >>> import jax
    >>> embed, tied = Embed(), Embed()
    >>> tied.table = refx.get_ref(embed, "table")
    >>> embed.table = jnp.zeros((3, 2))
    >>> float(tied.table.sum())
    0.0
    """
    if name not in attributes(node):
        names = ", ".join(k for k, v in attributes(node).items() if isinstance(v, Ref)) or "none"
        raise UnsetFieldError(
            f"{type(node).__name__} has no attribute {name!r}; its Ref attributes are: {names}."
        )
    ref = attributes(node)[name]
    if not isinstance(ref, Ref):
        raise ValueTypeError(
            f"{type(node).__name__}.{name} holds {type(ref).__name__}, not a Ref. Only param() and "
            f"ref() fields and attributes that were assigned a Ref have one."
        )
    return ref
