"""Random bodies: reads, writes, swaps and surgery, in transformations of transformations."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tests.laws.program import Block, Line, Node
from tests.laws.things import TWINS
from tests.laws.world import World, number


@dataclass
class Scope:
    """The names that are available at one place of a program.

    `scalars` may be read and written, `locked` only read. `modules` and `owned` are pairs of an expression and the
    name of the module in the world; the structure of owned modules may change. Under `vmap`, `lanes` are
    mapped scalars, and `varying` are numbers that differ between the lanes.
    """

    scalars: list[str]
    locked: list[str] = field(default_factory=list)
    numbers: list[str] = field(default_factory=list)
    modules: list[tuple[str, str]] = field(default_factory=list)
    owned: list[tuple[str, str]] = field(default_factory=list)
    lanes: list[str] = field(default_factory=list)
    varying: list[str] = field(default_factory=list)
    mapped: bool = False

    # Whether functions must not close over numbers, because these are new arrays at each call.
    typed: bool = False

    def inner(self) -> Scope:
        """The same names in a function that closes over them."""
        return replace(
            self,
            scalars=list(self.scalars),
            locked=list(self.locked),
            numbers=[] if self.typed else list(self.numbers),
            modules=list(self.modules),
            owned=[],
            lanes=list(self.lanes),
            varying=[] if self.typed else list(self.varying),
        )


@dataclass
class Options:
    """How likely each kind of statement is, and how deep transformations go."""

    depth: int = 2
    surgery: float = 0.15
    loops: float = 1.0
    branches: float = 1.0
    plain: float = 1.0
    lanes: float = 0.5
    # Whether functions may also be called without a transformation.
    direct: bool = True
    # Whether every value keeps its dtype, weak or not, and functions close over modules only.
    typed: bool = False


class Bodies:
    """Makes the statements of one program."""

    def __init__(
        self,
        rng: random.Random,
        world: World,
        options: Options,
        kinds: Callable[..., dict[Any, float]],
        *,
        real: bool = False,
    ):
        self.rng = rng
        self.kinds = kinds
        self.world = world
        self.options = options
        self.real = real
        self.may: dict[str, str] = {}
        # Calls of compiled functions that may be repeated.
        self.calls: list[str] = []
        # The objects that such a call goes through, for changes between calls: kind and name.
        self.routes: list[tuple[str, str]] = []
        self._count = 0

    def name(self, prefix: str) -> str:
        """A new name."""
        self._count += 1
        return f"{prefix}{self._count}"

    def top(self) -> Scope:
        """The names that are available outside all functions."""
        world = self.world
        scalars = [f"{r}.value" for r in world.refs]
        scalars += [f"{m}{end}" for m in world.modules for end in world.scalars[m]]
        modules = [(m, m) for m in world.modules]
        return Scope(scalars, modules=modules, owned=list(modules), typed=self.options.typed)

    # Expressions

    def read(self, scope: Scope, *, varying: bool = True) -> str:
        """Something that can be read."""
        rng = self.rng
        typed = self.options.typed
        if scope.modules and not typed and rng.random() < 0.15:
            return f"total({rng.choice(scope.modules)[0]})"
        if self.world.settings and not typed and rng.random() < 0.1:
            found = [m for m, w in scope.modules if w in self.world.settings]
            if found:
                return f"tag({rng.choice(found)}.mode){' / 100' if self.real else ''}"
        pool = scope.scalars + scope.locked + scope.numbers
        if varying:
            pool = pool + scope.lanes + scope.varying
        return rng.choice(pool) if pool else f"array({number(rng, self.real)})"

    def expression(self, scope: Scope, *, varying: bool = True) -> str:
        """A number computed from two readable things."""
        rng = self.rng
        a = self.read(scope, varying=varying)
        b = self.read(scope, varying=varying) if rng.random() < 0.6 else number(rng, self.real)
        return f"mix({a}, {b})"

    def predicate(self, scope: Scope) -> str:
        """A bool."""
        limit = "0.2617" if self.real else "40"
        if self.rng.random() < 0.1:
            return self.rng.choice(["True", "False"])
        return f"{self.read(scope, varying=False)} > {limit}"

    # Statements

    def body(self, scope: Scope, depth: int, size: int) -> list[Node]:
        """A few statements."""
        nodes: list[Node] = []
        for _ in range(size):
            nodes += self.statement(scope, depth)
        return nodes

    def statement(self, scope: Scope, depth: int) -> list[Node]:
        """One statement, and what it needs before it."""
        rng, options = self.rng, self.options
        if depth < options.depth and rng.random() < 0.35:
            return self.region(scope, depth)
        if scope.owned and rng.random() < options.surgery:
            return self.surgery(scope)
        if not scope.owned and rng.random() < options.surgery / 2:
            return self.closed_surgery(scope)
        return self.simple(scope)

    def simple(self, scope: Scope) -> list[Node]:
        """A read, a write or an exchange."""
        rng = self.rng
        kind = rng.choice(["write", "write", "write", "read", "swap", "share", "bump", "if"])
        if scope.lanes and rng.random() < 0.5:
            return [Line(f"{rng.choice(scope.lanes)} = {self.expression(scope)}")]
        if kind == "bump" and scope.modules and not scope.locked:
            return [Line(f"bump({rng.choice(scope.modules)[0]})")]
        if kind in ("swap", "share") and len(scope.scalars) > 1:
            a, b = rng.sample(scope.scalars, 2)
            return [Line(f"{a}, {b} = {b}, {a}" if kind == "swap" else f"{a} = {b}")]
        if kind == "if" and scope.scalars and self.world.settings:
            found = [m for m, w in scope.modules if w in self.world.settings]
            if found:
                group = rng.choice(TWINS[:5])
                # NumPy compares an array with a tuple elementwise.
                setting = rng.choice([x for x in group if "np." not in x])
                line = Line(
                    f"{rng.choice(scope.scalars)} = {self.expression(scope, varying=False)}"
                )
                return [Block(f"if {rng.choice(found)}.mode == {setting}:", (line,))]
        if kind == "read" or not scope.scalars:
            name = self.name("v")
            line = Line(f"{name} = {self.expression(scope)}")
            (scope.varying if scope.mapped else scope.numbers).append(name)
            return [line]
        target = rng.choice(scope.scalars)
        return [Line(f"{target} = {self.expression(scope, varying=False)}")]

    def surgery(self, scope: Scope) -> list[Node]:
        """A change of structure of a module that was passed in."""
        rng = self.rng
        name, world = rng.choice(scope.owned)
        other = rng.choice(scope.modules)[0]
        if world in self.world.leaves:
            second = rng.choice([m for m, w in scope.modules if w in self.world.leaves])
            return [Line(f'{name}.w = cell({second}, "w")')]
        new = f"array({number(rng, self.real)})"
        if rng.random() < 0.3:
            return self.let_go(name, other)
        kind = rng.randrange(13)
        if kind == 0:
            return [Line(f"{name}.extra = Ref({new})")]
        if kind == 1:
            return [Line(f"{name}.head = {other}")]
        if kind == 2:
            return [Block(f'if hasattr({name}, "kids"):', (Line(f"{name}.kids.append({other})"),))]
        if kind == 3:
            return [Block(f'if getattr({name}, "kids", None):', (Line(f"{name}.kids.pop()"),))]
        if kind == 4:
            setting = rng.choice(rng.choice(TWINS))
            self.world.settings.setdefault(world, setting)
            return [Line(f"{name}.mode = {setting}")]
        if kind == 5:
            return [Line(f"{name}.level = {rng.choice(['1', 'True', '2', '1.0'])}")]
        if kind == 6:
            return [Block(f'if hasattr({name}, "extra"):', (Line(f"del {name}.extra"),))]
        if kind == 7:
            return [Line(f"{name}.arr = {self.expression(scope)}")]
        if kind == 8:
            return [Line(f"{name}.late = {rng.choice(['None', f'Leaf({new}, {new})', other])}")]
        if kind == 9:
            return [Line(f"{name}.kids = [{other}, {name}]")]
        return self.rearrangement(name, other, new)

    def let_go(self, name: str, other: str) -> list[Node]:
        """A change of a part that the module no longer holds; another name may hold it."""
        kids, rng = self.name("k"), self.rng
        if rng.random() < 0.25:
            lines = (f"{kids} = {name}.kids", f"{name}.kids = []", f"{kids}.append({other})")
            return [Block(f'if hasattr({name}, "kids"):', tuple(map(Line, lines)))]
        place = rng.choice(["head", "late", "up"])
        change = rng.choice([f"{name}.{place}.level = 3", f"{name}.{place}.extra = {other}"])
        lines = (change, rng.choice([f"{name}.{place} = None", f"del {name}.{place}"]))
        is_module = f'isinstance(getattr({name}, "{place}", None), (Leaf, Plain))'
        return [Block(f"if {is_module}:", tuple(map(Line, lines)))]

    def rearrangement(self, name: str, other: str, new: str) -> list[Node]:
        """A change of things that two names share: lists, dicts, Refs and modules that move or are tied."""
        kids = f'hasattr({name}, "kids") and hasattr({other}, "kids")'
        table = f'hasattr({name}, "table")'
        ref = self.name("r")
        ways = {
            kids: [
                f"{name}.kids, {other}.kids = {other}.kids, {name}.kids",
                f"{other}.kids = {name}.kids",
                f"{name}.kids[:] = {other}.kids",
                f"{name}.kids.insert(0, {other})",
            ],
            f'hasattr({name}, "kids")': [
                f"{name}.kids = {name}.kids[::-1]",
                f"{name}.kids.reverse()",
                f"del {name}.kids[:1]",
                f"{name}.late = {name}.kids",
                f"{name}.kids[:1] = [{{'n': {other}, 'l': [{name}]}}]",
            ],
            table: [
                f'{name}.table["z"] = {other}',
                f'{name}.table["a"] = {new}',
                f'{name}.table.pop("a", None)',
                f"{name}.table = dict({name}.table)",
                f"{name}.late = {name}.table",
                f'{name}.table["b"] = Ref({new})',
            ],
            f'hasattr({name}, "pair")': [
                f"{name}.pair = {name}.pair[::-1]",
                f"{name}.pair = ({other}, *{name}.pair)",
                f"{name}.late = {name}.pair",
            ],
            f'hasattr({name}, "head")': [
                f"{name}.head, {name}.late = getattr({name}, 'late', None), {name}.head",
                f"{name}.head = clone({name}.head)",
                f"{name}.extra = {name}.head",
            ],
            f'hasattr({name}, "x")': [
                f"{name}.x = Ref({new})",
                f"{name}.extra = {name}.x",
                f"{name}.x, {name}.extra = {name}.extra, {name}.x"
                if self.rng.random() < 0.2
                else f"{name}.y = {name}.x",
            ],
        }
        condition = self.rng.choice(list(ways))
        if self.rng.random() < 0.2:
            lines = (f"{ref} = Ref({new})", f"{name}.extra = {ref}", f"{other}.late = [{ref}]")
            return [Line(line) for line in lines]
        return [Block(f"if {condition}:", (Line(self.rng.choice(ways[condition])),))]

    def closed_surgery(self, scope: Scope) -> list[Node]:
        """A change of a module's list that is also closed over, or held by a variable."""
        found = [m for m, w in scope.modules if w in self.world.plains]
        # In lanes and derivatives the body runs once, but in Python it runs several times.
        if not found or scope.mapped or scope.locked:
            return self.simple(scope)
        name, other = self.rng.choice(found), self.rng.choice(scope.modules)[0]
        change = self.rng.choice([f"append({other})", "clear()", "reverse()", "append(1)"])
        return [Block(f'if hasattr({name}, "kids"):', (Line(f"{name}.kids.{change}"),))]

    # Transformations

    def region(self, scope: Scope, depth: int) -> list[Node]:
        """A function and a call of it in a transformation."""
        kinds = self.kinds(self.options, scope, self.real)
        make = self.rng.choices(list(kinds), list(kinds.values()))[0]
        return make(self, scope, depth)

    def loop(self, scope: Scope, depth: int) -> list[Node]:
        """A loop or a branch."""
        kinds = self.kinds(Options(plain=0, lanes=0), scope, False)
        make = self.rng.choices(list(kinds), list(kinds.values()))[0]
        return make(self, scope, depth)
