"""The checks of MultiHeadAttention, and the norms of its heads."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nnx.layers._common import Metadata, shape_error
from nnx.layers.layer_norm import LayerNorm
from nnx.module import Module

__all__ = ["check_inputs", "check_mask", "check_sizes", "norm_of_heads", "takes", "window_of"]


def window_of(layer: Any) -> tuple[int | None, int | None] | None:
    """How many positions before and after itself a query sees."""
    window = layer.local_window_size
    return (window, window) if isinstance(window, int) else window


def check_inputs(layer: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    named = ("queries", q, layer.in_features), ("keys", k, layer.in_kv_features)
    for name, x, size in (*named, ("values", v, layer.in_v_features)):
        if jnp.ndim(x) < 2 or jnp.shape(x)[-1] != size:
            raise shape_error(layer, name, f"(*batch, length, {size})", jnp.shape(x))
    if q.shape[:-2] != k.shape[:-2] or k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"MultiHeadAttention expects queries, keys and values with the same batch, and keys "
            f"and values with the same length, but got shapes {q.shape}, {k.shape} and {v.shape}."
        )


def check_mask(layer: Any, mask: jax.Array | None, queries: tuple[int, ...], length: int) -> None:
    wanted = (*queries[:-2], layer.num_heads, queries[-2], length)
    try:
        fits = mask is None or jnp.broadcast_shapes(mask.shape, wanted) == wanted
    except ValueError:
        fits = False
    if mask is not None and not fits:
        raise ValueError(
            f"MultiHeadAttention expects a mask that broadcasts to {wanted}, (*batch, heads, "
            f"query length, key length), but got one of shape {mask.shape}. When decoding, the "
            f"key length is the length of the cache."
        )


def check_sizes(layer: Any) -> None:
    if layer.qkv_features % layer.num_heads:
        raise ValueError(
            f"MultiHeadAttention cannot divide qkv_features={layer.qkv_features} among "
            f"num_heads={layer.num_heads}. Make qkv_features a multiple of num_heads."
        )
    if layer.v_features % layer.num_heads:
        raise ValueError(
            f"MultiHeadAttention cannot divide v_features={layer.v_features} among "
            f"num_heads={layer.num_heads}. Make v_features a multiple of num_heads."
        )
    if layer.num_heads % layer.num_kv_heads:
        raise ValueError(
            f"MultiHeadAttention cannot divide num_heads={layer.num_heads} query heads among "
            f"num_kv_heads={layer.num_kv_heads} key heads. Make num_heads a multiple of num_kv_heads."
        )
    window = window_of(layer)
    if window is not None and (
        not isinstance(window, tuple)
        or len(window) != 2
        or any(size is not None and size < 0 for size in window)
    ):
        raise ValueError(
            f"The local_window_size of MultiHeadAttention says how many positions before and after "
            f"itself a query sees, such as 128 or (127, 0), but got {layer.local_window_size!r}."
        )
    if not 0 <= layer.dropout_rate <= 1:
        raise ValueError(
            f"The dropout_rate of MultiHeadAttention must be a probability, from 0 to 1, but got "
            f"{layer.dropout_rate}."
        )
    if layer.rotary is not None and layer.rotary.features != layer.head_dim:
        raise ValueError(
            f"The heads of MultiHeadAttention have size {layer.head_dim} (qkv_features // "
            f"num_heads), but rotary is a RotaryEmbedding({layer.rotary.features})."
        )


def takes(fn: Callable[..., Any], name: str) -> bool:
    """Whether a function has an argument of this name."""
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def norm_of_heads(
    kind: Any, features: int, options: dict[str, Any], scale_metadata: Metadata
) -> Any:
    """The norm of queries or keys that `normalize_qk` asks for."""
    if kind is False or kind is None:
        return None
    if kind is True:
        return LayerNorm(features, use_bias=False, scale_metadata=scale_metadata, **options)
    if not callable(kind) or isinstance(kind, Module):
        raise TypeError(
            f"normalize_qk of MultiHeadAttention must be True, False or a norm class such as "
            f"nnx.RMSNorm, which is called with the size of a head, but got {kind!r:.80}."
        )
    # A user's norm need not have all the options of ours, and options of a partial are kept.
    given = {**options, "scale_metadata": scale_metadata}
    for name in kind.keywords if isinstance(kind, functools.partial) else ():
        given.pop(name, None)
    return kind(features, **{name: x for name, x in given.items() if takes(kind, name)})
