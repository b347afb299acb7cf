"""The classes and static values that programs use, one set for each of the two libraries."""

from __future__ import annotations

import dataclasses
import enum
import types
from typing import Any

import numpy as np

# Every attribute that a program may set, in the order in which `total` and `bump` read them.
NAMES = (
    "w", "c", "x", "y", "head", "up", "me", "kids", "table", "pair", "arr", "mode", "level",
    "extra", "net", "late",
)  # fmt: skip


class Mode(enum.StrEnum):
    """Equal to its string, but not the same."""

    FAST = "fast"
    SLOW = "slow"


class Size(enum.IntEnum):
    """Equal to its number, but not the same."""

    ONE = 1
    TWO = 2


class Lenient:
    """A setting that equals everything of its class."""

    def __init__(self, name: str):
        self.name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Lenient)

    def __hash__(self) -> int:
        return 7

    def __repr__(self) -> str:
        return f"Lenient({self.name!r})"


class Loose(str):
    """A string that compares without case."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self.lower() == other.lower()

    def __hash__(self) -> int:
        return hash(self.lower())

    def __repr__(self) -> str:
        return f"Loose({str(self)!r})"


@dataclasses.dataclass(frozen=True)
class Conf:
    """A frozen record of settings."""

    rate: Any = 1
    name: Any = "fast"


@dataclasses.dataclass(frozen=True)
class Partly:
    """A frozen record with a field that its `==` ignores."""

    rate: int = 1
    note: str = dataclasses.field(default="a", compare=False)


# Groups of values that Python calls equal, or that are easily mistaken for one another.
TWINS: tuple[tuple[str, ...], ...] = (
    ('"fast"', "Mode.FAST", 'Loose("fast")', 'Loose("FAST")', 'b"fast"'),
    ('"slow"', "Mode.SLOW"),
    ("1", "True", "1.0", "Size.ONE", "np.int32(1)", "np.float32(1)", "1 + 0j", "np.bool_(True)"),
    ("0", "False", "0.0", "-0.0", "None", '""', "()"),
    ("2", "2.0", "Size.TWO"),
    ('np.dtype("float32")', '"float32"', "np.float32", 'Loose("float32")'),
    ('np.dtype("int32")', '"int32"', "np.int32"),
    ('Lenient("a")', 'Lenient("b")', '"a"'),
    ("Conf(1)", "Conf(True)", "Conf(1.0)", "Conf(Size.ONE)"),
    ('Conf(1, "fast")', "Conf(1, Mode.FAST)", 'Conf(1, Loose("FAST"))'),
    ('Partly(1, "a")', 'Partly(1, "b")', 'Partly(True, "a")'),
    ("(1, 2)", "(True, 2)", "(1.0, 2)", "(1, Size.TWO)", "Two(1, 2)", "Two(1, 2.0)"),
    ('("fast", None)', "(Mode.FAST, None)"),
    ("frozenset({1})", "frozenset({True})", "frozenset({1.0})"),
    ("slice(1, 2)", "slice(True, 2)", "slice(1.0, 2)"),
)


class Two(tuple):
    """A tuple subclass."""

    __slots__ = ()

    def __new__(cls, *items: Any) -> Any:
        return super().__new__(cls, items)

    def __repr__(self) -> str:
        return f"Two{tuple(self)!r}"


def text(value: Any) -> str:
    """A static value by its type and contents, whatever its `==` and `repr` say."""
    kind = type(value)
    if isinstance(value, (tuple, frozenset)):
        return f"{kind.__name__}({', '.join(sorted(map(text, value)) if kind is frozenset else map(text, value))})"
    if isinstance(value, slice):
        return f"slice({text(value.start)}, {text(value.stop)}, {text(value.step)})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = (f"{f.name}={text(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return f"{kind.__name__}({', '.join(parts)})"
    if isinstance(value, (types.FunctionType, types.MethodType)):
        return f"function {value.__name__}"
    return f"{kind.__name__} {value!r}"


def tag(value: Any) -> int:
    """A small number for this static value, which programs can compute with."""
    number = 0
    for letter in text(value):
        number = (number * 31 + ord(letter)) % 89
    return number


class Boom(Exception):
    """The error that a program raises on purpose."""


SETTINGS: dict[str, Any] = {
    "Mode": Mode,
    "Size": Size,
    "Lenient": Lenient,
    "Loose": Loose,
    "Conf": Conf,
    "Partly": Partly,
    "Two": Two,
    "Boom": Boom,
    "np": np,
    "tag": tag,
}


def define(lib: Any) -> dict[str, type]:
    """The classes of one library; `lib` has its `Module` and its fields."""

    class Leaf(lib.Module):
        w = lib.param()
        c = lib.ref("counters")

        def __init__(self, w: Any, c: Any):
            self.w = w
            self.c = c

        def step(self, x: Any) -> Any:
            self.c = lib.mix(self.c, x)
            return lib.mix(self.w, x)

        def __call__(self, x: Any) -> Any:
            return self.step(x)

    class Plain(lib.Module):
        level = 1

        def step(self, x: Any) -> Any:
            lib.bump(self)
            return lib.mix(lib.total(self), x)

        def __call__(self, x: Any) -> Any:
            return self.step(x)

    class Over(Plain):
        """A subclass, whose attributes may come to hide those of its base."""

    class Own(lib.Module):
        """A class with its own `__setattr__`."""

        def __setattr__(self, name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        def step(self, x: Any) -> Any:
            lib.bump(self)
            return lib.mix(lib.total(self), x)

        def __call__(self, x: Any) -> Any:
            return self.step(x)

    class Box:
        """A plain object, not a module."""

        def pick(self) -> Any:
            return getattr(self, "net", None)

    class SubBox(Box):
        pass

    class OtherBox(Box):
        def pick(self) -> Any:
            return getattr(self, "late", None) or getattr(self, "net", None)

    found = (Leaf, Plain, Over, Own, Box, SubBox, OtherBox)
    for cls in found:
        cls.__qualname__ = cls.__name__
    return {cls.__name__: cls for cls in found}
