"""Maps the Refs of an optimizer's state to the optax state and to the parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nnx.sharding.rules import removed
from nnx.training._state import Place, find_hyperparameters
from refx.partition import Path
from refx.text import key_name

__all__: list[str] = []


class Layout:
    """The mapping between the Refs of the state and the optax state. It is static.

    `targets` are the parameters that the optimizer was made for, with their shapes.
    """

    __slots__ = ("_hyperparams", "paths", "targets", "treedef")

    def __init__(self, treedef: Any, paths: tuple[Path, ...], targets: tuple[Any, ...]):
        self.treedef = treedef
        self.paths = paths
        self.targets = targets
        self._hyperparams: dict[str, Place] | None = None

    def hyperparams(self) -> dict[str, Place]:
        """The hyperparameters in the state, by name."""
        if self._hyperparams is None:
            self._hyperparams = find_hyperparameters(self.treedef, self.paths)
        return self._hyperparams

    def _key(self) -> tuple[Any, ...]:
        return self.treedef, self.paths, self.targets

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Layout) and self._key() == other._key())

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"{len(self.paths)} arrays for {len(self.targets)} parameters"


def shapes_of(value: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(map(jnp.shape, jax.tree.leaves(value)))


def facts_of_state(
    path: Path,
    shape: tuple[int, ...],
    shapes: Collection[tuple[int, ...]],
    facts: Mapping[str, Any],
) -> Mapping[str, Any]:
    """The metadata of an array of the state: that of its parameter, for the dimensions that both have.

    Factored states, such as adafactor's, lack one dimension of the parameter. If the two candidates have
    the same size, optax leaves out the last in `v_row` and the first in `v_col`.
    """
    if shape in shapes:
        return facts
    said = facts.get("sharding")
    if said is None or len(shapes) != 1:
        return {}
    (whole,) = shapes
    lacking = [i for i in range(len(whole)) if shape == (*whole[:i], *whole[i + 1 :])]
    if not lacking:
        return {}
    return {**facts, "sharding": removed(said, lacking[0 if "v_col" in path else -1])}


def state_path(keys: Any, params: Mapping[str, Path]) -> tuple[Path, Path | None]:
    """The path of an array of the state, and the path of its parameter, if it has one."""
    path: Path = ()
    param: Path | None = None
    for key in keys:
        name = key_name(key)
        # A Partition's key is the whole path of the parameter, dotted.
        if isinstance(key, jax.tree_util.DictKey) and name in params:
            param = params[name]
            path += param or ("value",)
        else:
            path += (name,)
    return path or ("value",), param
