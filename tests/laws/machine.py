"""One program of one law: made, judged, and made smaller if it fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.laws import costs, failures, programs, trees
from tests.laws import program as program_
from tests.laws.program import Program, Verdict, forget
from tests.laws.shrink import shrink

LAWS = (1, 2, 3, 4, 5, 6, 7, 8, 9)
# The number of programs of each law in a round. Programs that compile nothing are a hundred times cheaper.
SHARES = {1: 15, 2: 15, 3: 3, 4: 3, 5: 3, 6: 2, 7: 2, 8: 1, 9: 4}
_TREES = (1, 2, 9)


def make(law: int, seed: int) -> Program:
    """The program of a law for a seed; it is the same each time."""
    if law in _TREES:
        return trees.make(law, seed)
    if law == 7:
        return failures.make(seed)
    return costs.make(seed) if law == 8 else programs.make(law, seed)


def judge(program: Program) -> Verdict:
    """Run a program and return the outcome."""
    if program.law in _TREES:
        return trees.judge(program)
    if program.law == 7:
        return failures.judge(program)
    return costs.judge(program) if program.law == 8 else program_.judge(program)


@dataclass
class Outcome:
    """The outcome, with the smallest program that has the same outcome."""

    kind: str
    detail: str
    program: Any
    wrong: bool


def run_one(law: int, seed: int, seconds: float = 30.0) -> Outcome:
    """Run the program of a law with that seed."""
    program = make(law, seed)
    verdict = judge(program)
    if not verdict.wrong:
        return Outcome(verdict.kind, verdict.detail, program, False)

    def fails(smaller: Program) -> bool:
        # The outcome must not depend on what earlier programs left in caches.
        if law not in _TREES:
            forget()
        found = judge(smaller)
        return (found.kind, found.error) == (verdict.kind, verdict.error)

    if not fails(program):
        note = "\n(It succeeds when run alone: an earlier program was mistaken for it.)"
        return Outcome(verdict.kind, verdict.detail + note, program, True)
    smallest = shrink(program, fails, seconds)
    return Outcome(verdict.kind, judge(smallest).detail, smallest, True)
