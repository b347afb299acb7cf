"""Metrics that accumulate over batches, also inside `nnx.jit` and `nnx.scan`.

The state is in Refs of the collection `"metrics"`. Each total is a pair of float32 numbers (or
float64, if JAX has it enabled when the metric is made): the second holds what the first must round
away. So totals stay precise over any number of batches, and counts are exact. A metric that has
seen no values is NaN.

`metric.merge(other)` adds another metric with the same settings. With `axis_name`, an update inside
`nnx.vmap` or `nnx.shard_map` adds the batches of all lanes of that axis.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnx.fields import ref
from nnx.training._metric import (
    Accumulator,
    Metric,
    argument,
    how_many,
    integer_labels,
    largest,
    no_count,
    no_sum,
    sum_of,
    weighted,
)
from nnx.training._totals import Count, Spread, Sum, added, counted, spread_of_both
from refx.node import attributes
from refx.text import a_kind

__all__ = [
    "Accuracy",
    "Average",
    "ConfusionMatrix",
    "Metric",
    "MultiMetric",
    "Perplexity",
    "Statistics",
    "Welford",
]


class Average(Accumulator):
    """The mean of values.

    Args:
      argname: the name of the keyword argument of `update` that holds the values.
      axis_name: a mapped axis, such as that of `nnx.vmap`. Each update adds the values of all its
        lanes, so the state is the same in every lane.

    Attributes: `total`, a float32 scalar, and `rest`, the difference from the exact total; `count`,
    int32, and `count_high`, the number of times that `count` has passed 2³⁰.

    >>> import jax.numpy as jnp, nnx
    >>> loss = nnx.metrics.Average("loss")
    >>> loss.update(loss=jnp.array([1.0, 2.0, 3.0]))
    >>> loss.update(loss=4.0)
    >>> float(loss.compute())
    2.5
    """

    total: jax.Array = ref("metrics")
    rest: jax.Array = ref("metrics")
    count: jax.Array = ref("metrics")
    count_high: jax.Array = ref("metrics")

    def __init__(self, argname: str = "values", *, axis_name: Any = None):
        self.argname = argname
        self.axis_name = axis_name
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._set((no_sum(), no_count()))

    def _get(self) -> tuple[Sum, Count]:
        return Sum(self.total, self.rest), Count(self.count, self.count_high)

    def _set(self, state: tuple[Sum, Count]) -> None:
        (self.total, self.rest), (self.count, self.count_high) = state

    def _both(self, a: tuple[Sum, Count], b: tuple[Sum, Count]) -> tuple[Sum, Count]:
        return added(a[0], *b[0]), counted(a[1], *b[1])

    def update(self, *, mask: Any = None, **kwargs: Any) -> None:
        """Add the values of the argument `argname`, of any shape.

        Args:
          mask: a boolean array that broadcasts to the values and says which of them count.
          **kwargs: the values, under the name `argname`.

        Raises:
          TypeError: the argument `argname` is missing.
          ValueError: the mask does not broadcast to the values.
        """
        values = argument(self, self.argname, kwargs)
        values, kept = weighted(self, values, mask, self.total.dtype)
        total = self._over_lanes(sum_of(values, kept))
        count = self._over_lanes(how_many(values, kept))
        self._set((added(Sum(self.total, self.rest), total), counted(self._get()[1], count)))

    def compute(self) -> jax.Array:
        """The mean, a float32 scalar; NaN if there are no values."""
        total, count = self._get()
        return (total.total + total.rest) / count.as_float(total.total.dtype)


class Perplexity(Average):
    """The exponential of the mean negative log-likelihood, such as the cross entropy per token.

    Args:
      argname: the name of the keyword argument of `update` that holds the negative log-likelihoods.
      axis_name: as for `Average`.

    >>> import jax.numpy as jnp, nnx
    >>> perplexity = nnx.metrics.Perplexity()
    >>> perplexity.update(values=jnp.log(jnp.array([2.0, 8.0])))
    >>> round(float(perplexity.compute()), 4)
    4.0
    """

    def compute(self) -> jax.Array:
        """The perplexity, a float32 scalar; NaN if there are no values."""
        return jnp.exp(super().compute())


class Accuracy(Average):
    """The fraction of correct predictions.

    Args:
      threshold: for binary labels, a logit above the threshold predicts 1. If None, the prediction
        is the index of the largest logit along the last axis.
      top_k: a prediction is correct if the label is among the `top_k` largest logits.
      axis_name: as for `Average`.

    Labels outside the range of classes, such as -1 for padding, are not counted.

    >>> import jax.numpy as jnp, nnx
    >>> accuracy = nnx.metrics.Accuracy()
    >>> accuracy.update(logits=jnp.array([[1.0, 2.0], [3.0, 0.0]]), labels=jnp.array([1, 1]))
    >>> float(accuracy.compute())
    0.5
    """

    def __init__(self, threshold: float | None = None, *, top_k: int = 1, axis_name: Any = None):
        if threshold is not None and not isinstance(threshold, int | float):
            raise TypeError(
                "The threshold of Accuracy must be a number or None, but got "
                f"{a_kind(type(threshold))}."
            )
        if top_k < 1 or (top_k > 1 and threshold is not None):
            raise ValueError(
                "The top_k of Accuracy must be at least 1, and exactly 1 with a threshold, but "
                f"got {top_k} and the threshold {threshold}."
            )
        super().__init__(axis_name=axis_name)
        self.threshold = threshold
        self.top_k = top_k

    def update(self, *, mask: Any = None, **kwargs: Any) -> None:
        """Count the predictions of one batch.

        Args:
          mask: a boolean array that broadcasts to the labels and says which predictions count.
          **kwargs: `logits` of shape `(..., classes)`, or of the labels' shape if there is a
            threshold; and integer `labels` of shape `(...)`.

        Raises:
          TypeError: `logits` or `labels` are missing, or the labels are not integers.
          ValueError: the shapes do not fit, or there are fewer classes than `top_k`.
        """
        logits = jnp.asarray(argument(self, "logits", kwargs))
        labels = integer_labels(self, argument(self, "labels", kwargs))
        if self.threshold is not None:
            if logits.shape != labels.shape:
                raise ValueError(
                    f"Accuracy with a threshold expects logits of the shape of the labels, "
                    f"{labels.shape}, but got {logits.shape}."
                )
            right = (logits > self.threshold) == (labels != 0)
            known = labels >= 0
        else:
            predicted = largest(self, logits, labels, self.top_k)
            # Use a dtype that can hold the number of classes; the labels' own dtype may be too
            # small.
            labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
            right = (predicted == labels[..., None]).any(-1)
            known = (labels >= 0) & (labels < logits.shape[-1])
        _, kept = weighted(self, labels, mask, self.total.dtype)
        super().update(values=right, mask=known if kept is None else known & kept)


class Statistics(NamedTuple):
    """The result of `Welford`.

    Attributes: `mean`; `standard_error_of_mean`; and `standard_deviation` of the population, which
    divides the squares by the number of values.
    """

    mean: jax.Array
    standard_error_of_mean: jax.Array
    standard_deviation: jax.Array


class Welford(Accumulator):
    """Mean and standard deviation, in one numerically stable pass.

    The method is that of Welford (1962, https://doi.org/10.1080/00401706.1962.10490022). Batches
    are merged by the formula of Chan, Golub and LeVeque (1983,
    https://doi.org/10.1080/00031305.1983.10483115).

    Args:
      argname: the name of the keyword argument of `update` that holds the values.
      axis_name: as for `Average`.

    Attributes: `count`, int32, and `count_high`, as for `Average`; `mean` and `m2` (the sum of
    squared differences), float32 scalars; `mean_rest` and `m2_rest`, the differences from the exact
    values.

    >>> import jax.numpy as jnp, nnx
    >>> welford = nnx.metrics.Welford()
    >>> welford.update(values=jnp.array([1.0, 2.0]))
    >>> welford.update(values=jnp.array([3.0, 4.0]))
    >>> found = welford.compute()
    >>> float(found.mean), round(float(found.standard_deviation), 4)
    (2.5, 1.118)
    """

    count: jax.Array = ref("metrics")
    count_high: jax.Array = ref("metrics")
    mean: jax.Array = ref("metrics")
    mean_rest: jax.Array = ref("metrics")
    m2: jax.Array = ref("metrics")
    m2_rest: jax.Array = ref("metrics")

    def __init__(self, argname: str = "values", *, axis_name: Any = None):
        self.argname = argname
        self.axis_name = axis_name
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._set(Spread(no_count(), no_sum(), no_sum()))

    def _get(self) -> Spread:
        return Spread(
            Count(self.count, self.count_high),
            Sum(self.mean, self.mean_rest),
            Sum(self.m2, self.m2_rest),
        )

    def _set(self, state: Spread) -> None:
        self.count, self.count_high = state.number
        self.mean, self.mean_rest = state.mean
        self.m2, self.m2_rest = state.m2

    def _both(self, a: Spread, b: Spread) -> Spread:
        return spread_of_both(a, b)

    def update(self, *, mask: Any = None, **kwargs: Any) -> None:
        """Add the values of the argument `argname`; arguments and errors as for `Average.update`."""
        values = argument(self, self.argname, kwargs)
        dtype = self.mean.dtype
        values, kept = weighted(self, values, mask, dtype)
        count = counted(no_count(), self._over_lanes(how_many(values, kept)))
        divisor = jnp.maximum(count.as_float(dtype), 1)
        # Measure values from a nearby number, so that values far from zero keep their digits.
        start = jnp.where(
            self._get().number.as_float(dtype) > 0, self.mean, self._any(values, kept)
        )
        values = values - start
        mean = self._over_lanes(sum_of(values, kept)) / divisor
        m2 = self._over_lanes(sum_of((values - mean) ** 2, kept))
        none = jnp.zeros((), dtype)
        batch = Spread(count, added(Sum(start, none), mean), Sum(m2, none))
        self._set(spread_of_both(self._get(), batch))

    def _any(self, values: jax.Array, kept: Any) -> jax.Array:
        """One of the values, the same in all lanes; 0 if there are none."""
        if not values.size:
            return jnp.zeros((), values.dtype)
        first = jnp.argmax(jnp.ravel(jnp.ones_like(values, bool) if kept is None else kept))
        found = values.ravel()[first]
        if kept is not None:
            found = jnp.where(kept.any(), found, -jnp.inf)
        if self.axis_name is not None:
            found = jax.lax.pmax(found, self.axis_name)
        return jnp.where(jnp.isneginf(found), 0, found)

    def compute(self) -> Statistics:
        """The `Statistics`; NaN if there are no values."""
        count = self._get().number.as_float(self.mean.dtype)
        deviation = jnp.sqrt((self.m2 + self.m2_rest) / count)
        mean = jnp.where(count > 0, self.mean + self.mean_rest, jnp.nan)
        return Statistics(mean, deviation / jnp.sqrt(count), deviation)


class ConfusionMatrix(Accumulator):
    """How often each class was predicted for each label.

    Args:
      num_classes: the number of classes.
      axis_name: as for `Average`.

    Attributes: `counts` of shape `(num_classes, num_classes)`, int32. Rows are labels, columns are
    predictions.

    >>> import jax.numpy as jnp, nnx
    >>> matrix = nnx.metrics.ConfusionMatrix(2)
    >>> logits = jnp.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    >>> matrix.update(logits=logits, labels=jnp.array([1, 1, 0]))
    >>> matrix.compute().tolist()
    [[0, 1], [1, 1]]
    """

    counts: jax.Array = ref("metrics")

    def __init__(self, num_classes: int, *, axis_name: Any = None):
        self.num_classes = num_classes
        self.axis_name = axis_name
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.counts = jnp.zeros((self.num_classes, self.num_classes), jnp.int32)

    def _get(self) -> jax.Array:
        return self.counts

    def _set(self, state: jax.Array) -> None:
        self.counts = state

    def _both(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return a + b

    def update(self, *, mask: Any = None, **kwargs: Any) -> None:
        """Count one batch; arguments and errors as for `Accuracy.update` without a threshold.

        Labels outside the range of classes, such as -1 for padding, are not counted.
        """
        logits = jnp.asarray(argument(self, "logits", kwargs))
        labels = integer_labels(self, argument(self, "labels", kwargs)).astype(jnp.int32)
        predicted = largest(self, logits, labels, 1)[..., 0]
        if logits.shape[-1] != self.num_classes:
            raise ValueError(
                f"ConfusionMatrix expects logits of shape (..., {self.num_classes}), but got "
                f"{logits.shape}."
            )
        _, kept = weighted(self, labels, mask, jnp.int32)
        known = (labels >= 0) & (labels < self.num_classes)
        known = known if kept is None else known & kept
        cell = jnp.where(known, labels * self.num_classes + predicted, self.num_classes**2)
        counts = jnp.zeros(self.num_classes**2, jnp.int32).at[cell.ravel()].add(1, mode="drop")
        self.counts = self.counts + self._over_lanes(counts).reshape(self.counts.shape)

    def compute(self) -> jax.Array:
        """The counts so far."""
        return self.counts


class MultiMetric(Metric):
    """Several metrics that one call updates.

    Args:
      **metrics: metrics by name. Each becomes an attribute of that name.

    Raises:
      TypeError: one of them is not a Metric.
      ValueError: a name is already taken by a method, such as `update`.

    >>> import jax.numpy as jnp, nnx
    >>> metrics = nnx.MultiMetric(
    ...     accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss")
    ... )
    >>> logits = jnp.array([[1.0, 2.0], [3.0, 0.0]])
    >>> metrics.update(logits=logits, labels=jnp.array([1, 1]), loss=jnp.array(0.25))
    >>> {name: float(value) for name, value in metrics.compute().items()}
    {'accuracy': 0.5, 'loss': 0.25}
    """

    def __init__(self, **metrics: Metric):
        for name, metric in metrics.items():
            if not isinstance(metric, Metric):
                raise TypeError(
                    f"MultiMetric takes metrics, but {name!r} is {a_kind(type(metric))}. Give "
                    "its class the base nnx.metrics.Metric."
                )
            if hasattr(type(self), name):
                raise ValueError(
                    f"MultiMetric already has a method {name!r}. Choose another name for the "
                    "metric."
                )
            setattr(self, name, metric)

    def _metrics(self) -> dict[str, Metric]:
        return {name: m for name, m in attributes(self).items() if isinstance(m, Metric)}

    def reset(self) -> None:
        """Reset every metric."""
        for metric in self._metrics().values():
            metric.reset()

    def update(self, **updates: Any) -> None:
        """Update every metric. Each gets all the keyword arguments."""
        for metric in self._metrics().values():
            metric.update(**updates)

    def merge(self, *others: Any) -> None:
        """Merge every metric with those of the same name in the others.

        Raises:
          TypeError: one of them is not a MultiMetric.
          ValueError: one of them has metrics of other names.
        """
        own = self._metrics()
        for other in others:
            if not isinstance(other, MultiMetric):
                raise TypeError(
                    f"A MultiMetric merges only other MultiMetrics, but got {a_kind(type(other))}."
                )
            if other._metrics().keys() != own.keys():
                raise ValueError(
                    f"A MultiMetric of {', '.join(own)} cannot be merged with one of "
                    f"{', '.join(other._metrics())}. Give both the same names."
                )
        for name, metric in own.items():
            metric.merge(*(other._metrics()[name] for other in others))

    def compute(self) -> dict[str, Any]:
        """The metrics by name."""
        return {name: metric.compute() for name, metric in self._metrics().items()}
