"""Trace, lower and compile times of a step, with a new function each time."""

from __future__ import annotations

import gc
import random
import statistics
import time
from typing import Any

import equinox as eqx
import flax.nnx as fnx
import jax
import jax.numpy as jnp

import nnx
from benchmarks import workloads as w
from benchmarks.timing import Ratio, ratio


def _steps(layers: int) -> dict[str, Any]:
    """For each contender, a function that makes and traces a new step, and its arguments."""
    x, y = w.data()
    params, model, flax_model, eqx_model = (
        w.arrays(layers),
        w.ours(layers),
        w.flax(layers),
        w.equinox(layers),
    )

    def sgd(p: Any, g: Any) -> Any:
        return jax.tree.map(lambda p, g: p - 0.01 * g, p, g)

    def hand() -> Any:
        def step(params: Any, x: Any, y: Any) -> Any:
            return sgd(params, jax.grad(lambda p: jnp.mean((w.forward(p, x) - y) ** 2))(params))

        return jax.jit(step).trace(params, x, y)

    def ours() -> Any:
        def step(m: Any, x: Any, y: Any) -> None:
            m["params"] = sgd(m["params"], nnx.grad(lambda m: w.loss(m, x, y))(m))

        return nnx.jit(step).trace(model, x, y)

    def equinox() -> Any:
        def step(m: Any, x: Any, y: Any) -> Any:
            return sgd(m, jax.grad(lambda m: w.loss(m, x, y))(m))

        return jax.jit(step).trace(eqx_model, x, y)

    def flax() -> Any:
        def step(m: Any, x: Any, y: Any) -> None:
            fnx.update(m, sgd(fnx.state(m, fnx.Param), fnx.grad(lambda m: w.loss(m, x, y))(m)))

        return fnx.jit(step).trace(flax_model, x, y)

    assert eqx is not None
    return {"jax.jit": hand, "nnx.jit": ours, "equinox": equinox, "flax nnx.jit": flax}


STAGES = ("trace", "lower", "compile", "all")


def stages(layers: int, rounds: int) -> dict[str, dict[str, Ratio]]:
    """Ratios to the hand-written step, by stage and in total."""
    contenders = _steps(layers)
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in contenders}
    order, rng = list(contenders), random.Random(0)
    for _ in range(rounds + 1):
        rng.shuffle(order)
        for name in order:
            gc.collect()
            gc.disable()
            marks = [time.perf_counter()]
            traced = contenders[name]()
            marks.append(time.perf_counter())
            lowered = traced.lower()
            marks.append(time.perf_counter())
            lowered.compile()
            marks.append(time.perf_counter())
            gc.enable()
            parts = [b - a for a, b in zip(marks, marks[1:], strict=False)]
            times[name].append((*parts, sum(parts)))
    # The first round compiles what each process compiles only once.
    by_stage = {name: list(zip(*rows[1:], strict=True)) for name, rows in times.items()}
    base = by_stage["jax.jit"]
    return {
        name: {
            stage: ratio(list(mine), list(theirs))
            for stage, mine, theirs in zip(STAGES, rows, base, strict=True)
        }
        for name, rows in by_stage.items()
    }


def depth(rounds: int, depths: tuple[int, ...] = (8, 64)) -> dict[str, float]:
    """Trace + compile seconds of a step over layers in a Python loop and in `nnx.scan`."""
    x, y = w.data()

    def seconds(loss: Any, model: Any) -> float:
        taken = []
        for _ in range(rounds):
            start = time.perf_counter()

            def step(m: Any) -> None:
                grads = nnx.grad(lambda m: loss(m))(m)
                m["params"] = jax.tree.map(lambda p, g: p - 0.01 * g, m["params"], grads)

            nnx.jit(step).lower(model).compile()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    def scanned(m: Any) -> jax.Array:
        out, _ = nnx.scan(lambda x, layer: (layer(x), None), x, m)
        return jnp.mean((out - y) ** 2)

    result = {}
    for n in depths:
        params = w.arrays(n)
        stack = w.Linear(jnp.stack([p["w"] for p in params]), jnp.stack([p["b"] for p in params]))
        result[f"Python loop, {n} layers"] = seconds(lambda m: w.loss(m, x, y), w.ours(n))
        result[f"nnx.scan, {n} layers"] = seconds(scanned, stack)
    return result
