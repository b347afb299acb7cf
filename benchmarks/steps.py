"""Training and evaluation steps: the cost of a call, compared with a hand-written `jax.jit`."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.nnx as fnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nnx
from benchmarks import workloads as w
from benchmarks.timing import Contender, Ratio, interleave, repeat

RATE = 0.01


def _hand_loss(params: Any, x: Any, y: Any) -> jax.Array:
    return jnp.mean((w.forward(params, x) - y) ** 2)


def sgd_contenders(layers: int) -> dict[str, tuple[Contender, Any]]:
    """For each contender, a run, and a function that returns its first weight, to compare them."""
    x, y = w.data()

    def sgd(params: Any, grads: Any) -> Any:
        return jax.tree.map(lambda p, g: p - RATE * g, params, grads)

    @jax.jit
    def hand(params: Any, x: Any, y: Any) -> Any:
        return sgd(params, jax.grad(_hand_loss)(params, x, y))

    @nnx.jit
    def our(model: Any, x: Any, y: Any) -> None:
        grads = nnx.grad(w.loss, wrt="params")(model, x, y)
        model["params"] = sgd(model["params"], grads)

    @eqx.filter_jit
    def equinox(model: Any, x: Any, y: Any) -> Any:
        return sgd(model, eqx.filter_grad(w.loss)(model, x, y))

    def flax_step(model: Any, x: Any, y: Any) -> None:
        grads = fnx.grad(w.loss)(model, x, y)
        fnx.update(model, sgd(fnx.state(model, fnx.Param), grads))

    state = {"hand": w.arrays(layers), "equinox": w.equinox(layers)}

    def threaded(name: str, step: Any) -> Contender:
        def run(calls: int) -> Any:
            for _ in range(calls):
                state[name] = step(state[name], x, y)
            return jax.tree.leaves(state[name])

        return run

    def stateful(step: Any, *args: Any) -> Contender:
        def run(calls: int) -> Any:
            for _ in range(calls):
                step(*args)
            return jax.tree.leaves(args[0]) if isinstance(args[0], nnx.Module) else None

        return run

    model, library = w.ours(layers), w.ours_library(layers)
    flax_model, cached_model = w.flax(layers), w.flax(layers)
    flax_jit = fnx.jit(flax_step)
    cached = fnx.cached_partial(fnx.jit(flax_step), cached_model)
    return {
        "jax.jit": (threaded("hand", hand), lambda: state["hand"][0]["w"]),
        "nnx.jit": (stateful(our, model, x, y), lambda: model.layers[0].w),
        "nnx.jit, nnx.Linear": (
            stateful(our, library, x, y),
            lambda: library.layers[0].kernel,
        ),
        "equinox": (threaded("equinox", equinox), lambda: state["equinox"].layers[0].w),
        "flax nnx.jit": (
            lambda n: (
                [flax_jit(flax_model, x, y) for _ in range(n)] and flax_model.layers[0].w[...]
            ),
            lambda: flax_model.layers[0].w[...],
        ),
        "flax cached_partial": (
            lambda n: [cached(x, y) for _ in range(n)] and cached_model.layers[0].w[...],
            lambda: cached_model.layers[0].w[...],
        ),
    }


def adam_contenders(layers: int) -> dict[str, tuple[Contender, Any]]:
    x, y = w.data()
    tx = optax.adam(RATE)

    @jax.jit
    def hand(carry: Any, x: Any, y: Any) -> Any:
        params, opt = carry
        updates, opt = tx.update(jax.grad(_hand_loss)(params, x, y), opt, params)
        return optax.apply_updates(params, updates), opt

    @nnx.jit
    def our(model: Any, optimizer: Any, x: Any, y: Any) -> None:
        optimizer.update(model, nnx.grad(w.loss, wrt="params")(model, x, y))

    @eqx.filter_jit
    def equinox(carry: Any, x: Any, y: Any) -> Any:
        model, opt = carry
        updates, opt = tx.update(eqx.filter_grad(w.loss)(model, x, y), opt, model)
        return eqx.apply_updates(model, updates), opt

    @fnx.jit
    def flax_step(model: Any, optimizer: Any, x: Any, y: Any) -> None:
        optimizer.update(model, fnx.grad(w.loss)(model, x, y))

    params, eqx_model = w.arrays(layers), w.equinox(layers)
    state: dict[str, Any] = {
        "hand": (params, tx.init(params)),
        "equinox": (eqx_model, tx.init(eqx.filter(eqx_model, eqx.is_array))),
    }
    model = w.ours(layers)
    optimizer = nnx.Optimizer(model, tx)
    flax_model, cached_model = w.flax(layers), w.flax(layers)
    flax_optimizer = fnx.Optimizer(flax_model, tx, wrt=fnx.Param)
    cached_optimizer = fnx.Optimizer(cached_model, tx, wrt=fnx.Param)
    cached = fnx.cached_partial(flax_step, cached_model, cached_optimizer)

    def threaded(name: str, step: Any) -> Contender:
        def run(calls: int) -> Any:
            for _ in range(calls):
                state[name] = step(state[name], x, y)
            return jax.tree.leaves(state[name])

        return run

    def run_ours(calls: int) -> Any:
        for _ in range(calls):
            our(model, optimizer, x, y)
        return jax.tree.leaves((model, optimizer))

    return {
        "jax.jit": (threaded("hand", hand), lambda: state["hand"][0][0]["w"]),
        "nnx.jit": (run_ours, lambda: model.layers[0].w),
        "equinox": (threaded("equinox", equinox), lambda: state["equinox"][0].layers[0].w),
        "flax nnx.jit": (
            lambda n: (
                [flax_step(flax_model, flax_optimizer, x, y) for _ in range(n)]
                and flax_model.layers[0].w[...]
            ),
            lambda: flax_model.layers[0].w[...],
        ),
        "flax cached_partial": (
            lambda n: [cached(x, y) for _ in range(n)] and cached_model.layers[0].w[...],
            lambda: cached_model.layers[0].w[...],
        ),
    }


def eval_contenders(layers: int) -> dict[str, tuple[Contender, Any]]:
    x, _ = w.data()
    params, model = w.arrays(layers), w.ours(layers)
    eqx_model, flax_model, cached_model = w.equinox(layers), w.flax(layers), w.flax(layers)
    calls = {
        "jax.jit": lambda f=jax.jit(w.forward): f(params, x),
        "nnx.jit": lambda f=nnx.jit(lambda m, x: m(x)): f(model, x),
        "equinox": lambda f=eqx.filter_jit(lambda m, x: m(x)): f(eqx_model, x),
        "flax nnx.jit": lambda f=fnx.jit(lambda m, x: m(x)): f(flax_model, x),
        "flax cached_partial": lambda f=fnx.cached_partial(fnx.jit(lambda m, x: m(x)), cached_model): (
            f(x)
        ),
    }
    return {name: (repeat(call), call) for name, call in calls.items()}


def measure(kind: Any, sizes: list[int], rounds: int) -> dict[int, dict[str, Ratio]]:
    """Ratios to the hand-written step, by number of parameter arrays."""
    results = {}
    for size in sizes:
        contenders = kind(size // 2)
        for run, _ in contenders.values():
            run(1)
        first = {name: np.asarray(value()) for name, (_, value) in contenders.items()}
        for name, value in first.items():
            np.testing.assert_allclose(value, first["jax.jit"], rtol=1e-4, err_msg=name)
        fair = rounds if size < 1000 else max(5, rounds // 3)
        results[size] = interleave(
            {name: run for name, (run, _) in contenders.items()}, "jax.jit", rounds=fair
        )
    return results
