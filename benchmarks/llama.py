"""The Llama of `examples/llama.py` and a port to flax.nnx: tokens per second in training and decoding."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import flax.nnx as fnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nnx
from benchmarks.timing import Ratio, interleave

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from llama import Llama, LlamaConfig

SIZES = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG = LlamaConfig(vocab_size=96, **SIZES, **HEADS, dtype="float32")
BATCH, LENGTH, PROMPT = 8, 128, 16


class FlaxAttention(fnx.Module):
    def __init__(self, c: LlamaConfig, rngs: fnx.Rngs):
        self.head = c.hidden_size // c.num_attention_heads

        def project(heads: int) -> fnx.LinearGeneral:
            return fnx.LinearGeneral(c.hidden_size, (heads, self.head), use_bias=False, rngs=rngs)

        self.query, self.key = project(c.num_attention_heads), project(c.num_key_value_heads)
        self.value = project(c.num_key_value_heads)
        shape = (c.num_attention_heads, self.head)
        self.out = fnx.LinearGeneral(shape, c.hidden_size, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.query_ln = fnx.RMSNorm(self.head, epsilon=c.rms_norm_eps, rngs=rngs)
        self.key_ln = fnx.RMSNorm(self.head, epsilon=c.rms_norm_eps, rngs=rngs)
        self.base, self.kv = c.rope_theta, c.num_key_value_heads

    def init_cache(self, batch: int, length: int) -> None:
        zeros = jnp.zeros((batch, length, self.kv, self.head))
        self.keys, self.values = fnx.Cache(zeros), fnx.Cache(zeros)
        self.index = fnx.Cache(jnp.int32(0))

    def rotate(self, x: Any, positions: Any) -> Any:
        turns = self.base ** (-jnp.arange(0, self.head, 2) / self.head)
        angles = positions[:, None, None] * turns
        a, b = jnp.split(x, 2, axis=-1)
        sin, cos = jnp.sin(angles), jnp.cos(angles)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    def __call__(self, x: Any, decode: bool) -> Any:
        q, k, v = self.query_ln(self.query(x)), self.key_ln(self.key(x)), self.value(x)
        at = jnp.arange(x.shape[1])
        if not decode:
            q, k = self.rotate(q, at), self.rotate(k, at)
            return self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True))
        at = at + self.index[...]
        q, k = self.rotate(q, at), self.rotate(k, at)
        start = (0, self.index[...], 0, 0)
        self.keys[...] = jax.lax.dynamic_update_slice(self.keys[...], k, start)
        self.values[...] = jax.lax.dynamic_update_slice(self.values[...], v, start)
        self.index[...] += x.shape[1]
        mask = jnp.arange(self.keys.shape[1]) <= at[:, None]
        y = jax.nn.dot_product_attention(q, self.keys[...], self.values[...], mask=mask[None, None])
        return self.out(y)


class FlaxBlock(fnx.Module):
    def __init__(self, c: LlamaConfig, rngs: fnx.Rngs):
        def linear(a: int, b: int) -> fnx.Linear:
            return fnx.Linear(a, b, use_bias=False, rngs=rngs)

        size, inner = c.hidden_size, c.intermediate_size
        self.attention_norm = fnx.RMSNorm(size, epsilon=c.rms_norm_eps, rngs=rngs)
        self.attention = FlaxAttention(c, rngs)
        self.mlp_norm = fnx.RMSNorm(size, epsilon=c.rms_norm_eps, rngs=rngs)
        self.gate, self.up, self.down = (
            linear(size, inner),
            linear(size, inner),
            linear(inner, size),
        )

    def __call__(self, x: Any, decode: bool) -> Any:
        x = x + self.attention(self.attention_norm(x), decode)
        h = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(h)) * self.up(h))


class FlaxLlama(fnx.Module):
    def __init__(self, c: LlamaConfig, rngs: fnx.Rngs):
        self.embed = fnx.Embed(c.vocab_size, c.hidden_size, rngs=rngs)
        self.layers = fnx.List([FlaxBlock(c, rngs) for _ in range(c.num_hidden_layers)])
        self.norm = fnx.RMSNorm(c.hidden_size, epsilon=c.rms_norm_eps, rngs=rngs)

    def init_cache(self, batch: int, length: int) -> None:
        for layer in self.layers:
            layer.attention.init_cache(batch, length)

    def __call__(self, tokens: Any, decode: bool = False) -> Any:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, decode)
        return self.embed.attend(self.norm(x))


def _models() -> dict[str, Any]:
    theirs = FlaxLlama(CONFIG, fnx.Rngs(0))
    stacked = nnx.bridge.from_flax(theirs, Llama.init(0)(CONFIG, remat=False))
    unrolled = nnx.clone(stacked)
    unrolled.layers = nnx.Sequential(*unrolled.layers.unstack())
    again = fnx.clone(theirs)
    return {
        "flax": theirs,
        "flax, cached_partial": again,
        "nnx, layers in a list": unrolled,
        "nnx.Stack": stacked,
    }


def _loss(logits: Any, tokens: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def _tokens(ratios: dict[str, Ratio], count: int) -> dict[str, dict[str, Any]]:
    return {
        name: {"tokens per second": f"{count / r.microseconds * 1e6:,.0f}", "time ÷ flax": str(r)}
        for name, r in ratios.items()
    }


def training(rounds: int) -> dict[str, dict[str, Any]]:
    """An Adam step on 8 × 128 tokens."""
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, CONFIG.vocab_size, (BATCH, LENGTH)))
    tx = optax.adam(1e-3)
    losses: dict[str, float] = {}

    def contender(name: str, model: Any, lib: Any) -> Any:
        optimizer = lib.Optimizer(model, tx, wrt="params" if lib is nnx else fnx.Param)

        @lib.jit
        def step(model: Any, optimizer: Any, tokens: Any) -> Any:
            loss, grads = lib.value_and_grad(lambda m: _loss(m(tokens), tokens))(model)
            optimizer.update(model, grads)
            return loss

        losses[name] = float(step(model, optimizer, tokens))
        bound: Any = lambda tokens: step(model, optimizer, tokens)  # noqa: E731
        if name == "flax, cached_partial":
            bound = fnx.cached_partial(step, model, optimizer)

        def run(calls: int) -> Any:
            for _ in range(calls):
                loss = bound(tokens)
            return loss

        return run

    runs = {
        name: contender(name, model, fnx if name.startswith("flax") else nnx)
        for name, model in _models().items()
    }
    np.testing.assert_allclose(list(losses.values()), losses["flax"], rtol=1e-5)
    return _tokens(interleave(runs, "flax", rounds=rounds, seconds=0.1), BATCH * LENGTH)


def decoding(rounds: int) -> dict[str, dict[str, Any]]:
    """Decoding one text with the cache, with a compiled call for each token."""
    prompt = jnp.asarray(np.random.default_rng(2).integers(0, CONFIG.vocab_size, (1, PROMPT)))
    texts: dict[str, Any] = {}

    def contender(name: str, model: Any) -> Any:
        if name.startswith("flax"):
            step = fnx.jit(lambda m, t: m(t, decode=True)[:, -1:].argmax(-1))
        else:
            step = nnx.jit(lambda m, t: m.apply(decode=True)(t)[:, -1:].argmax(-1))

        def begin() -> Any:
            if name == "nnx, layers in a list":
                for layer in model.layers:
                    layer.attention.init_cache((1, LENGTH, CONFIG.hidden_size))
            else:
                model.init_cache(1, LENGTH)
            return step(model, prompt)

        def run(calls: int) -> Any:
            for _ in range(calls):
                token, text = begin(), []
                bound: Any = lambda token: step(model, token)  # noqa: E731
                if name == "flax, cached_partial":
                    bound = fnx.cached_partial(step, model)
                for _ in range(LENGTH - PROMPT):
                    token = bound(token)
                    text.append(token)
            texts[name] = text
            return token

        return run

    runs = {name: contender(name, model) for name, model in _models().items()}
    ratios = interleave(runs, "flax", rounds=rounds, seconds=0.1)
    written = [np.ravel(jax.device_get(text)).tolist() for text in texts.values()]
    assert all(text == written[0] for text in written), "the models write different texts"
    return _tokens(ratios, LENGTH - PROMPT)
