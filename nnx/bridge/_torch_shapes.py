"""The names and shapes of PyTorch's weights for each of our layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from nnx.bridge._torch_layers import kinds_of

__all__: list[str] = []

Shape = tuple[int, ...]


def torch_shapes(layer: Any) -> dict[str, Shape] | None:
    """The names and shapes of a layer's weights in PyTorch, without those of layers inside it.

    None means that PyTorch has no such module, so its weights have our names.
    """
    shapes = next((_SHAPES[name] for name in kinds_of(layer) if name in _SHAPES), None)
    return None if shapes is None else shapes(layer)


def _with_bias(layer: Any, shapes: dict[str, Shape], bias: Shape) -> dict[str, Shape]:
    return shapes if layer.bias is None else shapes | {"bias": bias}


def _linear(layer: Any) -> dict[str, Shape]:
    return _with_bias(layer, {"weight": layer.kernel.shape[::-1]}, np.shape(layer.bias))


def _linear_general(layer: Any) -> dict[str, Shape]:
    shape, out = layer.kernel.shape, layer.out_features
    count = math.prod(out if isinstance(out, tuple) else (out,))
    return _with_bias(layer, {"weight": (count, math.prod(shape) // count)}, (count,))


def _conv(layer: Any) -> dict[str, Shape]:
    *window, given, out = layer.kernel.shape
    return _with_bias(layer, {"weight": (out, given, *window)}, (out,))


def _conv_transpose(layer: Any) -> dict[str, Shape]:
    *window, given, out = layer.kernel.shape
    if layer.transpose_kernel:
        given, out = out, given
    return _with_bias(layer, {"weight": (given, out, *window)}, np.shape(layer.bias))


def _norm(layer: Any) -> dict[str, Shape]:
    pairs = {"weight": layer.scale, "bias": getattr(layer, "bias", None)}
    return {name: np.shape(x) for name, x in pairs.items() if x is not None}


def _batch_norm(layer: Any) -> dict[str, Shape]:
    shape = np.shape(layer.mean)
    return _norm(layer) | {"running_mean": shape, "running_var": shape, "num_batches_tracked": ()}


def _attention(layer: Any) -> dict[str, Shape] | None:
    kernels = [part.kernel.shape for part in (layer.query, layer.key, layer.value)]
    if kernels[0] != kernels[1] or kernels[0] != kernels[2]:
        # PyTorch does not have this layer; the projections are separate layers.
        return None
    given, width = kernels[0][0], math.prod(kernels[0][1:])
    shapes = {"in_proj_weight": (3 * width, given)}
    return shapes if layer.query.bias is None else shapes | {"in_proj_bias": (3 * width,)}


def _cell(parts: int, last: str = "") -> Callable[[Any], dict[str, Shape]]:
    def shapes(cell: Any) -> dict[str, Shape]:
        rows = parts * cell.hidden_features
        found = {
            f"weight_ih{last}": (rows, cell.in_features),
            f"weight_hh{last}": (rows, cell.hidden_features),
        }
        layers = [
            x for name in ("dense_i", "dense_h", "ii", "hi") if (x := getattr(cell, name, None))
        ]
        if any(x.bias is not None for x in layers):
            found |= {f"bias_ih{last}": (rows,), f"bias_hh{last}": (rows,)}
        return found

    return shapes


def _rnn(layer: Any) -> dict[str, Shape] | None:
    cell = torch_shapes(layer.cell)
    return cell and {f"{name}_l0": shape for name, shape in cell.items()}


def _bidirectional(layer: Any) -> dict[str, Shape] | None:
    forward = getattr(layer.forward_rnn, "cell", None)
    cell = None if forward is None else torch_shapes(forward)
    return cell and {
        f"{name}_l0{end}": shape for end in ("", "_reverse") for name, shape in cell.items()
    }


_SHAPES: dict[str, Callable[[Any], dict[str, Shape] | None]] = {
    "Linear": _linear,
    "LinearGeneral": _linear_general,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Embed": lambda layer: {"weight": np.shape(layer.embedding)},
    "BatchNorm": _batch_norm,
    "LayerNorm": _norm,
    "RMSNorm": _norm,
    "GroupNorm": _norm,
    "InstanceNorm": _norm,
    "PReLU": lambda layer: {"weight": (np.size(layer.negative_slope),)},
    "MultiHeadAttention": _attention,
    "LSTMCell": _cell(4),
    "OptimizedLSTMCell": _cell(4),
    "GRUCell": _cell(3),
    "SimpleCell": _cell(1),
    "RNN": _rnn,
    "Bidirectional": _bidirectional,
}
