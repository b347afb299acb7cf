"""A real step: a 6-layer transformer of width 256 on 8 × 128 tokens, forward, backward, Adam."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nnx
from benchmarks.timing import Ratio, interleave

LAYERS, WIDTH, HEADS, BATCH, LENGTH, VOCABULARY = 6, 256, 8, 8, 128, 256
SHAPES = {
    "qkv": (WIDTH, 3 * WIDTH),
    "out": (WIDTH, WIDTH),
    "up": (WIDTH, 4 * WIDTH),
    "down": (4 * WIDTH, WIDTH),
    "norm1": (WIDTH,),
    "norm2": (WIDTH,),
}


def _norm(x: Any, scale: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def _block(p: Any, x: Any) -> Any:
    b, t, _ = x.shape
    q, k, v = jnp.split(_norm(x, p["norm1"]) @ p["qkv"], 3, axis=-1)
    q, k, v = (a.reshape(b, t, HEADS, -1) for a in (q, k, v))
    x = x + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(b, t, -1) @ p["out"]
    return x + jax.nn.gelu(_norm(x, p["norm2"]) @ p["up"]) @ p["down"]


def _loss(logits: Any, tokens: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


class Block(nnx.Module):
    def __init__(self, params: dict[str, jax.Array]):
        for name, value in params.items():
            setattr(self, name, nnx.Ref(value, "params"))

    def __call__(self, x: Any) -> Any:
        return _block({name: getattr(self, name).value for name in SHAPES}, x)


class Transformer(nnx.Module):
    def __init__(self, params: dict[str, Any]):
        self.embed = nnx.Ref(params["embed"], "params")
        self.blocks = [Block(p) for p in params["blocks"]]

    def __call__(self, tokens: Any) -> Any:
        x = self.embed.value[tokens]
        for block in self.blocks:
            x = block(x)
        return x @ self.embed.value.T


def _params() -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def draw(shape: Any) -> jax.Array:
        size = np.ones(shape) if len(shape) == 1 else rng.normal(size=shape) * shape[0] ** -0.5
        return jnp.asarray(size, jnp.float32)

    blocks = [{name: draw(shape) for name, shape in SHAPES.items()} for _ in range(LAYERS)]
    return {"embed": draw((VOCABULARY, WIDTH)), "blocks": blocks}


def measure(rounds: int) -> dict[str, Ratio]:
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, VOCABULARY, (BATCH, LENGTH)))
    tx = optax.adam(1e-3)
    params = _params()
    state: dict[str, Any] = {"hand": (params, tx.init(params))}
    model = Transformer(params)
    optimizer = nnx.Optimizer(model, tx)

    def pure(params: Any, tokens: Any) -> Any:
        x = params["embed"][tokens]
        for p in params["blocks"]:
            x = _block(p, x)
        return _loss(x @ params["embed"].T, tokens)

    @jax.jit
    def hand(carry: Any, tokens: Any) -> Any:
        params, opt = carry
        updates, opt = tx.update(jax.grad(pure)(params, tokens), opt, params)
        return optax.apply_updates(params, updates), opt

    @nnx.jit
    def our(model: Any, optimizer: Any, tokens: Any) -> None:
        optimizer.update(model, nnx.grad(lambda m: _loss(m(tokens), tokens))(model))

    def run_hand(calls: int) -> Any:
        for _ in range(calls):
            state["hand"] = hand(state["hand"], tokens)
        return state["hand"]

    def run_ours(calls: int) -> Any:
        for _ in range(calls):
            our(model, optimizer, tokens)
        return jax.tree.leaves((model, optimizer))

    run_hand(1), run_ours(1)
    np.testing.assert_allclose(
        model.blocks[0].qkv.value, state["hand"][0]["blocks"][0]["qkv"], atol=3e-3
    )
    return interleave({"jax.jit": run_hand, "nnx.jit": run_ours}, "jax.jit", rounds=rounds)
