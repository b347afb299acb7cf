"""PyTorch's names and layouts for the weights of each of our layers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__: list[str] = []

Convert = Callable[[np.ndarray], Any]


class Place(NamedTuple):
    """Where a weight goes: our attribute, or None if we have none, with the conversion of the layout."""

    name: str | None
    convert: Convert
    # Whether two of their weights go to the same place; ours is their sum.
    added: bool = False


Rule = Callable[[Any, str], list[Place] | None]


class NoPlaceError(Exception):
    """Our layer has no such weight. The message says why, and which layer has it."""


def layer_rule(layer: Any, leaf: str) -> list[Place] | None:
    """Translate a PyTorch name for one of our layers.

    Args:
      layer: one of our layers.
      leaf: the last part of the name, such as `weight`.

    Returns:
      The places of the weight, or of its parts; None if the name needs no rule.

    Raises:
      NoPlaceError: PyTorch uses the name, but this layer has no place for it.
    """
    if isinstance(layer, list | tuple):
        return _layers(layer, "", leaf)
    rule = next((_RULES[name] for name in kinds_of(layer) if name in _RULES), None)
    return None if rule is None else rule(layer, leaf)


def kinds_of(layer: Any) -> list[str]:
    """The names of the layer's classes that are ours. A user's class of the same name may have
    another layout.
    """
    return [kind.__name__ for kind in type(layer).__mro__ if is_ours(kind)]


def is_ours(kind: type) -> bool:
    """Whether a class belongs to this library."""
    return kind.__module__.partition(".")[0] == "nnx"


def _is(layer: Any, *names: str) -> bool:
    return not set(names).isdisjoint(kinds_of(layer))


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _linear(layer: Any, leaf: str) -> list[Place] | None:
    return [Place("kernel", np.transpose)] if leaf == "weight" else None


def _linear_general(layer: Any, leaf: str) -> list[Place] | None:
    if leaf == "weight":
        return [Place("kernel", lambda a: a.T.reshape(np.shape(layer.kernel)))]
    if leaf == "bias" and layer.bias is not None:
        return [Place("bias", lambda a: a.reshape(np.shape(layer.bias)))]
    return None


def _channels_last(array: np.ndarray) -> np.ndarray:
    return np.transpose(array, (*range(2, array.ndim), 1, 0))


def _conv(layer: Any, leaf: str) -> list[Place] | None:
    return [Place("kernel", _channels_last)] if leaf == "weight" else None


def _conv_transpose(layer: Any, leaf: str) -> list[Place] | None:
    def convert(array: np.ndarray) -> np.ndarray:
        # PyTorch's layout is (in, out, *window), and it convolves with the mirrored window.
        array = np.moveaxis(array, (0, 1), (-2, -1))
        if layer.transpose_kernel:
            return np.swapaxes(array, -1, -2)
        return np.flip(array, tuple(range(array.ndim - 2)))

    return [Place("kernel", convert)] if leaf == "weight" else None


def _renaming(names: dict[str, str | None]) -> Rule:
    def rule(layer: Any, leaf: str) -> list[Place] | None:
        return [Place(names[leaf], _same)] if leaf in names else None

    return rule


def _prelu(layer: Any, leaf: str) -> list[Place] | None:
    if leaf != "weight":
        return None
    return [Place("negative_slope", lambda a: a.reshape(np.shape(layer.negative_slope)))]


def _attention(layer: Any, leaf: str) -> list[Place] | None:
    parts = ("query", "key", "value")
    if leaf in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        part = parts["qkv".index(leaf[0])]
        shape = np.shape(getattr(layer, part).kernel)
        return [Place(f"{part}.kernel", lambda a: a.T.reshape(shape))]
    if leaf not in ("in_proj_weight", "in_proj_bias"):
        return None
    name = "kernel" if leaf == "in_proj_weight" else "bias"

    def divide(i: int, shape: tuple[int, ...]) -> Convert:
        # In PyTorch, the rows of the query come first, then those of the key, then those of the
        # value.
        return lambda a: np.split(a, 3)[i].T.reshape(shape)

    return [
        Place(f"{part}.{name}", divide(i, np.shape(getattr(getattr(layer, part), name))))
        for i, part in enumerate(parts)
    ]


# The names in PyTorch's recurrent layers end in a layer number; those in its cells do not.
_RECURRENT = re.compile(r"(weight|bias)_(ih|hh|hr)(?:_l(\d+))?(_reverse)?")


def _rnn(layer: Any, leaf: str) -> list[Place] | None:
    return _of_cell("cell", layer.cell, leaf) if _RECURRENT.fullmatch(leaf) else None


def _bidirectional(layer: Any, leaf: str) -> list[Place] | None:
    match = _RECURRENT.fullmatch(leaf)
    if match is None:
        return None
    rnn = "backward_rnn" if match[4] else "forward_rnn"
    cell = getattr(getattr(layer, rnn), "cell", None)
    return _of_cell(f"{rnn}.cell", cell, leaf.removesuffix("_reverse"))


def _of_cell(path: str, cell: Any, leaf: str) -> list[Place]:
    places = layer_rule(cell, leaf)
    if places is None:
        raise NoPlaceError(
            f"there is no rule for {path} of class {type(cell).__name__}; give names and transforms"
        )
    return [place._replace(name=f"{path}.{place.name}") for place in places]


def _sequential(layer: Any, leaf: str) -> list[Place] | None:
    return _layers(layer.layers, "layers.", leaf)


def _layers(layers: Any, path: str, leaf: str) -> list[Place] | None:
    """PyTorch's numbered layers are layers in a sequence here, with or without dropout between them."""
    match = _RECURRENT.fullmatch(leaf)
    if match is None or match[3] is None:
        return None
    wanted = int(match[3])
    found = [i for i, x in enumerate(layers) if _is(x, "RNN", "Bidirectional")]
    if wanted >= len(found):
        raise NoPlaceError(f"there are {len(found)} RNN or Bidirectional here")
    i = found[wanted]
    places = layer_rule(layers[i], leaf.replace(f"_l{match[3]}", "_l0"))
    return places and [place._replace(name=f"{path}{i}.{place.name}") for place in places]


def _cell(pairs: Callable[[Any], list[tuple[str, str]]]) -> Rule:
    """The rule of a cell. `pairs` names the `Linear`s of the input and the hidden state.

    There is one pair for each part of PyTorch's rows.
    """

    def rule(layer: Any, leaf: str) -> list[Place] | None:
        match = _RECURRENT.fullmatch(leaf)
        if match is None:
            return None
        kind, side, number, reverse = match.groups()
        if side == "hr":
            raise NoPlaceError("no cell here has a projection like that of proj_size")
        if number not in (None, "0"):
            raise NoPlaceError("for several layers put a list or Sequential of RNN here")
        if reverse:
            raise NoPlaceError("for both directions put a Bidirectional here")
        parts = pairs(layer)
        places = []
        for n, pair in enumerate(parts):
            own = pair[side == "hh"]
            if kind == "weight":
                places.append(Place(f"{own}.kernel", _part(n, len(parts))))
                continue
            biases = [name for name in pair if getattr(layer, name).bias is not None]
            if not biases:
                raise NoPlaceError(f"the {' and '.join(pair)} of this cell have no bias")
            # PyTorch has two biases and adds them, except in the GRU.
            convert, added = _part(n, len(parts)), len(biases) == 1
            if own not in biases and _is(layer, "GRUCell"):
                convert = _without_the_last(own)
            places.append(Place(f"{biases[0] if added else own}.bias", convert, added))
        return places

    return rule


def _part(n: int, parts: int) -> Convert:
    return lambda array: np.split(array, parts)[n].T


def _without_the_last(own: str) -> Convert:
    def convert(bias: np.ndarray) -> np.ndarray:
        if np.split(bias, 3)[2].any():
            raise ValueError(
                "its last third cannot be added to the other bias, because one is inside the "
                "reset gate and one outside. First give the GRUCell both biases, as in PyTorch: "
                f"cell.{own}.bias = jnp.zeros({len(bias)})"
            )
        return bias

    return convert


_FUSED = _cell(lambda cell: [("dense_i", "dense_h")])
_GATES = _cell(lambda cell: [("ii", "hi"), ("if_", "hf"), ("ig", "hg"), ("io", "ho")])


def _norm(layer: Any, leaf: str) -> list[Place] | None:
    # PyTorch keeps each normalized axis; here they are flattened into one.
    names = {"weight": "scale", "bias": "bias"}
    own = getattr(layer, names.get(leaf, ""), None)
    return None if own is None else [Place(names[leaf], lambda a: _flat(a, np.shape(own)))]


def _flat(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return array.reshape(shape) if array.size == np.prod(shape) else array


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
    "LayerNorm": _norm,
    "RMSNorm": _norm,
    "GroupNorm": _norm,
    "InstanceNorm": _norm,
    "PReLU": _prelu,
    "MultiHeadAttention": _attention,
    "LSTMCell": _GATES,
    "OptimizedLSTMCell": _FUSED,
    "GRUCell": _FUSED,
    "SimpleCell": _FUSED,
    "RNN": _rnn,
    "Bidirectional": _bidirectional,
    "Sequential": _sequential,
}
