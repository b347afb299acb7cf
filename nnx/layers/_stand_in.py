"""Call a layer with some of its parameters replaced by other arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnx.module import Module
from refx import NotMutableError, StructureError, merge, refs, split
from refx.text import a_kind

__all__ = ["call_with"]

Path = tuple[str, ...]


def call_with(layer: Module, weights: Mapping[Path, Any], how: str, args: Any, kwargs: Any) -> Any:
    """Call a copy of the layer with these weights, and keep its writes to other Refs.

    Args:
      layer: the layer.
      weights: arrays by path.
      how: a description of the weights for messages, such as "with normalized weights".
      args, kwargs: arguments of the call.

    Raises:
      StructureError: the layer changed an attribute that is not a Ref.
      NotMutableError: the layer wrote one of these parameters.
    """
    dagdef, values = split(layer)
    stand_in: Any = merge(dagdef, {**values, **weights})
    cells = refs(stand_in)
    before = {path: cell.value for path, cell in cells.items()}
    result = stand_in(*args, **kwargs)
    now, after = split(stand_in)
    arrays = [path for path in values if path not in cells]
    if now is not dagdef or any(after[path] is not values[path] for path in arrays):
        raise StructureError(
            f"{a_kind(type(layer), start=True)} changed an attribute that is not a Ref while it was called "
            f"{how}. That call runs on a copy, so the change would be lost. Keep values that change "
            f"in a Ref: a ref() field, or nnx.Ref(...)."
        )
    written = {path for path, cell in cells.items() if cell.value is not before[path]}
    if lost := sorted(written.intersection(weights)):
        raise NotMutableError(
            f"{type(layer).__name__} wrote to its parameter {'.'.join(lost[0])!r} while it was called "
            f"{how}. Do not normalize that parameter, or write to it outside the call."
        )
    if written:
        own = refs(layer)
        for path in written:
            own[path].value = cells[path].value
    return result
