"""Where a weight of a PyTorch model goes in our model."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from nnx.bridge._torch_layers import Convert, Place, is_ours, layer_rule
from nnx.layers._unrolled import NOTHING, Spot, Unrolled
from refx.node import Node, attributes

__all__: list[str] = []


class Target(NamedTuple):
    """A place in our model, or None if we have none, with the conversion of the layout."""

    spot: Spot | None
    convert: Convert
    added: bool = False


def targets(unrolled: Unrolled, path: str) -> list[Target]:
    """The places of a weight, given its mapped name.

    Raises:
      NoPlaceError: PyTorch uses the name, but our layer has no place for it.
    """
    *parents, leaf = path.split(".")
    spots = unrolled.spots(parents, _ours)
    found: list[Target] = []
    for spot in spots:
        places = _rule(spot.at, leaf)
        # A list of layers may receive one stacked value; a name such as `0` means one of the
        # layers.
        each = [spot] if places is not None or leaf.isdecimal() else unrolled.expanded(spot)
        for one in each:
            here = places if one is spot else _rule(one.at, leaf)
            found += [_target(one, place) for place in here or [Place(leaf, as_it_is)]]
    return found


def _rule(layer: Any, leaf: str) -> list[Place] | None:
    known = layer is not NOTHING and isinstance(layer, Node | list | tuple)
    return layer_rule(layer, leaf) if known else None


def _target(spot: Spot, place: Place) -> Target:
    if place.name is None:
        return Target(None, place.convert)
    at = spot._replace(path=(*spot.path, *place.name.split(".")))
    return Target(at, place.convert, place.added)


def as_it_is(array: np.ndarray) -> np.ndarray:
    """The array."""
    return array


# Names that PyTorch and its users give to the parts of our layers.
_ALIASES = {
    "MultiHeadAttention": {
        "out_proj": "out",
        "o_proj": "out",
        "q_proj": "query",
        "k_proj": "key",
        "v_proj": "value",
        "q_norm": "query_ln",
        "k_norm": "key_ln",
    }
}


def _ours(at: Any, name: str) -> str:
    if isinstance(at, Node) and name not in attributes(at):
        for kind in type(at).__mro__:
            if is_ours(kind):
                name = _ALIASES.get(kind.__name__, {}).get(name, name)
    return name
