"""`nnx.EMA`: an exponential moving average of a model's values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import refx
from nnx.fields import ref
from nnx.module import Module
from nnx.show._format import bytes_text, count_text, short
from nnx.show._walk import Walk
from nnx.show.text import collection_sizes, number_text
from nnx.training._cells import (
    dtype_of,
    fresh,
    nest,
    nothing_selected,
    paths_differ,
    selected,
    values_differ,
    values_of,
)
from nnx.transforms.boundary import write_back
from refx import Filter, Partition, Ref, RefError
from refx.node import attributes
from refx.partition import Path

__all__ = ["EMA", "EMAError"]


class EMAError(RefError, ValueError):
    """The model does not fit the moving average. Nothing was changed."""


class EMA(Module):
    """An exponential moving average of a model's values (Polyak and Juditsky 1992,
    https://doi.org/10.1137/0330046).

    Each update moves the average: `average = decay * average + (1 - decay) * value`. The average is
    in float32 or wider, because half precision loses small steps. (float32 loses steps smaller than
    6e-8 of the average.) Values that are not floating-point numbers, such as counts and keys, are
    copied from the last update.

    Args:
      model: a module, or any tree that holds Refs.
      decay: a number from 0 to 1, or a function from the number of updates so far to such a number.
      filter: a filter that selects the Refs to average.
      debias: if False, the average starts at the model's current values. If True, these have no
        weight, and the average covers only the updates so far, as in Adam (Kingma and Ba 2014,
        https://arxiv.org/abs/1412.6980): after one update, it equals that update's value.

    Attributes: `average`, the Refs of the average, under the same paths as in the model; and
    `step`, the number of updates, int32. Both are in the collection `"ema"`.

    Raises:
      EMAError: the filter selects nothing.
      ValueError: the decay is not between 0 and 1.

    >>> import jax, jax.numpy as jnp, nnx
    >>> model = nnx.Linear.init(jax.random.key(0))(2, 1)
    >>> ema = nnx.EMA(model, 0.9)
    >>> model.bias = jnp.array([1.0])
    >>> ema.update(model)
    >>> round(float(ema.values["bias"][0]), 4)
    0.1
    >>> with ema.swapped(model):
    ...     y = model(jnp.ones(2))
    >>> model.bias.tolist()
    [1.0]
    """

    step: jax.Array = ref("ema")
    weight: jax.Array = ref("ema")

    def __init__(
        self,
        model: Any,
        decay: float | Callable[[jax.Array], Any],
        filter: Filter = "params",
        *,
        debias: bool = False,
    ):
        if not callable(decay) and not 0 <= decay <= 1:
            raise ValueError(f"The decay of EMA must be between 0 and 1, but got {decay}.")
        cells = selected(model, filter)
        if not cells:
            raise EMAError(nothing_selected("EMA has nothing to average", model, filter))
        values = values_of(model, cells)
        self.step = jnp.zeros((), jnp.int32)
        # The share of the average that comes from updates, as opposed to the starting values.
        self.weight = jnp.asarray(0.0 if debias else 1.0, jnp.float32)
        self.average = nest(
            {
                path: Ref(jax.tree.map(_start, value), "ema", **cells[path].metadata)
                for path, value in values.items()
            }
        )
        self.decay = decay
        self.filter = filter
        self.debias = debias

    def __repr__(self) -> str:
        lines = self.__nnx_summary__()
        return "\n  ".join(["EMA(", *lines]) + "\n)" if lines else super().__repr__()

    def __nnx_summary__(self) -> list[str] | None:
        """A summary to print, because the average has the same paths as the model."""
        if not {"step", "average", "decay", "filter"} <= attributes(self).keys():
            return None
        walk = Walk(self)
        n, size = collection_sizes(walk).get("ema", (0, 0))
        lines = [f"decay = {short(self.decay)}", f"filter = {short(self.filter)}"]
        if (now := number_text(self.step)) is not None:
            lines.append(f"step = {now}")
        count = len(refx.refs(self.average))
        return [*lines, f"average = {count} values  # ema: {count_text(n)} ({bytes_text(size)})"]

    def update(self, model: Any) -> None:
        """Move the average towards the model's current values.

        Raises:
          EMAError: paths, shapes or structures of the model differ from those of the average.
        """
        cells, values = self._matching(model)
        decay = self.decay(self.step) if callable(self.decay) else self.decay
        # Subtract in Python: float32 can hold a decay of 0.999999, but would round 1 - decay.
        share = 1 - decay
        weight = self.weight

        def move(average: Any, value: Any) -> Any:
            if not _averages(value):
                return fresh(value)
            # With debias, ignore the starting values: before the first update the weight is 0.
            start = jnp.where(weight > 0, average, 0) if self.debias else average
            return _between(start, jnp.asarray(value, average.dtype), share, decay)

        old = self._averages()
        new = {path: jax.tree.map(move, old[path], values[path]) for path in cells}
        own = self._cells()
        targets = [*(own[path] for path in cells)]
        targets += [refx.get_ref(self, "weight"), refx.get_ref(self, "step")]
        write_back(
            targets,
            [*new.values(), _between(weight, jnp.ones_like(weight), share, decay), self.step + 1],
        )

    @property
    def values(self) -> Partition:
        """The average by the model's paths, in the precision of the average."""
        divisor = jnp.where(self.weight > 0, self.weight, 1.0)

        def unbiased(x: Any) -> Any:
            return x / divisor.astype(x.real.dtype) if self.debias and _averages(x) else x

        return jax.tree.map(unbiased, self._averages())

    def apply_to(self, model: Any) -> None:
        """Write the average into a model, cast to the model's dtypes.

        Raises:
          EMAError: paths, shapes or structures of the model differ from those of the average.
        """
        cells, values = self._matching(model)
        average = self.values
        write_back(
            list(cells.values()),
            [jax.tree.map(_cast, values[path], average[path]) for path in cells],
        )

    @contextlib.contextmanager
    def swapped(self, model: Any) -> Iterator[Any]:
        """Give the model the averaged values within this context, and its own values back afterwards.

        Anything written to averaged values inside the context is dropped.

        Raises:
          EMAError: paths, shapes or structures of the model differ from those of the average.
        """
        cells, values = self._matching(model)
        self.apply_to(model)
        try:
            yield model
        finally:
            write_back(list(cells.values()), [values[path] for path in cells])

    def _cells(self) -> dict[Path, Ref[Any]]:
        return refx.refs(self.average)

    def _averages(self) -> Partition:
        found = refx.get_partition(self, "ema")
        return Partition({path: found["average", *path] for path in self._cells()})

    def _matching(self, model: Any) -> tuple[dict[Path, Ref[Any]], Partition]:
        cells = selected(model, self.filter)
        values = values_of(model, cells)
        own = self._averages()
        problem = paths_differ("its values", cells, own, "which are new")
        if problem is None:
            like = {path: jax.tree.map(_like, x) for path, x in values.items()}
            problem = values_differ("The value", Partition(like), own)
        if problem is not None:
            raise EMAError(
                f"The model does not fit the EMA (filter={self.filter!r}): {problem}. After "
                "changing a model, make a new EMA for it."
            )
        return cells, values


def _averages(x: Any) -> bool:
    return jnp.issubdtype(dtype_of(x), jnp.inexact)


def _between(a: jax.Array, b: jax.Array, share: Any, keep: Any) -> jax.Array:
    """`keep * a + share * b`, with weights that add up to 1 even after rounding."""
    share, keep = jnp.asarray(share, a.real.dtype), jnp.asarray(keep, a.real.dtype)
    # Start from the nearer end, so that `a` stays exact when `b` equals it.
    return jnp.where(share < 0.5, a + share * (b - a), b - keep * (b - a))


def _dtype(x: Any) -> Any:
    return jnp.promote_types(dtype_of(x), jnp.float32) if _averages(x) else dtype_of(x)


def _like(x: Any) -> Any:
    return jax.ShapeDtypeStruct(jnp.shape(x), _dtype(x))


def _cast(like: Any, x: Any) -> jax.Array:
    return fresh(x).astype(dtype_of(like)) if _averages(like) else fresh(x)


def _start(x: Any) -> jax.Array:
    return fresh(x).astype(_dtype(x)) if _averages(x) else fresh(x)
