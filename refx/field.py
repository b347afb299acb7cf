"""Fields: class-level specifiers. Their attributes read and write the value of a Ref."""

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
    """The part that both kinds of field share: the name, the default, and the dataclass options."""

    # Tells a field apart from other objects with an `is_ref`, which JAX has too.
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
                    f"{option} of a field is a bool: it controls the argument of the generated __init__. "
                    f"It got a {type(value).__name__}. To make the initial value with an initializer, "
                    f"assign it in __init__, or pass default_factory=."
                )
        if isinstance(default, (list, dict, set)):
            raise ValueError(
                f"All instances would share a {type(default).__name__} that is the default of a field. "
                f"Use default_factory=lambda: {default!r}."
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
        # Cloudpickle pickles classes by value and rebuilds them without calling __set_name__.
        return _restore, (type(self), dict(vars(self)))

    def _unset(self, node: Any) -> UnsetFieldError:
        cls = type(node).__name__
        return UnsetFieldError(
            f"{cls}.{self.name} was read before it was set. Assign it in __init__, as in "
            f"self.{self.name} = ..., or give the field a default. To leave it without a Ref, "
            f"assign None."
        )


class RefField(Field):
    """A field whose value lives in a Ref: reading returns the value, and writing writes the Ref.

    Assigning a Ref ties the field to that Ref, and assigning None leaves the field without one. The
    field is not a `property`, because class decorators (beartype) would replace it by a plain one.
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
        # This is the hottest code of all, so everything that it needs is a local variable.
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
                    # `read` checks all other values: they may hold arrays.
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
                # Check again, to name the field in the message.
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
    """A field whose value is always part of the structure. It must be hashable."""

    # Not a data descriptor, so Python finds a set attribute in the instance, in C.
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
    """The Ref behind an attribute, to tie another field to it or to read its collection.

    Raises:
      UnsetFieldError: the node does not have the attribute.
      ValueTypeError: the attribute does not hold a Ref.

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
            f"{type(node).__name__} has no attribute {name!r}. Its Ref attributes are: {names}."
        )
    ref = attributes(node)[name]
    if not isinstance(ref, Ref):
        raise ValueTypeError(
            f"{type(node).__name__}.{name} holds {type(ref).__name__}, not a Ref. Only param() and "
            f"ref() fields, and attributes to which you assigned a Ref, have one."
        )
    return ref
