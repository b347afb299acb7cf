"""The smallest program that fails in the same way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.laws.program import Block, Line, Node, Program

Nodes = tuple[Node, ...]


def shrink(program: Program, fails: Callable[[Program], bool], seconds: float = 30.0) -> Program:
    """Make a program smaller while `fails` says that it still fails."""
    end = time.monotonic() + seconds
    again = True
    while again and time.monotonic() < end:
        again = False
        for smaller in _smaller(program):
            if time.monotonic() > end:
                break
            if fails(smaller):
                program, again = smaller, True
                break
    return program


def _smaller(program: Program) -> Iterator[Program]:
    for steps in _chunks(program.steps):
        yield replace(program, steps=steps)
    for prelude in _chunks(program.prelude):
        yield replace(program, prelude=prelude)
    for steps in _variants(program.steps):
        yield replace(program, steps=steps)
    for prelude in _variants(program.prelude):
        yield replace(program, prelude=prelude)
    if program.cells:
        yield replace(program, cells=False)


def _chunks(nodes: Nodes) -> Iterator[Nodes]:
    """Versions without large parts, then without single nodes."""
    size = len(nodes) // 2
    while size >= 1:
        for start in range(0, len(nodes), size):
            yield nodes[:start] + nodes[start + size :]
        size //= 2


def _variants(nodes: Nodes) -> Iterator[Nodes]:
    """Versions with one node changed: a simpler call, a smaller body, a block without its head, a function inline."""
    for i, node in enumerate(nodes):
        before, after = nodes[:i], nodes[i + 1 :]
        if isinstance(node, Line):
            for text in (*node.simpler, *_shorter(node.text)):
                yield (*before, Line(text), *after)
            continue
        for body in _chunks(node.body):
            yield (*before, Block(node.head, body), *after)
        for body in _variants(node.body):
            yield (*before, Block(node.head, body), *after)
        if not node.head.startswith("def "):
            yield (*before, *node.body, *after)
        else:
            name = node.head[4:].split("(")[0]
            body = tuple(
                n for n in node.body if not (isinstance(n, Line) and n.text.startswith("return"))
            )
            rest = tuple(n for n in after if not (isinstance(n, Line) and name in n.text))
            if len(rest) < len(after):
                yield (*before, *body, *rest)


def _shorter(text: str) -> Iterator[str]:
    """The line with one call of `mix`, `total` or `tag` replaced by one of its parts."""
    for call in ("mix(", "total(", "tag("):
        at = text.find(call)
        while at >= 0:
            end, commas = _close(text, at + len(call))
            inside = text[at + len(call) : end]
            parts = [inside]
            if commas:
                parts = [inside[: commas[0]], inside[commas[0] + 1 :].strip()]
            for part in parts if call == "mix(" else ["1", "array(1)"]:
                yield text[:at] + part + text[end + 1 :]
            at = text.find(call, at + 1)
    if text.startswith("return ") and text != "return None":
        yield "return None"


def _close(text: str, start: int) -> tuple[int, list[int]]:
    """The end of the bracket that was opened before `start`, and its commas from `start` on."""
    depth, commas = 1, []
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i, commas
        if depth == 1 and text[i] == ",":
            commas.append(i - start)
    return len(text), commas
