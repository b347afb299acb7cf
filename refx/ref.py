"""The Ref: a mutable cell with an identity."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Generic, TypeVar, final

import jax
from jax.core import Tracer

from refx.access import check_value, is_label, label, read, write
from refx.buffers import CONCRETE
from refx.describe import summary
from refx.errors import UnhashableStaticError
from refx.frame import Frame, local, note_made
from refx.static import WITH_IDENTITY, Static
from refx.trace import EVAL, LABEL, READ_ONLY, current_trace, trace_ref

__all__ = ["Ref"]

T = TypeVar("T")

_NO_METADATA: Mapping[str, Any] = MappingProxyType({})


def metadata_of(facts: Iterable[tuple[str, Any]]) -> Mapping[str, Any]:
    """Make the read-only metadata of a Ref."""
    found = dict(facts)
    return MappingProxyType(found) if found else _NO_METADATA


# A library may set this function. It gets the value of each new Ref with metadata, such as a sharding.
at_birth: Callable[[Any, Hashable, Mapping[str, Any]], Any] | None = None


@final
class Ref(Generic[T]):
    """A mutable cell that may be shared. JAX transformations see its value.

    Refs are compared and hashed by identity: two Refs with equal values are two Refs, and one Ref at
    two paths is one parameter. `value` is any pytree of arrays and scalars.

    Args:
      value: the initial value.
      collection: a hashable label that filters select by, such as `"params"`.
      **metadata: hashable facts about the Ref that travel with it, such as a sharding. They are
        fixed, like the collection.

    Raises:
      ForeignTracerError: the value holds a tracer of a transformation that does not run here.
      ValueTypeError: the value is or holds a Ref, a module, or anything else that is not an array or
        a number. Put those in attributes.
      UnhashableStaticError: the collection or a metadata value cannot be hashed.

    >>> import refx
    >>> count = refx.Ref(0, "counters")
    >>> count.value += 1
    >>> count
    Ref(1, 'counters')
    """

    __slots__ = ("__weakref__", "_collection", "_frame", "_metadata", "_trace", "_value")

    _value: Any
    _collection: Hashable
    _metadata: Mapping[str, Any]
    _frame: Frame | None
    _trace: Any

    def __init__(self, value: T, collection: Hashable = None, **metadata: Any):
        _check_hashable("collection", collection)
        for name, fact in metadata.items():
            _check_hashable(f"metadata {name!r}", fact)
        check_value(None, value)
        if metadata and at_birth is not None:
            value = at_birth(value, collection, metadata)
        self._value = value
        self._collection = collection
        self._metadata = metadata_of(metadata.items())
        self._frame = local.frame
        self._trace = trace_ref()
        note_made(self)

    @property
    def value(self) -> T:
        """The value. You may write it only in the transformation in which the Ref was made."""
        frame = local.frame
        if self._frame is frame:
            value = self._value
            if frame is None:
                alive = type(value) in CONCRETE and not value.is_deleted()
                if alive and current_trace(()) is EVAL:
                    return value
            elif current_trace(()) is frame.trace():
                return value
        return read(self)

    @value.setter
    def value(self, value: T) -> None:
        write(self, value)

    @property
    def collection(self) -> Hashable:
        """The label that filters select by."""
        return self._collection

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The fixed facts that the Ref was made with."""
        return self._metadata

    def __repr__(self) -> str:
        facts = "".join(f", {name}={fact!r}" for name, fact in self._metadata.items())
        ended = self._value is None and self._frame is not None and not self._frame.open
        value = "<ended trace>" if ended else summary(self).split(", ", 1)[1]
        return f"Ref({value}, {self._collection!r}{facts})"

    def __reduce__(self) -> tuple[Any, ...]:
        # Copying and pickling make a Ref of the current level with the same value. The copy does not
        # need the frame and the trace of the original, but a label stays a label.
        fixed = self._trace is LABEL
        return _restore, (self.value, self._collection, dict(self._metadata), fixed)


WITH_IDENTITY.add(Ref)


def _no_arithmetic(self: Ref[Any], *others: Any, **options: Any) -> Any:
    raise TypeError(
        f"{self!r} is a cell, not the value that it holds: use .value, as in ref.value + 1."
    )


_BINARY = "add sub mul matmul truediv floordiv mod divmod pow lshift rshift and or xor"
_OTHERS = "neg pos abs invert float int complex round lt le gt ge getitem setitem array"
# Leave out == and hash, which go by identity, and __bool__.
for _name in [*_OTHERS.split(), *(r + op for op in _BINARY.split() for r in ("", "r"))]:
    setattr(Ref, f"__{_name}__", _no_arithmetic)
# JAX looks this one up but does not always call it, so the lookup itself raises.
setattr(Ref, "__jax_array__", property(_no_arithmetic))  # noqa: B010


def _restore(value: Any, collection: Hashable, metadata: Any, fixed: bool = False) -> Ref[Any]:
    # The value may be something that JAX put in place of an array and that `Ref(...)` would refuse.
    at = LABEL if fixed or is_label(value) else trace_ref()
    ref = make(value, collection, metadata_of(metadata.items()), local.frame, at)
    note_made(ref)
    return ref


def make(
    value: Any,
    collection: Hashable,
    metadata: Mapping[str, Any],
    frame: Frame | None,
    trace: Any,
    _new: Any = object.__new__,
) -> Ref[Any]:
    """Make a Ref at a given level without any checks. The boundary has done them."""
    ref = _new(Ref)
    ref._value = value
    ref._collection = collection
    ref._metadata = metadata
    ref._frame = frame
    ref._trace = trace
    return ref


def _check_hashable(what: str, fact: Any) -> None:
    try:
        hash(fact)
    except TypeError:
        raise UnhashableStaticError(
            f"The {what} of a Ref must be hashable, because it is part of the key of compiled "
            f"programs, but got {fact!r}. Use a tuple instead of a list, and put arrays in the value."
        ) from None


def is_value_copy(leaves: Any) -> bool:
    """Whether an object that JAX rebuilds from `leaves` here is a copy that cannot be written back."""
    return current_trace(()) is not EVAL or any(isinstance(x, Tracer) for x in leaves)


def _flatten(ref: Ref[Any]) -> tuple[tuple[Any], Any]:
    facts = tuple((name, Static(fact)) for name, fact in ref._metadata.items())
    return (read(ref),), (Static(ref._collection), facts)


def _flatten_with_keys(ref: Ref[Any]) -> tuple[tuple[tuple[Any, Any]], Any]:
    (value,), aux = _flatten(ref)
    return ((jax.tree_util.GetAttrKey("value"), value),), aux


def _unflatten(aux: Any, children: Any) -> Ref[Any]:
    collection, metadata = aux
    copied = is_value_copy(jax.tree.leaves(children[0]))
    facts = metadata_of((name, fact.value) for name, fact in metadata)
    at = READ_ONLY if copied else trace_ref()
    ref = make(children[0], collection.value, facts, local.frame, at)
    note_made(ref)
    if not copied:
        label([ref])
    return ref


jax.tree_util.register_pytree_with_keys(Ref, _flatten_with_keys, _unflatten, _flatten)
