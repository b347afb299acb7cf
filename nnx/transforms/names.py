"""The names that the code of a function loads: where its globals, attributes and imports may lead."""

from __future__ import annotations

import dis
import functools
import types
from typing import NamedTuple

__all__: list[str] = []


class Names(NamedTuple):
    """Globals, attributes, what may be a name in a string, imported modules, attributes that are set."""

    loaded: tuple[str, ...]
    attributes: frozenset[str]
    strings: tuple[str, ...]
    imported: tuple[str, ...]
    stored: frozenset[str]


# Code that uses one of these may find an attribute or a global by a string.
_BY_STRING = frozenset(
    {"globals", "getattr", "vars", "__dict__", "attrgetter", "modules"} | {"hasattr"}
)


@functools.lru_cache(maxsize=4096)
def names_of(code: types.CodeType) -> Names:
    """The names that some code loads: globals, attributes, those in strings, imports."""
    loaded: dict[str, None] = {}
    imported: dict[str, None] = {}
    attributes: set[str] = set()
    stored: set[str] = set()
    strings: dict[str, None] = {}
    todo = [code]
    while todo:
        at = todo.pop()
        for step in dis.get_instructions(at):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                loaded[step.argval] = None
            elif step.opname == "IMPORT_NAME":
                imported[step.argval] = None
            elif step.opname in ("STORE_ATTR", "DELETE_ATTR"):
                stored.add(step.argval)
        attributes.update(at.co_names)
        strings.update((c, None) for c in at.co_consts if type(c) is str and c.isidentifier())
        todo += [c for c in at.co_consts if isinstance(c, types.CodeType)]
    if not attributes & _BY_STRING:
        strings.clear()
    return Names(
        tuple(loaded),
        frozenset(attributes | set(strings)),
        tuple(strings),
        tuple(imported),
        frozenset(stored),
    )
