"""Random programs for the laws about programs."""

from __future__ import annotations

import random

from tests.laws.bodies import Bodies, Options
from tests.laws.changes import between, fresh, settings
from tests.laws.program import Node, Program
from tests.laws.regions import kinds
from tests.laws.world import make_world

# Errors that programs of a law may raise, and why. A program adds more, depending on what it does.
MAY: dict[int, dict[str, str]] = {
    3: {},
    4: {},
    5: {"ClosureError": "what no step leads to is an error"},
    6: {"UnhashableStaticError": "a setting that cannot be hashed"},
}
_SURGERY = {
    "StructureError": "a change of structure in a loop, or of what is closed over",
    "TraceLevelError": "a change of structure of what is closed over",
}


def make(law: int, seed: int) -> Program:
    """The program of a law for a seed; it is the same each time."""
    rng = random.Random(f"{law} {seed}")
    return general(law, rng, seed) if law in (3, 4) else _calls(law, rng, seed)


def general(law: int, rng: random.Random, seed: int, *, direct: bool = True) -> Program:
    """A program of law 3 or 4. Without `direct`, every function is called by a transformation."""
    real = rng.random() < 0.3
    loops = law == 4
    options = Options(
        depth=rng.choice([1, 1, 2, 2, 3]),
        surgery=rng.choice([0.0, 0.1, 0.3]),
        loops=3.0 if loops else 0.4,
        branches=0.5 if loops else 1.0,
        plain=0.7 if loops else 1.5,
        lanes=0.4,
        direct=direct,
    )
    world = make_world(rng, real=real)
    bodies = Bodies(rng, world, options, kinds, real=real)
    scope = bodies.top()
    steps: list[Node] = list(bodies.region(scope, 0))
    for _ in range(rng.randint(1, 3)):
        steps += between(bodies, scope) if rng.random() < 0.7 else bodies.statement(scope, 0)
    # Between calls the structure changes too, so an expression may then lead elsewhere.
    may = dict(MAY[law]) | bodies.may | _SURGERY
    return _program(law, world.lines, steps, may, real, rng, seed)


def _calls(law: int, rng: random.Random, seed: int) -> Program:
    real = False
    world = make_world(rng, real=real, stacks=False)
    bodies = Bodies(rng, world, Options(surgery=0.2), kinds, real=real)
    prelude, steps = (fresh if law == 5 else settings)(bodies)
    return _program(law, [*world.lines, *prelude], steps, MAY[law] | bodies.may, real, rng, seed)


def _program(
    law: int,
    prelude: list[Node],
    steps: list[Node],
    may: dict[str, str],
    real: bool,
    rng: random.Random,
    seed: int,
) -> Program:
    return Program(
        law,
        tuple(prelude),
        tuple(steps),
        tuple(may.items()),
        real,
        rng.random() < 0.4,
        seed,
    )
