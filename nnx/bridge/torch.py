"""Weights from PyTorch state dicts and safetensors files, by a name map. It does not need torch."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, overload

import jax.numpy as jnp
import numpy as np

from nnx.bridge._move import BridgeError, Mover
from nnx.bridge._names import NO_RULE, Names, renamer, without_prefix
from nnx.bridge._targets import Target, targets
from nnx.bridge._torch_layers import NoPlaceError
from nnx.layers._unrolled import Spot, part_of
from nnx.serialize.errors import LoadError
from nnx.serialize.files import arrays_of
from nnx.serialize.fitting import LoadReport
from nnx.serialize.places import is_path
from refx.partition import listed

__all__ = ["from_state_dict"]

M = TypeVar("M")


Transforms = Mapping[str, Callable[[np.ndarray], Any]]


@overload
def from_state_dict(
    state_dict: Any,
    ours: M,
    names: Names | None = None,
    transforms: Transforms | None = None,
    *,
    prefix: str | Sequence[str] = (),
    strict: Literal[True] = True,
) -> M: ...
@overload
def from_state_dict(
    state_dict: Any,
    ours: M,
    names: Names | None = None,
    transforms: Transforms | None = None,
    *,
    prefix: str | Sequence[str] = (),
    strict: Literal[False],
) -> tuple[M, LoadReport]: ...
def from_state_dict(
    state_dict: Any,
    ours: Any,
    names: Names | None = None,
    transforms: Transforms | None = None,
    *,
    prefix: str | Sequence[str] = (),
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
    is taken as it is. An `nnx.Stack` takes the weights of a list of layers, `blocks.0.weight`,
    `blocks.1.weight`, ..., and a list those of a Stack. Values are cast to the dtypes that our model
    has, and go to the devices that its values are on or its shapes name.

    An `nnx.RNN` takes the weights of PyTorch's `LSTM`, `GRU` or `RNN` (of `SimpleCell`, with
    `activation_fn=nnx.relu` for its `nonlinearity="relu"`), an `nnx.Bidirectional` also those in
    `_reverse`, and for several layers an `nnx.Sequential` or a list of these, with or without
    others between them, takes `l0`, `l1`, ...; a cell takes those of PyTorch's cell. Two biases
    that PyTorch adds are one here, their sum. In a GRU they cannot be added: give the cell its
    second one before, `cell.dense_h.bias = jnp.zeros(3 * hidden_features)`, and it computes what
    PyTorch's does. There is no place for `proj_size`.

    Args:
      state_dict: a mapping from name to array: NumPy, JAX or torch (bfloat16 too); or the path of a
        safetensors file, or several; or that of the index file of several
        (`model.safetensors.index.json`), which lie in its folder.
      ours: the model to write; it may be one of shapes alone, which `nnx.eval_shape` made. Its
        Refs in `"params"` and `"batch_stats"` must all get a value.
      names: a dict from name to our path, where a name may be a prefix (`{"fc": "head"}` maps
        `fc.weight` too, and the longest prefix wins); a function `name -> path`; or a list of
        `(regex, template)`, of which the first that matches the whole name is expanded, as with
        `re.Match.expand`. None in place of a path drops the array. A name that no entry of a dict
        matches stays as it is; one that no regex matches is an error.
      transforms: by name, or by our dotted path: a function of the NumPy array, in place of the
        change of layout that the class says.
      prefix: what names begin with on their side alone, such as `"module."` of PyTorch's
        `DataParallel`, `"_orig_mod."` of `torch.compile`, `"model."`; or several, taken off in order.
        Names that do not begin with it stay as they are.
      strict: whether it is an error if names are missing or unexpected, or shapes differ. Without it,
        what fits is moved.

    Returns:
      `ours`; with `strict=False`, `(ours, report)`, where the `nnx.LoadReport` says what was loaded,
      missing, unexpected, mismatched and skipped.

    Raises:
      BridgeError: what is missing, unexpected, or of another shape; the message lists all, and names
        a prefix that would mend it.
      LoadError: a path was given, and there is no safetensors file, or one that is damaged, or that
        lacks what the index says.

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
    sums: dict[tuple[Any, ...], tuple[Spot, dict[str, Any]]] = {}
    given: list[str] = []
    for name, value in _arrays(state_dict):
        given.append(name)
        path = rename(without_prefix(name, prefix))
        if path is None:
            mover.skipped.append(name)
            continue
        if path is NO_RULE:
            mover.unexpected[name] = "no regex matches it"
            continue
        try:
            found = targets(mover.unrolled, str(path))
        except NoPlaceError as error:
            mover.unexpected[name] = str(error)
            continue
        for target in found:
            if target.spot is None:
                mover.skipped.append(name)
                continue
            key = next((k for k in (name, *_both(target)) if k in own), None)
            if key is not None:
                used.add(key)
                target = target._replace(convert=own[key])
            spot, array = target.spot, to_numpy(value)
            assert spot is not None
            try:
                array = target.convert(part_of(array, spot))
            except (ValueError, TypeError, IndexError) as error:
                mover.refuse(spot.name, array, name, f"has shape {array.shape}: {error}")
                array = None
            if target.added:
                sums.setdefault((spot.path, spot.indices), (spot, {}))[1][name] = array
            elif array is not None:
                mover.put_at(spot, array, name)
    for spot, parts in sums.values():
        _put_sum(mover, spot, parts, strict)
    unused = [key for key in own if key not in used]
    if unused:
        raise BridgeError(
            f"No weight has the name or the path {', '.join(map(repr, unused))} of transforms."
        )
    hint = _hint(mover, rename, given, prefix) if strict and mover.unexpected else ""
    report = mover.finish(("params", "batch_stats"), strict=strict, hint=hint)
    return ours if strict else (ours, report)


def _both(target: Target) -> tuple[str, ...]:
    """Our dotted path of a target, and that of its layer in a list, where it is in a Stack."""
    assert target.spot is not None
    return ".".join(target.spot.path), ".".join(target.spot.name)


def _hint(mover: Mover, rename: Any, given: list[str], prefix: Any) -> str:
    """For a message: the prefix without which names would be those of the model."""
    names = [without_prefix(name, prefix) for name in given if name in mover.unexpected]
    for count in (1, 2, 3):
        heads = Counter(
            ".".join(name.split(".")[:count]) for name in names if name.count(".") >= count
        )
        for head, size in heads.most_common(3):
            inner = [without_prefix(name, head) for name in names if name.startswith(f"{head}.")]
            known = sum(_leads_somewhere(mover, rename(name)) for name in inner)
            if 2 * known > size:
                return (
                    f"\nWithout {head + '.'!r}, with which {size} of the {len(given)} names begin, "
                    f"{known} are names of the model: pass prefix={head + '.'!r}."
                )
    return ""


def _leads_somewhere(mover: Mover, path: Any) -> bool:
    if path is None or path is NO_RULE:
        return False
    try:
        found = targets(mover.unrolled, str(path))
    except NoPlaceError:
        return False
    return all(t.spot is not None and mover.find(t.spot.path) is not None for t in found)


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
        if os.fsdecode(path).endswith(".json"):
            yield from _shards(os.fsdecode(path))
        else:
            yield from arrays_of(path)


def _shards(index: str) -> Iterator[tuple[str, Any]]:
    """What is in the files that an index file names."""
    try:
        with open(index, encoding="utf-8") as file:
            where = json.load(file)["weight_map"]
        wanted = {str(name): str(shard) for name, shard in where.items()}
    except OSError as error:
        raise LoadError(f"{index} cannot be loaded: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LoadError(
            f"{index} cannot be loaded: it is no index of safetensors files, which has the file of "
            f"each weight in 'weight_map'."
        ) from error
    for shard in dict.fromkeys(wanted.values()):
        # An index names files beside it, and none elsewhere.
        if os.path.basename(shard) != shard or shard in ("", ".", ".."):
            raise LoadError(
                f"{index} cannot be loaded: {shard!r:.80} is no name of a file beside it."
            )
        names = {name for name, at in wanted.items() if at == shard}
        for name, array in arrays_of(os.path.join(os.path.dirname(index), shard)):
            if name in names:
                names.discard(name)
                yield name, array
        if names:
            raise LoadError(
                f"{shard} lacks {listed(sorted(names), 4)}, which {index} says is there."
            )


def _put_sum(mover: Mover, spot: Spot, parts: dict[str, Any], strict: bool) -> None:
    """Put the sum of what is added to each other; None is what could not be converted."""
    if any(array is None for array in parts.values()):
        return
    names, target = " + ".join(parts), ".".join(spot.name)
    if len(parts) != 2 and strict:
        text = f"{target} is the sum of two biases, but there is {names}"
        mover.refuse(spot.name, None, names, text, whole=True)
        return
    arrays = [np.asarray(array) for array in parts.values()]
    if len({array.shape for array in arrays}) > 1:
        shapes = " and ".join(str(array.shape) for array in arrays)
        text = f"{target} is the sum of {names}, but these have shapes {shapes}"
        mover.refuse(spot.name, None, names, text, whole=True)
        return
    # Half precision would round the sum twice.
    dtype = np.result_type(np.float32, *arrays)
    mover.put_at(spot, sum(array.astype(dtype) for array in arrays), names)
