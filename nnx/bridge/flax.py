"""Move weights from flax and to flax, by path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, overload

import jax
import numpy as np

from nnx.bridge._move import BridgeError, Mover, convert, dtype_of, message, nested
from nnx.bridge._names import NO_RULE, Names, renamer
from nnx.serialize.fitting import LoadReport
from refx.partition import Path, dotted

__all__ = ["from_flax", "to_flax"]

M = TypeVar("M")

# flax collections that both sides must have. Others move only if both sides have them.
_COLLECTIONS = ("params", "batch_stats")


@overload
def from_flax(
    theirs: Any, ours: M, names: Names | None = None, *, strict: Literal[True] = True
) -> M: ...
@overload
def from_flax(
    theirs: Any, ours: M, names: Names | None = None, *, strict: Literal[False]
) -> tuple[M, LoadReport]: ...
def from_flax(theirs: Any, ours: Any, names: Names | None = None, *, strict: bool = True) -> Any:
    """Move every weight of a flax model into our model, by path.

    Our layers have the attribute names and shapes of the `flax.nnx` layers of the same name. So if our
    model uses the same attribute names as the flax model, the weights fit as they are. Values are cast to
    our model's dtypes and go to the devices of its values, or to those that its shapes name. An
    `nnx.Stack` takes the weights of a list of layers, and a list takes those of stacked layers.

    Args:
      theirs: a `flax.nnx` module or its `State`; or the variables of a Linen module (nested dicts
        with `"params"`, and perhaps `"batch_stats"`, at the top); or `"params"` alone.
      ours: the model to write. It may hold only shapes, from `nnx.eval_shape`. All its Refs in
        `"params"` and `"batch_stats"` must get a value. The other side may use any of a shared
        Ref's paths.
      names: maps their paths to ours where they differ, such as `{"Dense_0": "head"}` for a Linen
        module. The forms are those of `from_state_dict`.
      strict: if True, missing or unexpected paths and different shapes are an error. If False,
        everything that fits is moved.

    Returns:
      `ours`; with `strict=False`, `(ours, report)`, as from `from_state_dict`.

    Raises:
      BridgeError: weights are missing, unexpected or of another shape. The message lists all of them.
      ImportError: flax is not installed, and `theirs` is not a plain dict.

    >>> import jax.numpy as jnp, nnx
    >>> ours = nnx.Linear.init(0)(2, 1)
    >>> variables = {"params": {"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)}}
    >>> nnx.bridge.from_flax(variables, ours)(jnp.ones(2)).tolist()
    [2.0]
    """
    mover = Mover(ours, "the flax model")
    rename = renamer(names)
    for path, value, needed in _flat(theirs, mover):
        target = rename(dotted(path)) if names is not None else path
        if target is NO_RULE and needed:
            mover.unexpected[dotted(path)] = "no regex matches it"
        elif target is None or target is NO_RULE or not (needed or mover.spots(target)):
            mover.skipped.append(dotted(path))
        else:
            mover.put(target, value, dotted(path))
    report = mover.finish(_COLLECTIONS, strict=strict)
    return ours if strict else (ours, report)


def to_flax(ours: Any, theirs: Any, names: Names | None = None) -> Any:
    """Move every weight of our model into a flax model, by path: the inverse of `from_flax`.

    Args:
      ours: the model to read.
      theirs: a `flax.nnx` module, which is written in place; or a `State` or the nested dicts of a
        Linen module. For these, a copy with our weights is returned. Values are cast to the flax
        model's dtypes.
      names: maps their paths to ours, as for `from_flax`.

    Returns:
      `theirs`, or the copy.

    Raises:
      BridgeError: weights are missing, unexpected or of another shape. The message lists all of them.
      ImportError: flax is not installed, and `theirs` is not a plain dict.

    >>> import jax.numpy as jnp, nnx
    >>> ours = nnx.Linear.init(0)(2, 1)
    >>> variables = {"params": {"kernel": jnp.ones((2, 1)), "bias": jnp.ones(1)}}
    >>> moved = nnx.bridge.to_flax(ours, variables)
    >>> bool((moved["params"]["kernel"] == ours.kernel).all()), moved["params"]["bias"].tolist()
    (True, [0.0])
    """
    mover = Mover(ours, "our model")
    values: dict[Path, Any] = {}
    used: set[tuple[Path, tuple[int, ...]]] = set()
    missing: list[str] = []
    wrong: list[str] = []
    rename = renamer(names)
    for path, old, needed in _flat(theirs, mover):
        target = rename(dotted(path)) if names is not None else path
        if target is None:
            continue
        spots = [] if target is NO_RULE else mover.used(target)
        if not spots:
            missing += [dotted(path)] if needed else []
            continue
        used.update(spots)
        if any(isinstance(mover.cells[at].value, jax.ShapeDtypeStruct) for at, _ in spots):
            wrong.append(
                f"{dotted(path)} would get a shape without values from {dotted(spots[0][0])}"
            )
            continue
        new = mover.read(target)
        cast = convert(new, old) if np.shape(new) == np.shape(old) else None
        if cast is None:
            wrong.append(
                f"{dotted(path)} is {_short(old)} in the flax model, but {_short(new)} in ours"
            )
        values[path] = cast
    unexpected = mover.unused(_COLLECTIONS, used)
    sections = [
        ("has another shape or dtype", wrong),
        ("is missing in our model", missing),
        ("is unexpected in our model", unexpected),
    ]
    if any(items for _, items in sections):
        raise BridgeError(message("flax model", sections))
    return _written(theirs, values, mover)


def _short(x: Any) -> str:
    return f"{dtype_of(x)}{list(np.shape(x))}"


def _flat(theirs: Any, mover: Mover) -> Iterator[tuple[Path, Any, bool]]:
    """For every variable: its path, its value, and whether our side must have it."""
    if isinstance(theirs, Mapping) and not _is_state(theirs):
        for _, path, value, needed in _linen(theirs, mover):
            yield path, value, needed
        return
    flax = _flax()
    state: Any = theirs if _is_state(theirs) else flax.state(theirs)
    for path, variable in state.flat_state():
        if isinstance(variable, flax.RngState):
            continue
        value = variable[...] if isinstance(variable, flax.Variable) else variable
        needed = not isinstance(variable, flax.Variable) or isinstance(
            variable, (flax.Param, flax.BatchStat)
        )
        yield _flattened(path), value, needed


def _flattened(path: tuple[Any, ...]) -> Path:
    # flax's WeightNorm and SpectralNorm use whole paths as keys.
    parts = (part if isinstance(part, tuple) else (part,) for part in path)
    return tuple(str(name) for part in parts for name in part)


def _linen(theirs: Any, mover: Mover) -> Iterator[tuple[tuple[str, ...], Path, Any, bool]]:
    """For every variable: its place in the dicts, its path, its value, and whether our side must have it."""
    # "params" at the top is a collection, unless our model has an attribute of that name.
    own = {path[0] for path in mover.cells if path}
    grouped = "params" in theirs and "params" not in own
    for place, value in _leaves(theirs, ()):
        path = place[1:] if grouped else place
        yield place, path, value, not grouped or place[0] in _COLLECTIONS


def _leaves(tree: Any, at: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(tree, Mapping):
        for name, child in tree.items():
            yield from _leaves(child, (*at, str(name)))
    elif tree is not None:
        # Linen puts values with metadata in boxes.
        yield at, tree.unbox() if hasattr(tree, "unbox") else tree


def _written(theirs: Any, values: dict[Path, Any], mover: Mover) -> Any:
    if isinstance(theirs, Mapping) and not _is_state(theirs):
        places = {place: (path, value) for place, path, value, _ in _linen(theirs, mover)}
        return nested({place: values.get(path, value) for place, (path, value) in places.items()})
    flax = _flax()
    is_state = _is_state(theirs)
    state: Any = theirs if is_state else flax.state(theirs)
    pairs = []
    for path, variable in state.flat_state():
        new = values.get(_flattened(path))
        if new is not None and isinstance(variable, flax.Variable):
            new = variable.replace(new)
        pairs.append((path, variable if new is None else new))
    moved = flax.State.from_flat_path(dict(pairs))
    if is_state:
        return moved
    flax.update(theirs, moved)
    return theirs


def _is_state(theirs: Any) -> bool:
    return hasattr(theirs, "flat_state")


def _flax() -> Any:
    try:
        from flax import nnx
    except ImportError as error:
        raise ImportError(
            "nnx.bridge needs flax to read or write a flax module or State. Install it with "
            "`pip install flax`, or pass the variables as nested dicts of arrays."
        ) from error
    return nnx
