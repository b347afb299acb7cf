"""A whole epoch as one program: 100 steps under `nnx.scan`, compared with 100 dispatches of a step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import nnx
from benchmarks import workloads as w
from benchmarks.timing import Ratio, interleave

STEPS = 100


def epoch(arrays: int, rounds: int) -> dict[str, Ratio]:
    x, y = w.data()
    batches = (jnp.stack([x] * STEPS), jnp.stack([y] * STEPS))
    state = {"params": w.arrays(arrays // 2)}
    model = w.ours(arrays // 2)

    @jax.jit
    def hand(params: Any, x: Any, y: Any) -> Any:
        grads = jax.grad(lambda p: jnp.mean((w.forward(p, x) - y) ** 2))(params)
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, grads)

    @nnx.jit
    def step(model: Any, batch: Any) -> None:
        grads = nnx.grad(w.loss)(model, *batch)
        model["params"] = jax.tree.map(lambda p, g: p - 0.01 * g, model["params"], grads)

    @nnx.jit
    def train(model: Any, batches: Any) -> None:
        nnx.scan(lambda _, batch: (None, step(model, batch)), None, batches)

    @jax.jit
    def hand_epoch(params: Any, batches: Any) -> Any:
        return jax.lax.scan(lambda p, b: (hand(p, *b), None), params, batches)[0]

    scanned = {"params": w.arrays(arrays // 2)}

    def by_hand_scan(calls: int) -> Any:
        for _ in range(calls):
            scanned["params"] = hand_epoch(scanned["params"], batches)
        return scanned["params"]

    def by_dispatch(calls: int) -> Any:
        for _ in range(calls):
            for _ in range(STEPS):
                state["params"] = hand(state["params"], x, y)
        return state["params"]

    def by_scan(calls: int) -> Any:
        for _ in range(calls):
            train(model, batches)
        return jax.tree.leaves(model)

    return interleave(
        {
            "100 jax.jit dispatches": by_dispatch,
            "hand-written lax.scan": by_hand_scan,
            "nnx.scan": by_scan,
        },
        "100 jax.jit dispatches",
        rounds=rounds,
    )
