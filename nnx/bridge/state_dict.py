"""Turn the weights of our models into PyTorch state dicts: the inverse of `from_state_dict`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from nnx.bridge._move import BridgeError, Mover, convert, message, text_of
from nnx.bridge._names import NO_RULE, Names, renamer
from nnx.bridge._targets import Target, targets
from nnx.bridge._torch_layers import NoPlaceError, is_ours
from nnx.bridge._torch_shapes import torch_shapes
from nnx.layers._unrolled import Spot, Unrolled, part_of, take
from nnx.layers.containers import Sequential, Stack
from refx import Node, Ref
from refx.node import attributes
from refx.partition import Path, dotted

__all__ = ["to_state_dict"]

_COLLECTIONS = ("params", "batch_stats")


def to_state_dict(
    ours: Any,
    names: Names | None = None,
    *,
    like: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The weights of our model with PyTorch's names and layouts.

    Weights get the names of PyTorch's layer of the same kind (`weight`, `running_mean`,
    `in_proj_weight`). The layers of a `Sequential`, a list or a `Stack` are called `0`, `1`, and so
    on. A shared layer appears under each of its names. Everything else keeps our names. Recurrent
    layers have two biases in PyTorch and their sum here: the second one becomes zero.

    `torch_model.load_state_dict(nnx.bridge.to_state_dict(ours, like=torch_model.state_dict()))` is
    the inverse of `from_state_dict`, with the same `names`. To write a safetensors file without
    torch: `safetensors.numpy.save_file(nnx.bridge.to_state_dict(ours), path)`.

    Args:
      ours: the model whose Refs in `"params"` and `"batch_stats"` are read.
      names: maps their names to our paths, as for `from_state_dict`. Without `like` it must be a
        dict. If two names have the same path, the result has that tied weight under both names.
      like: the state dict of the model that will take the weights. The result has its names in its
        order, its shapes and its dtypes, and torch tensors where it has them. Entries that our
        model lacks (`num_batches_tracked`), or that `names` drops, are copied from `like`.

    Returns:
      A dict from name to NumPy array, or to torch tensor where `like` has tensors.

    Raises:
      BridgeError: `like` and our model do not fit. The message lists every problem.
      ValueError: `names` cannot be inverted without `like`.

    >>> import nnx
    >>> model = nnx.Sequential(nnx.Linear.init(0)(2, 3), nnx.relu)
    >>> {name: array.shape for name, array in nnx.bridge.to_state_dict(model).items()}
    {'0.weight': (3, 2), '0.bias': (3,)}
    """
    mover = Mover(ours, "our model")
    out = _Out(mover)
    if like is not None:
        rename = renamer(names)
        for name, value in like.items():
            out.add_like(name, value, rename(name))
        return out.finish(like)
    if names is not None and not isinstance(names, Mapping):
        raise ValueError(
            "to_state_dict can invert names only if it is a dict, not a function or a list of "
            "regexes. Pass like=, the state dict of the model that will take the weights."
        )
    renamed = _inverse(mover.unrolled, names or {})
    for path, at in renamed.refs.items():
        for name in at:
            out.add(name, np.shape(out.value(path)), [Target(path, _same)])
    for at, layers, leaf, shape in _weights(ours, mover.unrolled, renamed):
        if leaf is None:
            found = [Target(at, _same)]
            shape = np.shape(out.value(at))
        else:
            found = targets(mover.unrolled, ".".join((*at.name, leaf)))
        spots = [target.spot for target in found]
        if any(spot is not None and (spot.path, spot.indices) in renamed.places for spot in spots):
            continue
        for layer in layers:
            out.add(".".join((*layer, leaf or at.name[-1])), shape, found)
    return out.finish(None)


def _same(array: np.ndarray) -> np.ndarray:
    return array


class _Out:
    """Collects the arrays of a state dict, together with every problem found."""

    def __init__(self, mover: Mover):
        self._mover = mover
        self._arrays: dict[str, Any] = {}
        self._used: set[tuple[Path, tuple[int, ...]]] = set()
        self._sums: dict[tuple[Path, tuple[int, ...]], set[Any]] = {}
        self._missing: list[str] = []
        self._wrong: list[str] = []

    def value(self, spot: Spot) -> Any:
        """Our value at a place."""
        found = self._mover.find(spot.path)
        assert found is not None
        value = self._mover.cells[found].value
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(value)):
            raise BridgeError(
                f"{dotted(spot.name)} is a shape without values, from nnx.eval_shape."
            )
        return np.asarray(take(value, spot.indices) if spot.indices else value)

    def add_like(self, name: str, value: Any, path: Any) -> None:
        """Add our weight for the other side's `name`, where the entry looks like `value`."""
        if path is None:
            self._arrays[name] = value
            return
        try:
            found = [] if path is NO_RULE else targets(self._mover.unrolled, str(path))
        except NoPlaceError:
            found = []
        if found and all(target.spot is None for target in found):
            self._arrays[name] = value
        elif not found or any(self._lacks(target) for target in found):
            self._missing.append(name)
        else:
            self.add(name, tuple(np.shape(value)), found)

    def _lacks(self, target: Target) -> bool:
        return target.spot is not None and self._mover.find(target.spot.path) is None

    def add(self, name: str, shape: tuple[int, ...], found: list[Target]) -> None:
        """Add the weight that comes from these places, converted to PyTorch's layout."""
        numbers = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)
        filled = np.zeros(numbers.size, bool)
        array: Any = None
        for spot, change, added in found:
            if spot is None:
                continue
            ours = self.value(spot)
            canonical = self._mover.find(spot.path)
            assert canonical is not None
            key = (canonical, spot.indices)
            self._used.add(key)
            array = np.zeros(numbers.size, ours.dtype) if array is None else array
            try:
                # Convert an array of positions: the result says where each value comes from.
                where = change(part_of(numbers, spot))
            except (ValueError, TypeError, IndexError) as error:
                where = None if added else error
            if where is None or (added and key in self._sums and name not in self._sums[key]):
                filled[:] = True
                continue
            if added:
                self._sums.setdefault(key, set()).add(name)
            if isinstance(where, Exception) or np.shape(where) != ours.shape:
                self._wrong.append(
                    f"{name} has shape {shape}, but {dotted(spot.name)} is {text_of(ours)}"
                )
                return
            array[np.ravel(where)] = ours.ravel()
            filled[np.ravel(where)] = True
        if array is None:
            array, filled = np.zeros(numbers.size, np.int64), True
        if not np.all(filled):
            self._wrong.append(f"{name} has shape {shape}, but our model has only a part of it")
            return
        self._arrays[name] = array.reshape(shape)

    def finish(self, like: Mapping[str, Any] | None) -> dict[str, Any]:
        """The state dict.

        Raises:
          BridgeError: a weight is missing, unexpected or of another shape.
        """
        sections = [
            ("has another shape", self._wrong),
            ("is missing in our model", self._missing),
            ("is unexpected in our model", self._mover.unused(_COLLECTIONS, self._used)),
        ]
        if any(items for _, items in sections):
            raise BridgeError(message("state dict", sections))
        if like is None:
            return self._arrays
        return {name: _as(self._arrays[name], value, name) for name, value in like.items()}


def _as(array: Any, like: Any, name: str) -> Any:
    """Convert an array to the kind that the other side has."""
    if array is like:
        return like
    if hasattr(like, "new_tensor"):
        # torch does not know NumPy's bfloat16; float32 holds its values exactly.
        if array.dtype.kind not in "fiub":
            array = array.astype(np.float32)
        return like.new_tensor(array, dtype=like.dtype)
    cast = convert(array, jax.ShapeDtypeStruct(np.shape(like), like.dtype), place=False)
    if cast is None:
        raise BridgeError(
            f"{name} is {text_of(like)} in the state dict, but {array.dtype} in ours."
        )
    return cast


class _Inverse:
    """The inverse of a dict of names: their names for our Refs, and for modules with Refs inside."""

    def __init__(self) -> None:
        self.refs: dict[Spot, list[str]] = {}
        self.places: set[tuple[Path, tuple[int, ...]]] = set()
        self.parents: dict[Path, list[Path]] = {}


def _inverse(unrolled: Unrolled, names: Mapping[str, Any]) -> _Inverse:
    inverse = _Inverse()
    for theirs, path in names.items():
        if path is None:
            continue
        parts = dotted(path).split(".") if dotted(path) else []
        for spot in unrolled.spots(parts):
            if isinstance(spot.at, Ref):
                inverse.refs.setdefault(spot, []).append(theirs)
                inverse.places.add((spot.path, spot.indices))
            else:
                inverse.parents.setdefault(spot.name, []).append(tuple(theirs.split(".")))
    return inverse


def _weights(
    ours: Any, unrolled: Unrolled, renamed: _Inverse
) -> Iterator[tuple[Spot, list[Path], str | None, tuple[int, ...]]]:
    """For each weight: the place of its layer, the layer's names in PyTorch, PyTorch's name and the shape.

    For a Ref that keeps our name: the place of the Ref, its layer's names, None, and ().
    """
    todo: list[tuple[Spot, list[Path], frozenset[int]]] = [(Spot(ours, ()), [()], frozenset())]
    while todo:
        spot, names, around = todo.pop()
        at = spot.at
        if id(at) in around:
            continue
        around = around | {id(at)} if isinstance(at, Node | list | dict) else around
        if isinstance(at, Ref):
            if at.collection in _COLLECTIONS:
                yield spot, [name[:-1] for name in names], None, ()
            continue
        names = renamed.parents.get(spot.name, names)
        if isinstance(at, Stack | Sequential | list | tuple):
            items = enumerate(unrolled.expanded(spot))
            inner = [(x._replace(part=()), str(i)) for i, x in items]
        else:
            shapes = torch_shapes(at) if isinstance(at, Node) else None
            for leaf, shape in (shapes or {}).items():
                yield spot, names, leaf, shape
            inner = _children(spot, known=shapes is not None)
        todo += [(x, [(*name, key) for name in names], around) for x, key in inner][::-1]


def _children(spot: Spot, *, known: bool) -> list[tuple[Spot, str]]:
    at, found = spot.at, []
    if isinstance(at, Node):
        items, kinds = attributes(at), {k.__name__ for k in type(at).__mro__ if is_ours(k)}
    elif isinstance(at, Mapping):
        items, kinds = {str(key): value for key, value in at.items()}, set()
    else:
        return []
    for key, value in items.items():
        theirs = key
        if known:
            # A PyTorch layer has no layers inside; only MultiheadAttention has some here.
            if "MultiHeadAttention" not in kinds or key in ("query", "key", "value"):
                continue
            theirs = "out_proj" if key == "out" else key
        found.append((spot._replace(at=value, path=(*spot.path, key)), theirs))
    return found
