"""One program in four libraries: linear layers of width 4, so that times are mostly overhead."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.nnx as fnx
import jax
import jax.numpy as jnp
import numpy as np

import nnx

WIDTH = 4


def arrays(layers: int) -> list[dict[str, jax.Array]]:
    """The same numbers for all libraries."""
    rng = np.random.default_rng(0)
    return [
        {
            "w": jnp.asarray(np.eye(WIDTH) + 0.01 * rng.normal(size=(WIDTH, WIDTH)), jnp.float32),
            "b": jnp.zeros(WIDTH),
        }
        for _ in range(layers)
    ]


def data() -> tuple[jax.Array, jax.Array]:
    return jnp.ones((2, WIDTH)), jnp.zeros((2, WIDTH))


def forward(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    for p in params:
        x = x @ p["w"] + p["b"]
    return x


class Linear(nnx.Module):
    w: jax.Array = nnx.param()
    b: jax.Array = nnx.param()

    def __init__(self, w: jax.Array, b: jax.Array):
        self.w = w
        self.b = b

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.w + self.b


class Stack(nnx.Module):
    def __init__(self, layers: list[Any]):
        self.layers = layers

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


def ours(layers: int) -> Stack:
    return Stack([Linear(p["w"], p["b"]) for p in arrays(layers)])


def ours_library(layers: int) -> Stack:
    """The same with `nnx.Linear`, which has more attributes."""
    with nnx.scope(0):
        model = Stack([nnx.Linear(WIDTH, WIDTH) for _ in range(layers)])
    for layer, p in zip(model.layers, arrays(layers), strict=True):
        layer.kernel, layer.bias = p["w"], p["b"]
    return model


class FlaxLinear(fnx.Module):
    def __init__(self, w: jax.Array, b: jax.Array):
        self.w, self.b = fnx.Param(w), fnx.Param(b)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.w[...] + self.b[...]


class FlaxStack(fnx.Module):
    def __init__(self, layers: list[FlaxLinear]):
        self.layers = fnx.List(layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


def flax(layers: int) -> FlaxStack:
    return FlaxStack([FlaxLinear(p["w"], p["b"]) for p in arrays(layers)])


class EqxLinear(eqx.Module):
    w: jax.Array
    b: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.w + self.b


class EqxStack(eqx.Module):
    layers: list[EqxLinear]

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


def equinox(layers: int) -> EqxStack:
    return EqxStack([EqxLinear(p["w"], p["b"]) for p in arrays(layers)])


def loss(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((model(x) - y) ** 2)
