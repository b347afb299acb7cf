"""Load weights from PyTorch state dicts and safetensors files, by a name map. Works without torch."""

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
from refx.text import a_kind

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
    """Move the weights of a PyTorch model or a safetensors file into our model.

    First, `names` maps each name to a path of our model, where the two models name their layers
    differently. Then the class of *our* layer at that path decides the last part of the name and
    the layout. A PyTorch `weight` becomes a transposed `kernel` in `nnx.Linear`, a `kernel` with
    the channels last in `nnx.Conv`, an `embedding` in `nnx.Embed`, and a `scale` in normalizations.
    `running_mean` and `running_var` become `mean` and `var`. The joint input projection of
    PyTorch's `MultiheadAttention` is divided, and its `out_proj` becomes `out`. The layers of a
    PyTorch `Sequential` go to `layers`. Names that already end like ours (`kernel`, `scale`) stay
    as they are. An `nnx.Stack` takes the weights of a list of layers (`blocks.0.weight`,
    `blocks.1.weight`, ...), and a list takes those of a Stack. Values are cast to our model's
    dtypes and go to the devices of its values, or to those that its shapes name.

    An `nnx.RNN` takes the weights of PyTorch's `LSTM`, `GRU` or `RNN`. (For `RNN`, use a
    `SimpleCell`, with `activation_fn=nnx.relu` if PyTorch's has `nonlinearity="relu"`.) An
    `nnx.Bidirectional` also takes those that end in `_reverse`. For several layers (`l0`, `l1`,
    ...), use an `nnx.Sequential` or a list of these; other layers may stand between them. A cell
    takes the weights of PyTorch's cell. PyTorch adds two biases; here, one bias holds their sum. A
    GRU's biases cannot be added: first give the cell a second one,
    `cell.dense_h.bias = jnp.zeros(3 * hidden_features)`. Then it computes what PyTorch's computes.
    `proj_size` is not supported.

    Args:
      state_dict: a mapping from name to array: NumPy, JAX or torch (bfloat16 too); or the path of a
        safetensors file, or several paths; or the path of an index file
        (`model.safetensors.index.json`) whose files are in the same folder.
      ours: the model to write. It may hold only shapes, from `nnx.eval_shape`. All its Refs in
        `"params"` and `"batch_stats"` must get a value.
      names: a dict from name to our path, where a name may be a prefix (`{"fc": "head"}` also maps
        `fc.weight`, and the longest prefix wins); a function `name -> path`; or a list of
        `(regex, template)`: the first regex that matches the whole name counts, and its template is
        expanded as by `re.Match.expand`. None instead of a path drops the array. A name that no
        entry of a dict matches stays as it is. A name that no regex matches is an error.
      transforms: a dict from name, or from our dotted path, to a function of the NumPy array. It
        replaces the usual conversion of the layout.
      prefix: a prefix to remove from their names, such as `"module."` of PyTorch's `DataParallel`,
        `"_orig_mod."` of `torch.compile`, or `"model."`; or several, removed in order. Names
        without the prefix stay as they are.
      strict: if True, missing or unexpected names and different shapes are an error. If False,
        everything that fits is moved.

    Returns:
      `ours`. With `strict=False`, `(ours, report)`: the `nnx.LoadReport` says what was loaded,
      missing, unexpected, mismatched and skipped.

    Raises:
      BridgeError: weights are missing, unexpected, or of another shape. The message lists all of
        them, and names a prefix that would fix it.
      LoadError: a path was given, but it does not lead to a safetensors file, or the file is
        damaged, or a file lacks weights that the index lists.

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
            f"transforms names {', '.join(map(repr, unused))}, but no weight has that name or path."
        )
    hint = _hint(mover, rename, given, prefix) if strict and mover.unexpected else ""
    report = mover.finish(("params", "batch_stats"), strict=strict, hint=hint)
    return ours if strict else (ours, report)


def _both(target: Target) -> tuple[str, ...]:
    """Our dotted path of a target; for a target in a Stack, also the path of its layer in a list."""
    assert target.spot is not None
    return ".".join(target.spot.path), ".".join(target.spot.name)


def _hint(mover: Mover, rename: Any, given: list[str], prefix: Any) -> str:
    """For the error: a prefix whose removal would make the names match the model."""
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
                    f"\n{size} of the {len(given)} names begin with {head + '.'!r}. Without it, "
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
    """Turn an array of any library into a NumPy array. A bfloat16 tensor of torch stays bfloat16."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            # NumPy lacks this dtype; float32 holds its values exactly.
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
            "from_state_dict takes a mapping from name to array or the path of a safetensors "
            f"file, but got {a_kind(type(source))}. For a torch module, pass "
            "module.state_dict()."
        )
    for path in paths:
        if os.fsdecode(path).endswith(".json"):
            yield from _shards(os.fsdecode(path))
        else:
            yield from arrays_of(path)


def _shards(index: str) -> Iterator[tuple[str, Any]]:
    """The content of the files that an index file names."""
    try:
        with open(index, encoding="utf-8") as file:
            where = json.load(file)["weight_map"]
        wanted = {str(name): str(shard) for name, shard in where.items()}
    except OSError as error:
        raise LoadError(f"{index} cannot be loaded: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LoadError(
            f"{index} cannot be loaded: it is not an index of safetensors files. An index lists "
            "the file of each weight in 'weight_map'."
        ) from error
    for shard in dict.fromkeys(wanted.values()):
        # An index may only name files beside it.
        if os.path.basename(shard) != shard or shard in ("", ".", ".."):
            raise LoadError(
                f"{index} cannot be loaded: {shard!r:.80} is not the name of a file beside it."
            )
        names = {name for name, at in wanted.items() if at == shard}
        for name, array in arrays_of(os.path.join(os.path.dirname(index), shard)):
            if name in names:
                names.discard(name)
                yield name, array
        if names:
            raise LoadError(
                f"{shard} lacks {listed(sorted(names), 4)}, which {index} lists for it."
            )


def _put_sum(mover: Mover, spot: Spot, parts: dict[str, Any], strict: bool) -> None:
    """Put the sum of weights that go to the same place. None marks a weight that could not be converted."""
    if any(array is None for array in parts.values()):
        return
    names, target = " + ".join(parts), ".".join(spot.name)
    if len(parts) != 2 and strict:
        text = f"{target} is the sum of two biases, but there is only {names}"
        mover.refuse(spot.name, None, names, text, whole=True)
        return
    arrays = [np.asarray(array) for array in parts.values()]
    if len({array.shape for array in arrays}) > 1:
        shapes = " and ".join(str(array.shape) for array in arrays)
        text = f"{target} is the sum of {names}, but these have shapes {shapes}"
        mover.refuse(spot.name, None, names, text, whole=True)
        return
    # Adding in half precision would round twice.
    dtype = np.result_type(np.float32, *arrays)
    mover.put_at(spot, sum(array.astype(dtype) for array in arrays), names)
