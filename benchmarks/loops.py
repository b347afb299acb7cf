"""Loops and branches outside compiled programs: the second and later calls, compared with `jax.lax`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import nnx
from benchmarks.timing import Ratio, interleave, repeat


class _Cell(nnx.Module):
    w: jax.Array = nnx.param()
    n: jax.Array = nnx.ref("counters")

    def __init__(self) -> None:
        self.w = jnp.full((4, 4), 0.1)
        self.n = jnp.array(0)

    def __call__(self, x: jax.Array) -> jax.Array:
        self.n += 1
        return jnp.tanh(x @ self.w)


STEPS = 4


def _pure(w: jax.Array, n: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.tanh(x @ w), n + 1


def _lax(x: jax.Array, xs: jax.Array) -> dict[str, Callable[[], Any]]:
    """The hand-written loops, each with the same functions at every call."""
    w, n = jnp.full((4, 4), 0.1), jnp.array(0)

    def scanned(c: Any, x: Any) -> Any:
        y, m = _pure(w, c, x)
        return m, y

    def stepped(i: Any, c: Any) -> Any:
        return _pure(w, c[1], c[0])

    def going(c: Any) -> Any:
        return c[2] < STEPS

    def looped(c: Any) -> Any:
        return (*_pure(w, c[1], c[0]), c[2] + 1)

    def one(n: Any, x: Any) -> Any:
        return _pure(w, n, x)

    def other(n: Any, x: Any) -> Any:
        return x, n

    def mapped(x: Any) -> Any:
        return jnp.tanh(x @ w)

    return {
        "scan": lambda: jax.lax.scan(scanned, n, xs),
        "fori_loop": lambda: jax.lax.fori_loop(0, STEPS, stepped, (x, n)),
        "while_loop": lambda: jax.lax.while_loop(going, looped, (x, n, 0)),
        "cond": lambda: jax.lax.cond(True, one, other, n, x),
        "switch": lambda: jax.lax.switch(0, [one, other], n, x),
        "map": lambda: jax.lax.map(mapped, xs),
    }


def _ours(x: jax.Array, xs: jax.Array) -> dict[str, Callable[..., Any]]:
    """The calls of the loops, given their functions; and under "functions", what makes these from a cell."""

    def functions(cell: _Cell) -> dict[str, Any]:
        return {
            "scan": lambda c, x: (c, cell(x)),
            "fori_loop": lambda i, x: cell(x),
            "while_loop": (lambda c: c[1] < STEPS, lambda c: (cell(c[0]), c[1] + 1)),
            "cond": (lambda x: cell(x), lambda x: x),
            "switch": (lambda x: cell(x), lambda x: x),
            "map": lambda x: jnp.tanh(x @ cell.w),
        }

    calls = {
        "scan": lambda f: nnx.scan(f, None, xs),
        "fori_loop": lambda f: nnx.fori_loop(0, STEPS, f, x),
        "while_loop": lambda f: nnx.while_loop(*f, (x, 0)),
        "cond": lambda f: nnx.cond(True, *f, x),
        "switch": lambda f: nnx.switch(0, f, x),
        "map": lambda f: nnx.map(f, xs),
    }
    return {"functions": functions, **calls}


def measure(rounds: int) -> dict[str, dict[str, Ratio]]:
    """Ratios to `jax.lax`, with the same function and with a new lambda of the same code."""
    x, xs = jnp.ones((2, 4)), jnp.ones((STEPS, 2, 4))
    by_hand, ours = _lax(x, xs), _ours(x, xs)
    make = ours.pop("functions")
    cell = _Cell()
    kept = make(cell)
    rows = {}
    for name, call in ours.items():
        rows[name] = interleave(
            {
                "jax.lax": repeat(by_hand[name]),
                "nnx, the same function": repeat(lambda n=name, c=call: c(kept[n])),
                "nnx, a new lambda": repeat(lambda n=name, c=call: c(make(cell)[n])),
            },
            "jax.lax",
            rounds=rounds,
        )
    return rows
