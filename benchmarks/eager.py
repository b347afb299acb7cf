"""The time outside compiled programs: eager forward, construction, pytree operations."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.nnx as fnx
import jax
import jax.numpy as jnp

import nnx
from benchmarks import workloads as w
from benchmarks.timing import Ratio, interleave, repeat


class _Plain:
    """A layer as a plain Python object, which costs as little as possible."""

    def __init__(self, params: dict[str, jax.Array]):
        self.w, self.b = params["w"], params["b"]

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.w + self.b


def forward(rounds: int, layers: int = 50) -> dict[str, Ratio]:
    x, _ = w.data()
    params, model, library = w.arrays(layers), w.ours(layers), w.ours_library(layers)
    eqx_model, flax_model = w.equinox(layers), w.flax(layers)
    plain = [_Plain(p) for p in params]

    def objects() -> jax.Array:
        h = x
        for layer in plain:
            h = layer(h)
        return h

    return interleave(
        {
            "x @ w + b": repeat(lambda: w.forward(params, x)),
            "plain Python objects": repeat(objects),
            "nnx": repeat(lambda: model(x)),
            "nnx, nnx.Linear": repeat(lambda: library(x)),
            "equinox": repeat(lambda: eqx_model(x)),
            "flax nnx": repeat(lambda: flax_model(x)),
        },
        "x @ w + b",
        rounds=rounds,
    )


class _Ours(nnx.Module):
    w: jax.Array = nnx.param()
    b: jax.Array = nnx.param()

    def __init__(self, n: int):
        self.w = jax.random.uniform(self.make_rng("params"), (n, n))
        self.b = jnp.zeros((n,))


class _Flax(fnx.Module):
    def __init__(self, n: int, rngs: fnx.Rngs):
        self.w = fnx.Param(jax.random.uniform(rngs.params(), (n, n)))
        self.b = fnx.Param(jnp.zeros((n,)))


class _Eqx(eqx.Module):
    w: jax.Array
    b: jax.Array

    def __init__(self, n: int, key: jax.Array):
        self.w = jax.random.uniform(key, (n, n))
        self.b = jnp.zeros((n,))


def construction(rounds: int, layers: int = 50) -> dict[str, Ratio]:
    """Building a model, compared with drawing the same arrays by hand, with a key for each layer."""

    def by_hand() -> Any:
        key, made = jax.random.key(0), []
        for _ in range(layers):
            key, use = jax.random.split(key)
            made.append((jax.random.uniform(use, (4, 4)), jnp.zeros((4,))))
        return made

    def ours() -> Any:
        with nnx.scope(jax.random.key(0)):
            return [_Ours(4) for _ in range(layers)]

    def flax() -> Any:
        rngs = fnx.Rngs(0)
        return [_Flax(4, rngs) for _ in range(layers)][-1].b[...]

    def equinox() -> Any:
        key, made = jax.random.key(0), []
        for _ in range(layers):
            key, use = jax.random.split(key)
            made.append(_Eqx(4, use))
        return made

    return interleave(
        {
            "by hand": repeat(by_hand),
            "nnx": repeat(ours),
            "equinox": repeat(equinox),
            "flax nnx": repeat(flax),
        },
        "by hand",
        rounds=rounds,
    )


def pytrees(rounds: int, layers: int = 250) -> dict[str, dict[str, Ratio]]:
    """Operations on a whole model, compared with Equinox."""
    model, flax_model, eqx_model = w.ours(layers), w.flax(layers), w.equinox(layers)
    dagdef, part = nnx.split(model)
    graphdef, state = fnx.split(flax_model)
    dynamic, static = eqx.partition(eqx_model, eqx.is_array)
    x, _ = w.data()
    plain = jax.jit(lambda m, x: m(x))
    flax_split = jax.jit(lambda g, s, x: fnx.merge(g, s)(x), static_argnums=0)

    def double(v: Any) -> Any:
        return v

    table = {
        "split": {
            "nnx": lambda: nnx.split(model),
            "flax": lambda: fnx.split(flax_model),
            "equinox": lambda: eqx.partition(eqx_model, eqx.is_array),
        },
        "merge": {
            "nnx": lambda: nnx.merge(dagdef, part),
            "flax": lambda: fnx.merge(graphdef, state),
            "equinox": lambda: eqx.combine(dynamic, static),
        },
        "clone": {
            "nnx": lambda: nnx.clone(model),
            "flax": lambda: fnx.clone(flax_model),
            "equinox": lambda: jax.tree.map(double, eqx_model),
        },
        'model["params"]': {
            "nnx": lambda: model["params"],
            "flax": lambda: fnx.state(flax_model, fnx.Param),
            "equinox": lambda: eqx.filter(eqx_model, eqx.is_array),
        },
        "jax.tree.map(f, model)": {
            "nnx": lambda: jax.tree.map(double, model),
            "flax": lambda: jax.tree.map(double, fnx.state(flax_model)),
            "equinox": lambda: jax.tree.map(double, eqx_model),
        },
        "jax.jit(f)(model, x)": {
            "nnx": lambda: plain(model, x),
            "flax": lambda: flax_split(*fnx.split(flax_model), x),
            "equinox": lambda: plain(eqx_model, x),
        },
    }

    def quiet(fn: Any) -> Any:
        def run(calls: int) -> None:
            for _ in range(calls):
                fn()

        return run

    return {
        name: interleave(
            {k: quiet(f) for k, f in row.items()}, "equinox", rounds=max(5, rounds // 3)
        )
        for name, row in table.items()
    }
