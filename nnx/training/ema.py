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
    """A model does not fit the moving average of another one; nothing was changed."""


class EMA(Module):
    """An exponential moving average of values of a model (Polyak and Juditsky 1992,
    https://doi.org/10.1137/0330046).

    Each update moves the average: `average = decay * average + (1 - decay) * value`. It is in
    float32 at least, since in half precision a small step is lost; float32 loses steps of less than
    6e-8 of the average. Values that are no floating-point numbers (counts, keys) are those of the
    last update.

    Args:
      model: a module, or any tree that holds Refs.
      decay: a number from 0 to 1, or a function of the number of updates so far that gives it.
      filter: a filter: what is averaged.
      debias: without it the average starts at the values that the model has now. With it the
        first values have no weight, and the others share it as they come, as in Adam (Kingma and
        Ba 2014, https://arxiv.org/abs/1412.6980): after one update the average is that value.

    Attributes: `average`, the Refs of the average, each under the path of its value in the model,
    and `step`, the number of updates, int32; both in the collection `"ema"`.

    Raises:
      EMAError: the filter selects nothing.
      ValueError: a decay that is not from 0 to 1.

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
            raise ValueError(f"The decay of EMA is from 0 to 1, but got {decay}.")
        cells = selected(model, filter)
        if not cells:
            raise EMAError(nothing_selected("EMA has nothing to average", model, filter))
        values = values_of(model, cells)
        self.step = jnp.zeros((), jnp.int32)
        # How much of the average comes from updates, and not from the values at the start.
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
        """What is shown of it: the average has the paths of the model."""
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
        """Move the average towards the values that the model has now.

        Raises:
          EMAError: the model has other paths, shapes or structures than the average.
        """
        cells, values = self._matching(model)
        decay = self.decay(self.step) if callable(self.decay) else self.decay
        # A number is subtracted as Python does it: float32 has 0.999999, but not what is left to 1.
        share = 1 - decay
        weight = self.weight

        def move(average: Any, value: Any) -> Any:
            if not _averages(value):
                return fresh(value)
            # Where nothing has any weight yet, what is there does not count.
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
        """The average by the paths of the model, in its own precision."""
        divisor = jnp.where(self.weight > 0, self.weight, 1.0)

        def unbiased(x: Any) -> Any:
            return x / divisor.astype(x.real.dtype) if self.debias and _averages(x) else x

        return jax.tree.map(unbiased, self._averages())

    def apply_to(self, model: Any) -> None:
        """Write the average into a model, cast to the dtypes that the model has.

        Raises:
          EMAError: the model has other paths, shapes or structures than the average.
        """
        cells, values = self._matching(model)
        average = self.values
        write_back(
            list(cells.values()),
            [jax.tree.map(_cast, values[path], average[path]) for path in cells],
        )

    @contextlib.contextmanager
    def swapped(self, model: Any) -> Iterator[Any]:
        """Within this context the model has the average; afterwards, its own values again.

        What is written meanwhile into values that are averaged is dropped.

        Raises:
          EMAError: the model has other paths, shapes or structures than the average.
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
                f"The model does not fit the EMA (filter={self.filter!r}): {problem}. Make a new "
                f"EMA for a model that was changed."
            )
        return cells, values


def _averages(x: Any) -> bool:
    return jnp.issubdtype(dtype_of(x), jnp.inexact)


def _between(a: jax.Array, b: jax.Array, share: Any, keep: Any) -> jax.Array:
    """`keep * a + share * b`, where `keep + share` is 1, also where the two are rounded."""
    share, keep = jnp.asarray(share, a.real.dtype), jnp.asarray(keep, a.real.dtype)
    # Counted from the nearer end, which stays where it is if nothing moves it.
    return jnp.where(share < 0.5, a + share * (b - a), b - keep * (b - a))


def _dtype(x: Any) -> Any:
    return jnp.promote_types(dtype_of(x), jnp.float32) if _averages(x) else dtype_of(x)


def _like(x: Any) -> Any:
    return jax.ShapeDtypeStruct(jnp.shape(x), _dtype(x))


def _cast(like: Any, x: Any) -> jax.Array:
    return fresh(x).astype(dtype_of(like)) if _averages(like) else fresh(x)


def _start(x: Any) -> jax.Array:
    return fresh(x).astype(_dtype(x)) if _averages(x) else fresh(x)
