"""Calls of a compiled step whose arrays are spread over four devices, compared with `jax.jit` and flax.

A CPU has one device, unless JAX is told otherwise before it starts. So this runs in a separate process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import flax.nnx as fnx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nnx
from benchmarks import workloads as w
from benchmarks.timing import Contender, Ratio, interleave

DEVICES, RATE = 4, 0.01
KINDS = ("decay", "SGD")


def measure(sizes: list[int], rounds: int) -> dict[str, dict[int, dict[str, Ratio]]]:
    """Ratios to the hand-written step, by kind of step and by number of arrays."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    program = [sys.executable, "-m", "benchmarks.sharded", str(rounds), *map(str, sizes)]
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(program, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        kind: {int(n): {name: Ratio(*r) for name, r in row.items()} for n, row in by_size.items()}
        for kind, by_size in found.items()
    }


def contenders(kind: str, layers: int) -> dict[str, tuple[Contender, Callable[[], Any]]]:
    """For each contender, a run, and a function that returns its first weight.

    "decay" shrinks every weight. That takes no messages between devices, so a call costs only its
    dispatch. "SGD" gathers each weight and scatters its gradient, like FSDP.
    """
    devices = jax.devices()[:DEVICES]
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    rows = NamedSharding(mesh, P("data"))
    x, y = jax.device_put(w.data(), NamedSharding(mesh, P()))

    def new(params: Any, grads: Any) -> Any:
        return jax.tree.map(lambda p, g: p - RATE * g, params, grads)

    def hand_loss(params: Any) -> jax.Array:
        return jnp.mean((w.forward(params, x) - y) ** 2)

    @jax.jit
    def hand(params: Any) -> Any:
        return new(params, params if kind == "decay" else jax.grad(hand_loss)(params))

    @nnx.jit
    def our(model: Any, x: Any, y: Any) -> None:
        params = model["params"]
        model["params"] = new(params, params if kind == "decay" else nnx.grad(w.loss)(model, x, y))

    @fnx.jit
    def flax(model: Any, x: Any, y: Any) -> None:
        params = fnx.state(model, fnx.Param)
        grads = params if kind == "decay" else fnx.grad(w.loss)(model, x, y)
        fnx.update(model, new(params, grads))

    arrays = jax.device_put(w.arrays(layers), rows)
    model = nnx.shard(w.ours(layers), {"params": P("data")}, mesh=mesh)
    theirs = w.flax(layers)
    fnx.update(theirs, jax.device_put(fnx.state(theirs), rows))
    cached = fnx.cached_partial(flax, theirs)

    def run_hand(calls: int) -> Any:
        nonlocal arrays
        for _ in range(calls):
            arrays = hand(arrays)
        return arrays

    def run_ours(calls: int) -> Any:
        for _ in range(calls):
            our(model, x, y)
        return jax.tree.leaves(model)

    def run_flax(calls: int) -> Any:
        for _ in range(calls):
            cached(x, y)
        return jax.tree.leaves(fnx.state(theirs))

    return {
        "jax.jit": (run_hand, lambda: arrays[0]["w"]),
        "nnx.jit": (run_ours, lambda: model.layers[0].w),
        "flax cached_partial": (run_flax, lambda: theirs.layers[0].w[...]),
    }


def compare(kind: str, size: int, rounds: int) -> dict[str, Ratio]:
    """The ratios for one size, after a check that all contenders compute the same numbers."""
    entries = contenders(kind, size // 2)
    for run, _ in entries.values():
        run(2)
    expected = entries["jax.jit"][1]()
    for name, (_, value) in entries.items():
        np.testing.assert_allclose(value(), expected, rtol=1e-4, err_msg=name)
        assert value().sharding.is_equivalent_to(expected.sharding, 2), name
    return interleave({name: run for name, (run, _) in entries.items()}, "jax.jit", rounds=rounds)


if __name__ == "__main__":
    given, *numbers = map(int, sys.argv[1:])
    print(json.dumps({kind: {n: compare(kind, n, given) for n in numbers} for kind in KINDS}))
