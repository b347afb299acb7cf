"""Memory of a large step with and without donation, compared with `jax.jit(donate_argnums=0)`."""

from __future__ import annotations

import gc
from typing import Any

import jax
import jax.numpy as jnp

import nnx
from benchmarks import workloads as w

SIZE, COUNT = 1024, 16


def _live() -> int:
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


def measure() -> dict[str, dict[str, float]]:
    """Arguments, outputs that are not aliases, temporaries, and live arrays after 3 steps, in MiB."""
    x = jnp.ones((8, SIZE))

    def params() -> list[jax.Array]:
        return [jnp.eye(SIZE) * (1 + 0.001 * i) for i in range(COUNT)]

    def loss(ws: Any, x: Any) -> Any:
        for m in ws:
            x = jnp.tanh(x @ m)
        return jnp.mean(x**2)

    def hand(ws: Any, x: Any) -> Any:
        grads = jax.grad(loss)(ws, x)
        return [a - 0.1 * g for a, g in zip(ws, grads, strict=True)]

    def our(model: Any, x: Any) -> None:
        grads = nnx.grad(lambda m: loss([r.value for r in m.layers], x))(model)
        model["params"] = jax.tree.map(lambda a, g: a - 0.1 * g, model["params"], grads)

    result: dict[str, dict[str, float]] = {}
    for donate in (False, True):
        before = _live()
        ws = params()
        step = jax.jit(hand, donate_argnums=(0,) if donate else ())
        stats = step.lower(ws, x).compile().memory_analysis()
        for _ in range(3):
            ws = step(ws, x)
        jax.block_until_ready(ws)
        result[f"jax.jit, donate={donate}"] = _row(stats, _live() - before)
        del ws
        before = _live()
        model = w.Stack([nnx.Ref(a, "params") for a in params()])
        stateful = nnx.jit(our, donate="params" if donate else None)
        stats = stateful.lower(model, x).compile().memory_analysis()
        for _ in range(3):
            stateful(model, x)
        jax.block_until_ready(jax.tree.leaves(model))
        result[f"nnx.jit, donate={donate}"] = _row(stats, _live() - before)
        del model
    return result


def _row(stats: Any, live: int) -> dict[str, float]:
    mib = 2.0**20
    peak = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
    )
    return {
        "arguments": stats.argument_size_in_bytes / mib,
        "new outputs": (stats.output_size_in_bytes - stats.alias_size_in_bytes) / mib,
        "temporaries": stats.temp_size_in_bytes / mib,
        "in all": peak / mib,
        "live after 3 steps": live / mib,
    }
