"""The names that the code of a function uses: globals, attributes, imports and variables."""

from __future__ import annotations

import dis
import functools
import types
from typing import NamedTuple

__all__: list[str] = []


class Names(NamedTuple):
    """The names that some code loads, and what it does with them.

    `stored` are the attributes and variables that the code sets. `filled` are those whose content it
    changes. `sinks` are variables that it only ever puts something into. `read` are variables that it
    only ever takes items out of: `f(**x)`, `x[i]`, `for i in x`. `any_attribute` says that the code may
    read an attribute of any name: by `vars(x)`, or by `getattr` with a name that is not a constant.
    """

    loaded: tuple[str, ...]
    attributes: frozenset[str]
    strings: tuple[str, ...]
    imported: tuple[str, ...]
    stored: frozenset[str]
    sinks: frozenset[str]
    read: frozenset[str]
    filled: frozenset[str]
    any_attribute: bool


# Code that uses one of these may find an attribute or a global by a string.
_BY_STRING = frozenset(
    {"globals", "getattr", "vars", "__dict__", "attrgetter", "modules"} | {"hasattr"}
)


_PUTS = frozenset({"append", "extend", "add", "insert", "update", "setdefault", "clear"})
_CHANGES = _PUTS | {"appendleft", "pop", "popleft", "popitem", "remove", "discard"}
_CHANGES |= {"reverse", "sort"}


# These instructions read the container on top of the stack.
_READS = frozenset(
    {"DICT_MERGE", "DICT_UPDATE", "LIST_EXTEND", "SET_UPDATE", "GET_ITER", "CONTAINS_OP"}
)


_VARIABLES = frozenset({"LOAD_DEREF", "LOAD_GLOBAL", "LOAD_CLASSDEREF"})
_LOADS = _VARIABLES | {"LOAD_NAME", "LOAD_ATTR"}
_NAMING = frozenset(
    {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "LOAD_CLASSDEREF"}
    | {"IMPORT_NAME", "IMPORT_FROM", "LOAD_FROM_DICT_OR_GLOBALS"}
)


_STORES = frozenset({"STORE_ATTR", "DELETE_ATTR", "STORE_DEREF", "STORE_GLOBAL", "DELETE_GLOBAL"})


# Code that uses one of these may read an attribute whose name appears nowhere.
_ANY_ATTRIBUTE = frozenset({"vars", "__dict__", "dir", "attrgetter", "__getattribute__"})


# Python 3.11 has two instructions for a call, of which the first takes the arguments.
_CALL = "PRECALL" if "PRECALL" in dis.opmap else "CALL"


def _computes_name(steps: list[dis.Instruction], at: int) -> bool:
    """Whether `getattr`, which is loaded at a position, may be called with a name that is not a constant."""
    if steps[at].opname != "LOAD_GLOBAL" or not (steps[at].arg or 0) & 1:
        return True  # it is passed on, and not called
    # The position where each argument ends, by the number of arguments on the stack.
    ends: dict[int, int] = {0: at}
    depth = 0
    for i, step in enumerate(steps[at + 1 :], at + 1):
        if step.opname == _CALL and step.arg == depth:
            ends[depth] = i - 1
            name = steps[ends[2]] if depth > 1 and ends[2] == ends[1] + 1 else None
            return name is None or name.opname != "LOAD_CONST" or type(name.argval) is not str
        if step.opcode in dis.hasjrel or step.opcode in dis.hasjabs:
            return True  # an argument that is a condition: its name is not followed
        depth += dis.stack_effect(step.opcode, step.arg, jump=False)
        ends[depth] = i
    return True


class _Uses:
    """What a function and the functions defined in it do with names, in order."""

    def __init__(self) -> None:
        self.loaded: dict[str, None] = {}
        self.imported: dict[str, None] = {}
        self.strings: dict[str, None] = {}
        self.attributes: set[str] = set()
        self.stored: set[str] = set()
        # The variables that code puts something into, takes items out of, or uses in another way.
        self.puts: set[str] = set()
        self.reads: set[str] = set()
        self.others: set[str] = set()
        self.filled: set[str] = set()
        self.any_attribute = False

    def add(self, code: types.CodeType) -> None:
        """Note the names in a piece of code."""
        steps = list(dis.get_instructions(code))
        lines: list[int] = [0]
        for step in steps:
            known = step.positions.lineno if step.positions is not None else None
            lines.append(known or lines[-1])
        del lines[0]
        sets = {at for step, at in zip(steps, lines, strict=True) if step.opname == "STORE_SUBSCR"}
        on_line: dict[int, set[str]] = {}
        for i, (step, line) in enumerate(zip(steps, lines, strict=True)):
            kind, name = step.opname, step.argval
            if kind in ("LOAD_GLOBAL", "LOAD_NAME"):
                self.loaded[name] = None
            elif kind == "IMPORT_NAME":
                self.imported[name] = None
            elif kind in _STORES:
                self.stored.add(name)
            elif kind in ("STORE_SUBSCR", "DELETE_SUBSCR"):
                self.filled |= on_line.get(line, set())
            if kind in _NAMING and name in code.co_names:
                self.attributes.add(name)
                if name in _ANY_ATTRIBUTE or (name == "getattr" and _computes_name(steps, i)):
                    self.any_attribute = True
            if kind in _LOADS:
                on_line.setdefault(line, set()).add(name)
                after, second = (*steps[i + 1 : i + 3], None, None)[:2]
                method = "" if after is None else str(after.argval)
                if method in _CHANGES:
                    self.filled.add(name)
                if kind in _VARIABLES:
                    read = after is not None and after.opname in _READS
                    read = read or (second is not None and second.opname == "BINARY_SUBSCR")
                    put = method in _PUTS or line in sets
                    (self.puts if put else self.reads if read else self.others).add(name)
        for constant in code.co_consts:
            if type(constant) is str and constant.isidentifier():
                self.strings[constant] = None
            elif isinstance(constant, types.CodeType):
                self.add(constant)


@functools.lru_cache(maxsize=4096)
def names_of(code: types.CodeType) -> Names:
    """The names that some code uses: globals, attributes, names in strings, imports."""
    uses = _Uses()
    uses.add(code)
    if not uses.attributes & _BY_STRING:
        uses.strings.clear()
    return Names(
        tuple(uses.loaded),
        frozenset(uses.attributes | set(uses.strings)),
        tuple(uses.strings),
        tuple(uses.imported),
        frozenset(uses.stored),
        frozenset(uses.puts - uses.reads - uses.others),
        frozenset(uses.reads - uses.puts - uses.others),
        frozenset(uses.filled),
        uses.any_attribute,
    )
