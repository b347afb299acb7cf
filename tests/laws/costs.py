"""Law 8: a call like an earlier one traces nothing and compiles nothing, and nothing grows."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import jax

from tests.laws.bodies import Bodies, Options
from tests.laws.failures import census, forget_older
from tests.laws.program import NNX, Block, Line, Node, Program, Verdict, render
from tests.laws.regions import kinds
from tests.laws.world import make_world

_compiled = [0]


def _listen(name: str, seconds: float, **_: Any) -> None:
    if name.endswith("backend_compile_duration"):
        _compiled[0] += 1


jax.monitoring.register_event_duration_secs_listener(_listen)

_WARM, _CALLS = 5, 4


def make(seed: int) -> Program:
    """A function with transformations in it, which is called again and again."""
    rng = random.Random(f"8 {seed}")
    real = rng.random() < 0.3
    world = make_world(rng, real=real)
    options = Options(depth=rng.choice([1, 1, 2]), surgery=0, typed=True)
    bodies = Bodies(rng, world, options, kinds, real=real)
    scope = bodies.top()
    scope.owned = []
    compiled = rng.random() < 0.35
    # Outside compiled code, `vmap`, `grad`, `remat` and a new `jit` run their function at each call, as in JAX.
    body = bodies.region(scope.inner(), 0) if compiled else bodies.loop(scope.inner(), 0)
    body = [*body, *bodies.simple(scope.inner())]
    if compiled:
        body.append(Line("bump(m)"))
    step: list[Node] = [Block("def step(m):", tuple(body))]
    if compiled:
        step.append(Line("step = jit(step)"))
    # A new module with the same structure in each call counts as the same.
    call = rng.choice(["step(l0)", "step(clone(l0))"]) if compiled else "step(None)"
    return Program(
        8, (*world.lines, *step), (Line(call),), tuple(bodies.may.items()), real, seed=seed
    )


def _ticking(nodes: tuple[Node, ...], depth: int = 0) -> tuple[Node, ...]:
    """The same program with a `tick()` at the start of every inner function, which counts the traces."""
    new: list[Node] = []
    for node in nodes:
        if isinstance(node, Block):
            inner = node.head.startswith("def ")
            body = _ticking(node.body, depth + inner)
            node = Block(node.head, (Line("tick()"), *body) if inner and depth else body)
        new.append(node)
    return tuple(new)


def judge(program: Program) -> Verdict:
    """Call the function a few times, and then count."""
    NNX.real = program.real
    ticks = [0]

    def tick() -> None:
        ticks[0] += 1

    names = NNX.namespace() | {"tick": tick}
    try:
        exec("\n".join(render(_ticking(program.prelude), 0)), names)
        call = compile("\n".join(render(program.steps, 0)), "<call>", "exec")
        for _ in range(_WARM):
            exec(call, names)
    except Exception as error:
        # This check does not care whether it may raise.
        NNX.restore()
        return Verdict("void", f"{type(error).__name__}: {error}")
    ticks[0] = _compiled[0] = 0
    counts = []
    forget_older()
    try:
        for _ in range(3):
            counts.append(census((object,)))
            for _ in range(_CALLS):
                exec(call, names)
        counts.append(census((object,)))
    except Exception as error:
        return Verdict(f"raised {type(error).__name__}", str(error))
    finally:
        NNX.restore()
    if ticks[0] or _compiled[0]:
        kind = "compiled again" if _compiled[0] else "traced again"
        return Verdict(kind, f"{3 * _CALLS} calls: {ticks[0]} traces, {_compiled[0]} compilations")
    # Whatever every call leaves behind is there after each round of calls.
    rounds = [after - before for before, after in pairwise(counts)]
    grown = {k: n for k, n in rounds[-1].items() if all(r[k] >= _CALLS for r in rounds)}
    return Verdict("grew", f"by {grown} in {_CALLS} calls") if grown else Verdict("ok")
