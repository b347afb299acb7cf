"""The format as data: what each kind of thing in a file may hold.

`check` compares a whole file with the grammar before anything is built. The work is proportional to
the size of the file. `encode` writes nothing else, so `load` gives back whatever `save` accepts.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, NamedTuple

from nnx.serialize.errors import LoadError

__all__: list[str] = []

FORMAT = "nnx"
VERSION = 1

# How deep values may be nested. Objects with an identity are in a flat list and do not count.
DEPTH = 100
# How many digits a number may have: Python takes quadratic time to read a long one.
DIGITS = 1000
# How many keys of a dict may have the same hash: Python searches them one after the other.
ALIKE = 64
# How long the name of a class, a function or an array may be.
NAME = 1000


class Damaged(Exception):
    """`encode` would not have written some part of the structure. The message says which."""


# ---- JSON, but strict where JSON is vague


def parse(text: bytes) -> Any:
    """Parse the JSON in these bytes.

    Raises:
      Damaged: it names something twice, or has a number that is NaN, infinite or too long.
    """
    return json.loads(
        text.decode(),
        object_pairs_hook=_pairs,
        parse_constant=_constant,
        parse_float=_float,
        parse_int=_int,
    )


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise Damaged(f"a name is given twice among {clip([name for name, _ in pairs])}")
    return made


def _constant(text: str) -> Any:
    raise Damaged(f"it has the number {text}")


def _float(text: str) -> float:
    if len(text) > 40 or not math.isfinite(number := float(text)):
        raise Damaged(f"it has the number {text[:40]}")
    return number


def _int(text: str) -> int:
    if len(text) > DIGITS + 1:
        raise Damaged(f"it has an integer of {len(text)} digits")
    return int(text)


# ---- the grammar


class Literal(NamedTuple):
    """A JSON value without parts."""

    kind: type
    what: str
    test: Callable[[Any], bool] = lambda x: True


class Each(NamedTuple):
    """A JSON list of any length. All items follow the same rule."""

    item: Any


class Row(NamedTuple):
    """A JSON list of fixed length, with a rule for each item."""

    items: tuple[Any, ...]


class Record(NamedTuple):
    """A JSON object with required names and optional names."""

    required: dict[str, Any]
    optional: dict[str, Any] = {}


class Names(NamedTuple):
    """A JSON object with any names. All values follow the same rule."""

    item: Any


class Value(NamedTuple):
    """A value in the context of this name. `same` means the context of the surrounding value."""

    context: str


STRING = Literal(str, "a string")
SHORT = Literal(str, "a name", lambda x: 0 < len(x) <= NAME)
ATTRIBUTE = Literal(str, "the name of an attribute", lambda x: is_attribute(x))
FACT = Literal(str, "the name of metadata", lambda x: x not in ("self", "value", "collection"))
INTEGER = Literal(int, "an integer")
NATURAL = Literal(int, "a size", lambda x: 0 <= x < 1 << 63)
NUMBER = Literal(int, "the number of an object")
SAME = Value("same")
KEY = Value("key")
PATH = Each(STRING)
SHAPE = Literal(list, "a shape", lambda x: len(x) <= 64 and all(map(_is_size, x)))
TYPE = Literal(str, "a dtype", lambda x: len(x) <= NAME)


def is_attribute(name: str) -> bool:
    """Whether an attribute may have this name, so that a path can lead through it."""
    return name != "" and "." not in name and not (name[:2] == name[-2:] == "__")


def _is_size(n: Any) -> bool:
    return type(n) is int and 0 <= n < 1 << 63


# Everything that is written in place, by the one key that names its kind.
KINDS: dict[str, Any] = {
    "object": NUMBER,
    "float": Literal(str, "nan, inf or -inf", lambda x: x in ("nan", "inf", "-inf")),
    "tuple": Each(SAME),
    "spec": Each(SAME),
    "list": Each(SAME),
    "dict": Each(Row((KEY, SAME))),
    "ordered": Each(Row((KEY, SAME))),
    "frozenset": Each(KEY),
    "namedtuple": Row((SHORT, Each(SAME))),
    "complex": Row((Value("number"), Value("number"))),
    "bytes": STRING,
    "ellipsis": Literal(type(None), "null"),
    "slice": Row((SAME, SAME, SAME)),
    "range": Row((INTEGER, INTEGER, INTEGER)),
    "dtype": TYPE,
    "scalar": Row((TYPE, STRING)),
    "enum": Row((SHORT, SHORT)),
    "partition": Each(Row((PATH, Value("placed")))),
    "partial": Row((SAME, Each(SAME), Each(Row((STRING, SAME))))),
    "Partial": Row((SAME, Each(SAME), Each(Row((STRING, SAME))))),
    "method": Row((Value("node"), SHORT)),
    "class": SHORT,
    "named": SHORT,
    "saved": Row((SHORT, Value("inner"))),
}

ARRAY = Record(
    {"array": SHORT, "shape": SHAPE, "dtype": TYPE}, {"numpy": Literal(bool, "true", bool)}
)
RANDOM_KEYS = Record({"array": SHORT, "shape": SHAPE, "key": SHORT})

# Objects, which are referred to by number.
OBJECTS: dict[str, Any] = {
    "ref": Record(
        {
            "path": PATH,
            "collection": KEY,
            "metadata": Each(Row((FACT, KEY))),
            "value": Value("content"),
        }
    ),
    "module": Record({"class": SHORT, "attributes": Each(Row((ATTRIBUTE, Value("free"))))}),
    "list": Each(Value("free")),
    "dict": Each(Row((KEY, Value("free")))),
}

FILE = Record(
    {
        "format": STRING,
        "version": INTEGER,
        "root": Value("free"),
        "objects": Literal(list, "a list"),
        "leaves": Each(Row((PATH, Value("leaf")))),
        "classes": Names(Names(STRING)),
    }
)

_REFERENCES = frozenset(f"object {kind}" for kind in OBJECTS)
_ALL = frozenset(KINDS) - {"object"} | _REFERENCES | {"array", "literal"}
_CONTAINERS = frozenset({"list", "dict"})
_LISTED = frozenset({"object list", "object dict"})

# What a value may be, depending on its context.
CONTEXTS: dict[str, frozenset[str]] = {
    # Lists and dicts have an identity, so they are objects.
    "free": _ALL - _CONTAINERS,
    # In a Partition, older files have them as objects and newer ones in place.
    "placed": _ALL,
    # `load` of a `saveable` class gets complete lists and dicts, so they are in place.
    "inner": _ALL - _LISTED,
    # The value of a Ref can be read on its own, so it does not refer to objects.
    "content": _ALL - _REFERENCES - {"method"},
    "key": _ALL - _REFERENCES - _CONTAINERS - {"method", "ordered", "partition", "array"},
    "leaf": frozenset({"array"}),
    "node": frozenset({"object module"}),
    "number": frozenset({"literal", "float"}),
}


def entered(context: str, slot: str) -> str:
    """The context of a part, from the context of the whole and the grammar's rule for the part."""
    if slot == "same":
        return context
    if slot in ("inner", "placed") and context not in ("free", "placed"):
        return "content" if context == "key" else context
    return slot


def check(structure: Any) -> Check:
    """Compare a whole structure with the grammar.

    Raises:
      Damaged: `encode` would have written something differently.
    """
    return Check(structure)


class Check:
    """A structure that has been checked against the grammar.

    Attributes:
      arrays: the file's description of each array, by name.
    """

    def __init__(self, structure: Any):
        self._structure = structure
        objects = structure.get("objects")
        if not isinstance(objects, list) or not isinstance(structure.get("classes"), dict):
            raise Damaged("it has no objects or no classes")
        self._kinds = [kind_of(spec, f"object {i}")[0] for i, spec in enumerate(objects)]
        for i, kind in enumerate(self._kinds):
            if kind not in OBJECTS:
                raise Damaged(f"object {i} is a {clip(kind)}")
        self.arrays: dict[str, Any] = {}
        self._classes: set[str] = set()
        # For each object, by number, the objects to which it refers.
        self._mentions: list[list[int]] = [[] for _ in range(len(objects) + 1)]
        # Objects inside values without identity. JAX walks these each time it meets them.
        self._walked: list[int] = []
        self._codes = 0
        # How many objects were mentioned so far, and the first that came before any mention of it.
        self._met = 0
        self._lost: int | None = None
        self._against(FILE, structure, "free", -1)
        for i, (kind, spec) in enumerate(zip(self._kinds, objects, strict=True)):
            if i >= self._met and self._lost is None:
                self._lost = i
            self._against(OBJECTS[kind], spec[kind], "free", i)
            if kind == "module":
                self._classes.add(spec[kind]["class"])
        self._check_walks()

    def check_used(self) -> None:
        """Raise if nothing refers to some part of the file, or if its order is not that of `save`."""
        if self._lost is not None:
            raise Damaged(f"nothing before its object {self._lost} refers to it")
        if self._classes != self._structure["classes"].keys():
            raise Damaged("its classes are not those of its objects")

    def _against(self, rule: Any, code: Any, context: str, owner: int) -> None:
        """Check a part against a rule. Everything found in it belongs to the object number `owner`."""
        # Go in order and without recursion, because a file may be nested arbitrarily deep.
        todo: list[Iterator[Any]] = [iter([(rule, code, context, 0, False)])]
        while todo:
            part = next(todo[-1], None)
            if part is None:
                todo.pop()
                continue
            rule, code, context, depth, walked = part
            kind = type(rule)
            self._codes += 1
            if kind is Value:
                inner = self._value(code, entered(context, rule.context), depth, walked, owner)
                if inner is not None:
                    todo.append(iter([inner]))
            elif kind is Literal:
                if type(code) is not rule.kind or not rule.test(code):
                    raise Damaged(f"{clip(code)} should be {rule.what}")
            else:
                todo.append(_parts(rule, code, context, depth, walked))

    def _value(self, code: Any, context: str, depth: int, walked: bool, owner: int) -> Any:
        """Check the value itself. Return the part that is left to check."""
        allowed = CONTEXTS[context]
        if code is None or type(code) in (bool, str, int, float):
            if "literal" not in allowed or (context == "number" and type(code) is not float):
                raise Damaged(f"{clip(code)} is not allowed here")
            return None
        if depth > DEPTH:
            raise Damaged(f"its values are nested more than {DEPTH} levels deep")
        if isinstance(code, dict) and "array" in code:
            kind: str = "array"
            rule: Any = RANDOM_KEYS if "key" in code else ARRAY
            content: Any = code
            self._note_array(code)
        else:
            kind, content = kind_of(code, "a value")
            rule = KINDS.get(kind)
            if rule is None:
                raise Damaged(f"there is no kind of value named {clip(kind)}")
        named = kind
        if kind == "object":
            named = f"object {self._kinds[self._number(content)]}"
            self._mentions[owner].append(content)
            if content == self._met:
                self._met += 1
            elif content > self._met and self._lost is None:
                self._lost = content
            if walked:
                self._walked.append(content)
        if named not in allowed:
            raise Damaged(f"a value of the kind {named!r} is not allowed here")
        if kind == "class" and isinstance(content, str):
            self._classes.add(content)
        walked = walked or kind in ("partial", "Partial", "partition")
        return rule, content, context, depth + 1, walked

    def _number(self, number: Any) -> int:
        if type(number) is not int or not 0 <= number < len(self._kinds):
            raise Damaged(f"object {clip(number)} does not exist")
        return number

    def _note_array(self, code: Any) -> None:
        name = code["array"]
        if not isinstance(name, str):
            raise Damaged(f"{clip(name)} should be a name")
        # All mentions of an array must be equal, so that they all mean the same array.
        if self.arrays.setdefault(name, code) != code:
            raise Damaged(f"it describes its array {clip(name)} in two ways")

    def _check_walks(self) -> None:
        # If lists hold each other twice over, a walk that enters every mention takes exponential
        # time.
        left, todo = self._codes, list(self._walked)
        while todo:
            number = todo.pop()
            left -= 1
            if left < 0:
                raise Damaged("its lists hold each other many times over")
            if self._kinds[number] in ("list", "dict"):
                todo += self._mentions[number]


def _parts(rule: Any, code: Any, context: str, depth: int, walked: bool) -> Iterator[Any]:
    """The parts of a list or an object, with their rules."""
    if isinstance(rule, Each):
        return ((rule.item, x, context, depth, walked) for x in _list(code))
    if isinstance(rule, Row):
        if len(_list(code)) != len(rule.items):
            raise Damaged(f"{clip(code)} should have {len(rule.items)} parts")
        return ((part, x, context, depth, walked) for part, x in zip(rule.items, code, strict=True))
    if isinstance(rule, Names):
        return ((rule.item, x, context, depth, walked) for x in _dict(code).values())
    parts = rule.required | rule.optional
    for name in _dict(code).keys() - parts.keys():
        raise Damaged(f"it has a {clip(name)}, which is not part of the format")
    for name in rule.required.keys() - code.keys():
        raise Damaged(f"{clip(code)} has no {name!r}")
    return ((parts[name], x, context, depth, walked) for name, x in code.items())


def kind_of(code: Any, what: str) -> tuple[str, Any]:
    """The only name in a JSON object, and its value."""
    if not isinstance(code, dict) or len(code) != 1:
        raise Damaged(f"{what} is {clip(code)}")
    return next(iter(code.items()))


def check_distinct(keys: Iterable[Hashable], what: str) -> None:
    """Raise if a key appears twice, or if too many keys have the same hash."""
    keys = list(keys)
    # Check the hashes first: Python compares each key with all others of the same hash.
    if keys and max(Counter(map(hash, keys)).values()) > ALIKE:
        raise Damaged(f"{what} has more than {ALIKE} keys with the same hash")
    if len(set(keys)) != len(keys):
        raise Damaged(f"{what} has a key twice")


def clip(x: Any) -> str:
    """A part of a file, for a message."""
    text = repr(x)
    return text if len(text) <= 80 else text[:77] + "..."


def _list(code: Any) -> list[Any]:
    if not isinstance(code, list):
        raise Damaged(f"{clip(code)} should be a list")
    return code


def _dict(code: Any) -> dict[str, Any]:
    if not isinstance(code, dict):
        raise Damaged(f"{clip(code)} should be an object with names")
    return code


def check_header(structure: Any) -> None:
    """Raise a LoadError, which does not yet name the file, if this version cannot read it."""
    if not isinstance(structure, dict) or structure.get("format") != FORMAT:
        raise LoadError("its structure is not one that nnx.save wrote")
    version = structure.get("version")
    if type(version) is not int or version < 1:
        raise LoadError(f"its format version is {clip(version)}, which never existed")
    if version > VERSION:
        raise LoadError(
            f"its format version is {clip(version)}, but this nnx only reads versions up to "
            f"{VERSION}. Install a newer nnx"
        )
