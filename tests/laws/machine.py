"""One program of one law: made, judged, and made smaller if it fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.laws import programs
from tests.laws.program import Program, forget, judge
from tests.laws.shrink import shrink

LAWS = (3, 4, 5, 6)


@dataclass
class Outcome:
    """How it went; the program is the smallest that goes the same way."""

    kind: str
    detail: str
    program: Any
    wrong: bool


def run_one(law: int, seed: int, seconds: float = 30.0) -> Outcome:
    """Run the program of a law with that seed."""
    program = programs.make(law, seed)
    verdict = judge(program)
    if not verdict.wrong:
        return Outcome(verdict.kind, verdict.detail, program, False)

    def fails(smaller: Program) -> bool:
        # What earlier programs left in caches must not decide.
        forget()
        return judge(smaller).kind == verdict.kind

    if not fails(program):
        note = "\n(It goes right by itself: something that ran before it was taken for it.)"
        return Outcome(verdict.kind, verdict.detail + note, program, True)
    smallest = shrink(program, fails, seconds)
    return Outcome(verdict.kind, judge(smallest).detail, smallest, True)
