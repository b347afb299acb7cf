"""How the cost of an evaluation step grows with arrays, with nesting, and with shared uses."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nnx


class _Node(nnx.Module):
    def __init__(self, child: Any = None):
        self.w = nnx.Ref(jnp.ones(()), "params")
        self.child = child


def _wide(n: int) -> Any:
    root = _Node()
    root.children = [_Node() for _ in range(n - 1)]
    return root


def _deep(n: int) -> Any:
    node = _Node()
    for _ in range(n - 1):
        node = _Node(node)
    return node


def _shared(n: int) -> Any:
    # 100 arrays, one of which is used n times.
    root = _wide(100)
    root.uses = [root.children[0]] * n
    return root


SHAPES = {"arrays": _wide, "depth of nesting": _deep, "uses of one shared module": _shared}


def measure(sizes: tuple[int, ...] = (100, 500, 1000, 2000, 4000)) -> dict[str, dict[str, Any]]:
    """For each kind of growth: microseconds by size, the slope in ns, and the worst misfit of a line."""
    f = nnx.jit(lambda m, x: x + m.w.value)
    x = jnp.ones(())
    result = {}
    for name, make in SHAPES.items():
        times = []
        for size in sizes:
            model = make(size)
            f(model, x)
            calls = max(5, 20000 // size)
            best = min(_once(f, model, x, calls) for _ in range(7))
            times.append(best * 1e6)
        slope, offset = np.polyfit(sizes, times, 1)
        fit = slope * np.array(sizes) + offset
        result[name] = {
            "microseconds": dict(zip(map(str, sizes), times, strict=True)),
            "slope in ns": slope * 1e3,
            "worst misfit": float(np.max(np.abs(fit - times)) / max(times)),
        }
    return result


def _once(f: Any, model: Any, x: Any, calls: int) -> float:
    start = time.perf_counter()
    out = None
    for _ in range(calls):
        out = f(model, x)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls
