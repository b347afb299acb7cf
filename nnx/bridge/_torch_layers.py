"""How PyTorch names and lays out the weights of each of our layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

__all__: list[str] = []

Convert = Callable[[np.ndarray], Any]
Rule = Callable[[Any, str], list[tuple[str | None, Convert]] | None]


def layer_rule(layer: Any, leaf: str) -> list[tuple[str | None, Convert]] | None:
    """What a PyTorch name is in one of our layers.

    Args:
      layer: a layer of ours.
      leaf: the last part of the name, such as `weight`.

    Returns:
      Pairs of our attribute, or None for what we have not, and the change of layout; None where
      the name needs none.
    """
    for kind in type(layer).__mro__:
        rule = _RULES.get(kind.__name__)
        # A class of the user's with such a name may have another layout.
        if rule is not None and kind.__module__.partition(".")[0] == "nnx":
            return rule(layer, leaf)
    return None


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _linear(layer: Any, leaf: str) -> list[tuple[str | None, Convert]] | None:
    return [("kernel", np.transpose)] if leaf == "weight" else None


def _linear_general(layer: Any, leaf: str) -> list[tuple[str | None, Convert]] | None:
    if leaf == "weight":
        return [("kernel", lambda a: a.T.reshape(jnp.shape(layer.kernel)))]
    if leaf == "bias" and layer.bias is not None:
        return [("bias", lambda a: a.reshape(jnp.shape(layer.bias)))]
    return None


def _channels_last(array: np.ndarray) -> np.ndarray:
    return np.transpose(array, (*range(2, array.ndim), 1, 0))


def _conv(layer: Any, leaf: str) -> list[tuple[str | None, Convert]] | None:
    return [("kernel", _channels_last)] if leaf == "weight" else None


def _conv_transpose(layer: Any, leaf: str) -> list[tuple[str | None, Convert]] | None:
    def convert(array: np.ndarray) -> np.ndarray:
        # PyTorch has (in, out, *window) and convolves with the mirrored window.
        array = np.moveaxis(array, (0, 1), (-2, -1))
        if layer.transpose_kernel:
            return np.swapaxes(array, -1, -2)
        return np.flip(array, tuple(range(array.ndim - 2)))

    return [("kernel", convert)] if leaf == "weight" else None


def _renaming(names: dict[str, str | None]) -> Rule:
    def rule(layer: Any, leaf: str) -> list[tuple[str | None, Convert]] | None:
        return [(names[leaf], _same)] if leaf in names else None

    return rule


def _prelu(layer: Any, leaf: str) -> list[tuple[str | None, Convert]] | None:
    if leaf != "weight":
        return None
    return [("negative_slope", lambda a: a.reshape(jnp.shape(layer.negative_slope)))]


def _attention(layer: Any, leaf: str) -> list[tuple[str | None, Convert]] | None:
    parts = ("query", "key", "value")
    if leaf in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        part = parts["qkv".index(leaf[0])]
        shape = jnp.shape(getattr(layer, part).kernel)
        return [(f"{part}.kernel", lambda a: a.T.reshape(shape))]
    if leaf not in ("in_proj_weight", "in_proj_bias"):
        return None
    name = "kernel" if leaf == "in_proj_weight" else "bias"

    def divide(i: int, shape: tuple[int, ...]) -> Convert:
        # In PyTorch the rows are those of the query, then of the key, then of the value.
        return lambda a: np.split(a, 3)[i].T.reshape(shape)

    return [
        (f"{part}.{name}", divide(i, np.shape(getattr(getattr(layer, part), name))))
        for i, part in enumerate(parts)
    ]


_NORM = _renaming({"weight": "scale"})

_RULES: dict[str, Rule] = {
    "Linear": _linear,
    "LinearGeneral": _linear_general,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Embed": _renaming({"weight": "embedding"}),
    "BatchNorm": _renaming(
        {
            "weight": "scale",
            "running_mean": "mean",
            "running_var": "var",
            "num_batches_tracked": None,
        }
    ),
    "LayerNorm": _NORM,
    "RMSNorm": _NORM,
    "GroupNorm": _NORM,
    "InstanceNorm": _NORM,
    "PReLU": _prelu,
    "MultiHeadAttention": _attention,
}
