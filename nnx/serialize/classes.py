"""The declared fields of a class, and the attributes that its instances may have."""

from __future__ import annotations

import dataclasses
from typing import Any

from nnx.module import Module
from nnx.serialize.grammar import is_attribute
from refx import Node
from refx.text import a_kind

__all__: list[str] = []

# Attributes of every module. A subclass may declare a public one again, as in `train: bool = True`.
_OURS = frozenset(name for base in Module.__mro__ for name in vars(base))


def fields_of(cls: type[Node]) -> dict[str, Any]:
    """The fields that a class declares. Comparing them shows whether the class has changed."""
    fields = {
        name: f"ref {f.collection!r}" if f.is_ref else "static" for name, f in cls._fields.items()
    }
    if dataclasses.is_dataclass(cls):
        fields |= {f.name: "attribute" for f in dataclasses.fields(cls) if f.name not in fields}
    return fields


def why_not(cls: type[Node], name: str) -> str | None:
    """Why an instance of a class cannot have an attribute of this name, or None if it can."""
    if not is_attribute(name):
        return "which is not a valid attribute name"
    owner = next((base for base in cls.__mro__ if name in vars(base)), None)
    if owner is None:
        return None
    if name in _OURS and (name.startswith("_") or owner in Module.__mro__):
        return "which every module defines itself"
    found = vars(owner)[name]
    if hasattr(type(found), "__set__") and not hasattr(found, "is_field"):
        return f"which the class defines as {a_kind(type(found))}"
    return None
