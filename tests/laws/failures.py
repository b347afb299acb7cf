"""Law 7: whatever raises, wherever, the caller's objects are unchanged, and nothing stays alive because of it."""

from __future__ import annotations

import collections
import gc
import random
import weakref
from dataclasses import replace
from typing import Any

import jax

import nnx
from tests.laws import programs
from tests.laws.program import (
    NNX,
    Block,
    Line,
    Node,
    Program,
    Verdict,
    compare,
    execute,
    expected_of,
)


def make(seed: int) -> Program:
    """A program of law 3 or 4 in which a function raises somewhere."""
    rng = random.Random(f"7 {seed}")
    program = programs.general(rng.choice([3, 4]), rng, seed, direct=False)
    # What ordinary Python did before the error stays done, so every call must keep its transformation.
    steps = tuple(Line(x.text) if isinstance(x, Line) else x for x in program.steps)
    places = list(_places(steps, ()))
    if places and rng.random() < 0.85:
        line = rng.choice(["raise Boom()", "raise Boom()", "fail()"])
        steps = _insert(steps, rng.choice(places), line)
    # Branches that are traced but not taken raise too.
    may = (
        *program.may,
        ("Boom", "tracing goes through every branch"),
        ("TypeError", "a callback raises when the program runs, and tracing goes on after it"),
        ("AttributeError", "tracing goes on to what Python never reaches"),
        ("IndexError", "tracing goes on to what Python never reaches"),
        ("NotImplementedError", "JAX has no callbacks with an order in a vmapped cond"),
        ("Exception", "JAX has no callbacks with an order in a vmapped while_loop"),
    )
    return replace(program, law=7, steps=steps, may=may)


def _places(nodes: tuple[Node, ...], path: tuple[int, ...], inside: bool = False) -> Any:
    """The positions in the bodies of functions where a line may be put."""
    for i, node in enumerate(nodes):
        if inside:
            yield (*path, i)
        if isinstance(node, Block):
            # What a block of ordinary Python did before it raises stays done.
            yield from _places(node.body, (*path, i), inside or node.head.startswith("def "))


def _insert(nodes: tuple[Node, ...], path: tuple[int, ...], text: str) -> tuple[Node, ...]:
    at = path[0]
    if len(path) == 1:
        return (*nodes[:at], Line(text), *nodes[at:])
    block = nodes[at]
    assert isinstance(block, Block)
    new = Block(block.head, _insert(block.body, path[1:], text))
    return (*nodes[:at], new, *nodes[at + 1 :])


_OURS = (nnx.Ref, nnx.Module, jax.core.Tracer)


def forget_older() -> None:
    """Take out of the census, and of its time, what is there already."""
    gc.collect()
    gc.freeze()


def census(kinds: tuple[type, ...] = _OURS) -> collections.Counter[str]:
    """How many objects of these classes are alive, without those from before `gc.freeze`."""
    gc.collect()
    counts: collections.Counter[str] = collections.Counter()
    for x in gc.get_objects():
        kind = type(x)
        if issubclass(kind, kinds):
            counts[kind.__name__] += 1
    return counts


def judge(program: Program) -> Verdict:
    """Compare with Python, and then check which objects are still alive."""
    program, expected = expected_of(program)
    if expected is None:
        return Verdict("void", "means nothing in Python")
    forget_older()
    before = census()
    watched: list[weakref.ref[Any]] = []
    verdict = compare(program, expected, execute(program, NNX, watched))
    if verdict.wrong:
        return verdict
    grown = census() - before
    if verdict.error and "jit(" in str(program):
        # If an exception ends a trace of jax.jit whose function closes over arrays, JAX itself keeps
        # the tracers and constants. Every other trace finishes first.
        del grown["DynamicJaxprTracer"]
        watched = [w for w in watched if not isinstance(w(), jax.Array)]
    alive = [type(x).__name__ for w in watched if (x := w()) is not None]
    if grown or alive:
        detail = f"{verdict.kind} {verdict.detail}; alive: {dict(grown)}, {alive}"
        return Verdict("leak", detail, error=verdict.error)
    return verdict
