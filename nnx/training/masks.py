"""Parameters by filter: a mask for optax, and a transformation for each filter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optax

import refx
from nnx.training._cells import nothing_selected, selected
from nnx.training._state import OptimizerError
from refx import Filter, Partition, Ref, UnmatchedPathError
from refx.filters import to_predicates
from refx.partition import Path, listed
from refx.selection import check_selection

__all__ = ["mask"]


def mask(tree: Any, filter: Filter, wrt: Filter = "params") -> Partition:
    """Bools by path, true where a filter selects: a mask for `optax.masked` and its like.

    Args:
      tree: a model, or a Partition. In a Partition, a filter sees only the path and the array.
      filter: where the mask is true.
      wrt: the filter of the Optimizer: which Refs of a model the mask is for.

    Raises:
      FilterError: nothing is selected, and the filter is a mistake: a misspelled collection, or a
        collection for a Partition, whose values have none.

    >>> import jax, nnx, optax
    >>> model = nnx.Linear.init(jax.random.key(0))(2, 1)
    >>> decayed = nnx.training.mask(model, nnx.Not(nnx.PathContains("bias")))
    >>> decayed
    Partition({
      'kernel': True,
      'bias': False,
    })
    >>> optimizer = nnx.Optimizer(model, optax.adamw(1e-3, mask=decayed))
    """
    selects = refx.to_predicate(filter)
    if isinstance(tree, Partition):
        cells: Mapping[Path, Any] = tree
    elif not (cells := selected(tree, wrt)):
        raise OptimizerError(nothing_selected("A mask would be empty", tree, wrt))
    found = Partition({path: bool(selects(path, x)) for path, x in cells.items()})
    if not any(found.values()):
        check_selection(filter, tree)
    return found


def by_filter(rules: Mapping[Any, Any], cells: Mapping[Path, Ref[Any]]) -> Any:
    """One transformation of several, each for the parameters that its filter selects."""
    predicates = to_predicates(rules)
    labels = {
        path: next((i for i, p in enumerate(predicates) if p(path, cell)), None)
        for path, cell in cells.items()
    }
    unmatched = [path for path, label in labels.items() if label is None]
    if unmatched:
        raise UnmatchedPathError(
            f"No filter of the transformations selects {listed(unmatched)}. Add ... as the last "
            f"filter to take the rest; optax.set_to_zero() leaves parameters as they are."
        )
    # The labels are part of paths, so they are the numbers of the filters and not their texts.
    named = Partition({path: str(label) for path, label in labels.items()})
    transformations: dict[Any, Any] = {str(i): tx for i, tx in enumerate(rules.values())}
    return optax.multi_transform(transformations, named)
