"""Weights from PyTorch state dicts and safetensors files, by a name map. It does not need torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from nnx.bridge._move import BridgeError, Mover
from nnx.bridge._names import NO_RULE, Names, renamer
from nnx.bridge._torch_layers import NoPlaceError, Place, layer_rule
from nnx.serialize.files import arrays_of
from nnx.serialize.places import is_path
from refx import Node
from refx.node import attributes

__all__ = ["from_state_dict"]


def from_state_dict(
    state_dict: Any,
    ours: Any,
    names: Names | None = None,
    transforms: Mapping[str, Callable[[np.ndarray], Any]] | None = None,
    *,
    strict: bool = True,
) -> Any:
    """Move the weights of a PyTorch model, or of a safetensors file, into ours.

    Each name is first mapped to a path of our model by `names`, as far as the two models call
    their layers differently. The last part of the name then follows from the class of *our* layer
    there, and so does the layout: for a PyTorch `weight`, `nnx.Linear` has a transposed `kernel`,
    `nnx.Conv` a `kernel` with the channels last, `nnx.Embed` an `embedding`, and the normalizations
    have a `scale`; `running_mean` and `running_var` are `mean` and `var`. The joint input
    projection of PyTorch's `MultiheadAttention` is divided, its `out_proj` is `out`, and the layers
    of a PyTorch `Sequential` are those in `layers`. A name that ends as ours do (`kernel`, `scale`)
    is taken as it is. Values are cast to the dtypes that our model has, and go to the devices that
    its values are on or its shapes name.

    An `nnx.RNN` takes the weights of PyTorch's `LSTM`, `GRU` or `RNN` (of `SimpleCell`, with
    `activation_fn=nnx.relu` for its `nonlinearity="relu"`), an `nnx.Bidirectional` also those in
    `_reverse`, and for several layers an `nnx.Sequential` or a list of these, with or without
    others between them, takes `l0`, `l1`, ...; a cell takes those of PyTorch's cell. Two biases
    that PyTorch adds are one here, their sum. In a GRU they cannot be added: give the cell its
    second one before, `cell.dense_h.bias = jnp.zeros(3 * hidden_features)`, and it computes what
    PyTorch's does. There is no place for `proj_size`.

    Args:
      state_dict: a mapping from name to array: NumPy, JAX or torch (bfloat16 too); or the path of a
        safetensors file, or several.
      ours: the model to write; it may be one of shapes alone, which `nnx.eval_shape` made. Its
        Refs in `"params"` and `"batch_stats"` must all get a value.
      names: a dict from name to our path, where a name may be a prefix (`{"fc": "head"}` maps
        `fc.weight` too, and the longest prefix wins); a function `name -> path`; or a list of
        `(regex, template)`, of which the first that matches the whole name is expanded, as with
        `re.Match.expand`. None in place of a path drops the array. A name that no entry of a dict
        matches stays as it is; one that no regex matches is an error.
      transforms: by name, or by our dotted path: a function of the NumPy array, in place of the
        change of layout that the class says.
      strict: whether missing and unexpected names are errors. A wrong shape always is.

    Returns:
      `ours`.

    Raises:
      BridgeError: what is missing, unexpected, or of another shape; the message lists all.
      LoadError: a path was given, and there is no safetensors file, or one that is damaged.

    >>> import numpy as np, nnx
    >>> ours = nnx.Sequential(nnx.Linear.init(0)(2, 1))
    >>> state_dict = {"fc.weight": np.array([[1.0, 2.0]]), "fc.bias": np.array([3.0])}
    >>> model = nnx.bridge.from_state_dict(state_dict, ours, names={"fc": "layers.0"})
    >>> model(np.array([1.0, 1.0], "float32")).tolist()
    [6.0]
    """
    mover = Mover(ours, "the state dict")
    rename = renamer(names)
    own = dict(transforms or {})
    used: set[str] = set()
    sums: dict[str, dict[str, Any]] = {}
    for name, value in _arrays(state_dict):
        path = rename(name)
        if path is None:
            continue
        if path is NO_RULE:
            mover.unexpected.append(f"{name} (no regex matches it)")
            continue
        try:
            places = _places(ours, str(path))
        except NoPlaceError as error:
            mover.unexpected.append(f"{name} ({error})")
            continue
        for target, convert, added in places:
            if target is None:
                continue
            key = next((k for k in (name, target) if k in own), None)
            if key is not None:
                used.add(key)
                convert = own[key]
            array = to_numpy(value)
            try:
                array = convert(array)
            except (ValueError, TypeError, IndexError) as error:
                mover.wrong.append(f"{target}: {name} has shape {array.shape}: {error}")
                if added:
                    sums.setdefault(target, {})[name] = None
                continue
            if added:
                sums.setdefault(target, {})[name] = array
            else:
                mover.put(target, array, name)
    for target, parts in sums.items():
        _put_sum(mover, target, parts, strict)
    unused = [key for key in own if key not in used]
    if unused:
        raise BridgeError(
            f"No weight has the name or the path {', '.join(map(repr, unused))} of transforms."
        )
    mover.finish(("params", "batch_stats"), strict=strict)
    return ours


def to_numpy(value: Any) -> np.ndarray:
    """A NumPy array of an array of any library; a bfloat16 tensor of torch stays bfloat16."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            # NumPy has no such dtype of its own; float32 holds it exactly.
            return value.float().numpy().astype(jnp.bfloat16)
        return value.numpy()
    return np.asarray(value)


def _arrays(source: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(source, Mapping):
        yield from source.items()
        return
    paths = [source] if is_path(source) else list(source)
    if not all(map(is_path, paths)):
        raise TypeError(
            f"from_state_dict takes a mapping from name to array or the path of a safetensors "
            f"file, but got a {type(source).__name__}. Of a torch module, pass module.state_dict()."
        )
    for path in paths:
        yield from arrays_of(path)


def _places(ours: Any, path: str) -> list[Place]:
    """Where the weight with a mapped name goes, by our dotted paths."""
    *parents, leaf = path.split(".")
    layer, at = _walk(ours, parents)
    places = layer_rule(layer, leaf) if isinstance(layer, Node | list | tuple) else None
    if places is None:
        places = [Place(leaf, _as_it_is)]
    return [p if p.name is None else p._replace(name=".".join([*at, p.name])) for p in places]


def _put_sum(mover: Mover, target: str, parts: dict[str, Any], strict: bool) -> None:
    """Put the sum of what is added to each other; None is what could not be converted."""
    if any(array is None for array in parts.values()):
        return
    names = " + ".join(parts)
    if len(parts) != 2 and strict:
        mover.wrong.append(f"{target} is the sum of two biases, but there is {names}")
        return
    arrays = [np.asarray(array) for array in parts.values()]
    if len({array.shape for array in arrays}) > 1:
        shapes = " and ".join(str(array.shape) for array in arrays)
        mover.wrong.append(f"{target} is the sum of {names}, but these have shapes {shapes}")
        return
    # Half precision would round the sum twice.
    dtype = np.result_type(np.float32, *arrays)
    mover.put(target, sum(array.astype(dtype) for array in arrays), names)


def _as_it_is(array: np.ndarray) -> np.ndarray:
    return array


# What PyTorch and its users call the parts of our layers.
_ALIASES = {
    "MultiHeadAttention": {
        "out_proj": "out",
        "o_proj": "out",
        "q_proj": "query",
        "k_proj": "key",
        "v_proj": "value",
    }
}


def _walk(ours: Any, names: Sequence[str]) -> tuple[Any, list[str]]:
    """What is at a path of our model, None if there is nothing, and its path by our names."""
    at, path = ours, []
    for name in names:
        if isinstance(at, Node):
            kinds = {kind.__name__ for kind in type(at).__mro__ if _is_ours(kind)}
            if "Sequential" in kinds and name.isdecimal():
                at, path = at.layers, [*path, "layers"]  # pyright: ignore
            else:
                for kind in kinds & set(_ALIASES):
                    if name not in attributes(at):
                        name = _ALIASES[kind].get(name, name)
        path = [*path, name]
        if isinstance(at, Node):
            at = attributes(at).get(name)
        elif isinstance(at, Mapping):
            at = {str(k): v for k, v in at.items()}.get(name)
        elif isinstance(at, list | tuple) and name.isdecimal() and int(name) < len(at):
            at = at[int(name)]
        else:
            at = None
    return at, path


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "nnx"
