"""The names that the code of a function loads: where its globals, attributes and imports may lead."""

from __future__ import annotations

import dis
import functools
import types
from typing import NamedTuple

__all__: list[str] = []


class Names(NamedTuple):
    """The names that some code loads, and what it does with them.

    `stored` are attributes and variables that the code sets; `sinks` are variables of which every use
    puts something into them; `read` are those whose every use takes items out: `f(**x)`, `x[i]`,
    `for i in x`.
    """

    loaded: tuple[str, ...]
    attributes: frozenset[str]
    strings: tuple[str, ...]
    imported: tuple[str, ...]
    stored: frozenset[str]
    sinks: frozenset[str]
    read: frozenset[str]
    filled: frozenset[str]


# Code that uses one of these may find an attribute or a global by a string.
_BY_STRING = frozenset(
    {"globals", "getattr", "vars", "__dict__", "attrgetter", "modules"} | {"hasattr"}
)


_PUTS = frozenset({"append", "extend", "add", "insert", "update", "setdefault", "clear"})
_CHANGES = _PUTS | {
    "appendleft",
    "pop",
    "popleft",
    "popitem",
    "remove",
    "discard",
    "reverse",
    "sort",
}


# What these do with the container on top of the stack, or with the one below an index, is to read it.
_READS = frozenset(
    {"DICT_MERGE", "DICT_UPDATE", "LIST_EXTEND", "SET_UPDATE", "GET_ITER", "CONTAINS_OP"}
)


def _used_variables(code: types.CodeType) -> tuple[set[str], set[str], set[str]]:
    """The variables that a piece of code puts something into, reads, and uses otherwise."""
    puts: set[str] = set()
    reads: set[str] = set()
    others: set[str] = set()
    steps = list(dis.get_instructions(code))
    line = 0
    lines: list[int] = []
    for step in steps:
        line = step.positions.lineno or line if step.positions is not None else line
        lines.append(line)
    sets = {at for step, at in zip(steps, lines, strict=True) if step.opname == "STORE_SUBSCR"}
    for i, step in enumerate(steps):
        if step.opname in ("LOAD_DEREF", "LOAD_GLOBAL", "LOAD_CLASSDEREF"):
            after, second = (*steps[i + 1 : i + 3], None, None)[:2]
            put = after is not None and str(after.argval) in _PUTS
            read = after is not None and after.opname in _READS
            read = read or (second is not None and second.opname == "BINARY_SUBSCR")
            use = puts if put or lines[i] in sets else reads if read else others
            use.add(step.argval)
    return puts, reads, others


def _filled(code: types.CodeType) -> set[str]:
    """The variables and attributes whose content a piece of code changes."""
    found: set[str] = set()
    steps = list(dis.get_instructions(code))
    line = 0
    on_line: dict[int, set[str]] = {}
    for i, step in enumerate(steps):
        line = step.positions.lineno or line if step.positions is not None else line
        if step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            found |= on_line.get(line, set())
        elif step.opname in _LOADS:
            on_line.setdefault(line, set()).add(step.argval)
            if i + 1 < len(steps) and str(steps[i + 1].argval) in _CHANGES:
                found.add(step.argval)
    return found


_NAMING = frozenset(
    {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "LOAD_CLASSDEREF"}
    | {"IMPORT_NAME", "IMPORT_FROM", "LOAD_FROM_DICT_OR_GLOBALS"}
)
_LOADS = frozenset({"LOAD_DEREF", "LOAD_GLOBAL", "LOAD_CLASSDEREF", "LOAD_NAME", "LOAD_ATTR"})


_STORES = frozenset({"STORE_ATTR", "DELETE_ATTR", "STORE_DEREF", "STORE_GLOBAL", "DELETE_GLOBAL"})


@functools.lru_cache(maxsize=4096)
def names_of(code: types.CodeType) -> Names:
    """The names that some code loads: globals, attributes, those in strings, imports."""
    loaded: dict[str, None] = {}
    imported: dict[str, None] = {}
    attributes: set[str] = set()
    stored: set[str] = set()
    puts: set[str] = set()
    reads: set[str] = set()
    others: set[str] = set()
    filled: set[str] = set()
    strings: dict[str, None] = {}
    todo = [code]
    while todo:
        at = todo.pop()
        for step in dis.get_instructions(at):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                loaded[step.argval] = None
            elif step.opname == "IMPORT_NAME":
                imported[step.argval] = None
            if step.opname in _NAMING and step.argval in at.co_names:
                attributes.add(step.argval)
            elif step.opname in _STORES:
                stored.add(step.argval)
        for total, found in zip((puts, reads, others), _used_variables(at), strict=True):
            total |= found
        filled |= _filled(at)
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
        frozenset(puts - reads - others),
        frozenset(reads - puts - others),
        frozenset(filled),
    )
