"""Each layer compared with flax's: the value and the gradient in one compiled program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.nnx as fnx
import jax
import jax.numpy as jnp

import nnx
from benchmarks.report import table
from benchmarks.timing import Ratio, interleave, repeat

Make = Callable[..., Any]


def _call(m: Any, x: jax.Array) -> jax.Array:
    return m(x)


def _attend(m: Any, x: jax.Array) -> jax.Array:
    return m(x, decode=False)


def _step(m: Any, x: jax.Array) -> jax.Array:
    return m(x, x)[1]


def _with_memory(m: Any, x: jax.Array) -> jax.Array:
    return m((x, x), x)[1]


# A maker with the arguments that both libraries take (plus `rngs` for flax), and the shape of the input.
LAYERS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], tuple[int, ...], Any]] = {
    "Linear": ("Linear", (64, 64), {}, (32, 16, 64), _call),
    "LinearGeneral": ("LinearGeneral", ((8, 8), 64), {"axis": (-2, -1)}, (32, 16, 8, 8), _call),
    "Einsum": ("Einsum", ("bta,ac->btc", (64, 64), (64,)), {}, (32, 16, 64), _call),
    "Conv": ("Conv", (16, 16, (3, 3)), {}, (8, 16, 16, 16), _call),
    "Conv, groups": ("Conv", (16, 16, (3, 3)), {"feature_group_count": 4}, (8, 16, 16, 16), _call),
    "ConvTranspose": ("ConvTranspose", (16, 16, (3, 3)), {"strides": 2}, (8, 8, 8, 16), _call),
    "Embed": ("Embed", (1000, 64), {}, (32, 32), _call),
    "LayerNorm": ("LayerNorm", (256,), {}, (32, 32, 256), _call),
    "RMSNorm": ("RMSNorm", (256,), {}, (32, 32, 256), _call),
    "GroupNorm": ("GroupNorm", (32, 8), {}, (8, 16, 16, 32), _call),
    "InstanceNorm": ("InstanceNorm", (32,), {}, (8, 16, 16, 32), _call),
    "BatchNorm": ("BatchNorm", (32,), {}, (8, 16, 16, 32), _call),
    "PReLU": ("PReLU", (), {}, (32, 16, 64), _call),
    "MultiHeadAttention": ("MultiHeadAttention", (4, 64), {}, (8, 32, 64), _attend),
    "LoRALinear": ("LoRALinear", (64, 64), {"lora_rank": 4}, (32, 16, 64), _call),
    "LSTMCell": ("LSTMCell", (32, 32), {}, (32, 32), _with_memory),
    "OptimizedLSTMCell": ("OptimizedLSTMCell", (32, 32), {}, (32, 32), _with_memory),
    "GRUCell": ("GRUCell", (32, 32), {}, (32, 32), _step),
    "SimpleCell": ("SimpleCell", (32, 32), {}, (32, 32), _step),
}
POOLS = {"avg_pool": nnx.avg_pool, "max_pool": nnx.max_pool}


def measure(rounds: int, dtype: Any, only: list[str] | None = None) -> dict[str, Ratio]:
    """The time of our layers compared with flax's, with parameters and inputs of a dtype."""
    found: dict[str, Ratio] = {}
    for name in only or [*LAYERS, *POOLS]:
        runs = _pools(name, dtype) if name in POOLS else _layers(name, dtype)
        found[name] = interleave(runs, "flax", rounds=rounds, seconds=0.01)["nnx"]
    return found


def page(title: str, rounds: int, dtype: Any) -> tuple[str, dict[str, Ratio]]:
    found = measure(rounds, dtype)
    rows = {name: {"nnx": str(r), "µs": f"{r.microseconds:.0f}"} for name, r in found.items()}
    return table(title, rows), found


def _layers(name: str, dtype: Any) -> dict[str, Any]:
    kind, args, options, shape, call = LAYERS[name]
    with nnx.scope(0):
        ours = getattr(nnx, kind)(*args, **options)
    rngs = {"rngs": fnx.Rngs(0)} if kind != "PReLU" else {}
    theirs = getattr(fnx, kind)(*args, **options, **rngs)
    if kind == "Embed":
        x: Any = jnp.arange(1024).reshape(shape) % 1000
    else:
        x = jax.random.normal(jax.random.key(0), shape).astype(dtype)

    # Compile plain programs over arrays, so that only the layers are compared. Cast after drawing,
    # because flax cannot draw the orthogonal kernel of a recurrent cell in bfloat16.
    def cast(tree: Any) -> Any:
        return jax.tree.map(
            lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree
        )

    dagdef, *mine = nnx.split(ours, ("params", "lora"), ...)
    graphdef, *other = fnx.split(theirs, fnx.Param, ...)
    mine, other = cast(mine), cast(other)

    def our_loss(weights: Any, rest: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(call(nnx.merge(dagdef, weights, rest), x).astype(jnp.float32) ** 2)

    def their_loss(weights: Any, rest: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(
            call(fnx.merge(graphdef, weights, rest, copy=True), x).astype(jnp.float32) ** 2
        )

    differentiated = (0,) if kind == "Embed" else (0, 2)
    ours_grad = jax.jit(jax.value_and_grad(our_loss, differentiated))
    theirs_grad = jax.jit(jax.value_and_grad(their_loss, differentiated))
    return {
        "nnx": repeat(lambda: ours_grad(*mine, x)),
        "flax": repeat(lambda: theirs_grad(*other, x)),
    }


def _pools(name: str, dtype: Any) -> dict[str, Any]:
    x = jax.random.normal(jax.random.key(0), (8, 32, 32, 16)).astype(dtype)

    def compiled(pool: Make) -> Any:
        return jax.jit(
            jax.grad(lambda x: jnp.sum(pool(x, (2, 2), (2, 2)).astype(jnp.float32) ** 2))
        )

    mine, other = compiled(POOLS[name]), compiled(getattr(fnx, name))
    return {"nnx": repeat(lambda: mine(x)), "flax": repeat(lambda: other(x))}
