"""Random modules: Refs and submodules that are shared, lists, dicts, tuples, cycles, plain arrays, settings."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tests.laws.program import Line, Node
from tests.laws.things import TWINS


@dataclass
class World:
    """The names that a prelude made, and the paths to their Refs and arrays.

    `scalars` maps the name of a module to the ends of the expressions that read and write one of its Refs.
    """

    lines: list[Node] = field(default_factory=list)
    refs: list[str] = field(default_factory=list)
    leaves: list[str] = field(default_factory=list)
    plains: list[str] = field(default_factory=list)
    stacks: list[str] = field(default_factory=list)
    scalars: dict[str, list[str]] = field(default_factory=dict)
    arrays: dict[str, list[str]] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def modules(self) -> list[str]:
        """The modules without an axis."""
        return [*self.leaves, *self.plains]

    def add(self, text: str) -> None:
        """One more line."""
        self.lines.append(Line(text))


def number(rng: random.Random, real: bool) -> str:
    """A small number as source text."""
    return f"{rng.randint(-8, 8) / 8}" if real else f"{rng.randint(0, 40)}"


def make_world(rng: random.Random, *, real: bool = False, stacks: bool = True) -> World:
    """A random world of a few modules."""
    world = World()
    shared = rng.random() < 0.4
    if shared:
        world.add(f"a0 = array({number(rng, real)})")

    def value() -> str:
        if shared and rng.random() < 0.6:
            return "a0"
        return f"array({number(rng, real)})"

    for i in range(rng.randint(1, 3)):
        collection = rng.choice(['"params"', '"counters"', "None"])
        world.add(f"r{i} = Ref({value()}, {collection})")
        world.refs.append(f"r{i}")
    for i in range(rng.randint(1, 3)):
        name = f"l{i}"
        world.add(f"{name} = Leaf({value()}, {value()})")
        world.leaves.append(name)
        world.scalars[name] = [".w", ".c"]
        if i and rng.random() < 0.25:
            world.add(f'{name}.w = cell(l0, "w")')
        elif rng.random() < 0.1:
            world.add(f"{name}.c = None")
            world.scalars[name] = [".w"]
    for i in range(rng.randint(0, 3)):
        _plain(rng, world, f"p{i}", real)
    if stacks and rng.random() < 0.5:
        values = [", ".join(number(rng, real) for _ in range(3)) for _ in range(2)]
        if shared and rng.random() < 0.3:
            world.add(f"a9 = array([{values[0]}])")
            world.add("s0 = Leaf(a9, a9)")
        else:
            world.add(f"s0 = Leaf(array([{values[0]}]), array([{values[1]}]))")
        world.stacks.append("s0")
        world.scalars["s0"] = [".w", ".c"]
    return world


def _plain(rng: random.Random, world: World, name: str, real: bool) -> None:
    kind = rng.choice(["Plain", "Plain", "Over", "Own"])
    world.add(f"{name} = {kind}()")
    scalars: list[str] = []
    arrays: list[str] = []
    if rng.random() < 0.6:
        world.add(f"{name}.x = {rng.choice(world.refs)}")
        scalars.append(".x.value")
    if rng.random() < 0.6:
        other = rng.choice(world.modules)
        world.add(f"{name}.head = {other}")
        scalars += [f".head{end}" for end in world.scalars[other]]
    if rng.random() < 0.5:
        kids = [rng.choice(world.leaves) for _ in range(rng.randint(0, 3))]
        world.add(f"{name}.kids = [{', '.join(kids)}]")
        scalars += [f".kids[{i}]{end}" for i, k in enumerate(kids) for end in world.scalars[k]]
    if rng.random() < 0.4:
        leaf, ref = rng.choice(world.leaves), rng.choice(world.refs)
        world.add(f'{name}.table = {{"a": {leaf}, "b": {ref}}}')
        scalars += [*(f'.table["a"]{end}' for end in world.scalars[leaf]), '.table["b"].value']
    if rng.random() < 0.3:
        ref, leaf = rng.choice(world.refs), rng.choice(world.leaves)
        world.add(f"{name}.pair = ({ref}, {leaf})")
        scalars += [".pair[0].value", *(f".pair[1]{end}" for end in world.scalars[leaf])]
    if rng.random() < 0.4:
        world.add(f"{name}.arr = array({number(rng, real)})")
        arrays.append(".arr")
    if rng.random() < 0.15:
        # One array twice, where nothing with an identity holds it.
        world.add(f"{name}.y = (array({number(rng, real)}),) * 2")
        arrays += [".y[0]", ".y[1]"]
    if rng.random() < 0.6:
        setting = rng.choice(rng.choice(TWINS))
        world.add(f"{name}.mode = {setting}")
        world.settings[name] = setting
    if rng.random() < 0.2:
        world.add(f"{name}.me = {name}")
    if world.plains and rng.random() < 0.2:
        world.add(f"{world.plains[0]}.up = {name}")
    world.plains.append(name)
    world.scalars[name] = scalars
    world.arrays[name] = arrays
