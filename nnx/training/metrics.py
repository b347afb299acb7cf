"""Metrics that accumulate over batches, also inside of `nnx.jit` and `nnx.scan`.

The state is in Refs of the collection `"metrics"`, in float32: a total of very many values has the
relative error of float32 sums, about 1e-7 for each batch that is added. A metric without any value
is NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnx.module import Module, ref
from refx.node import attributes

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


class Metric(Module):
    """The base of metrics: `reset()`, `update(**kwargs)` with one batch, `compute()` of all so far.

    A metric takes from the keyword arguments of `update` what it needs and ignores the others, so
    that several can be updated by one call; see `MultiMetric`.

    >>> import jax, jax.numpy as jnp, nnx
    >>> class Largest(nnx.metrics.Metric):
    ...     value: jax.Array = nnx.ref("metrics")
    ...     def __init__(self):
    ...         self.reset()
    ...     def reset(self):
    ...         self.value = jnp.array(-jnp.inf)
    ...     def update(self, *, values, **_):
    ...         self.value = jnp.maximum(self.value, values.max())
    ...     def compute(self):
    ...         return self.value
    >>> largest = Largest()
    >>> largest.update(values=jnp.array([1.0, 3.0]))
    >>> float(largest.compute())
    3.0
    """

    def reset(self) -> None:
        """Forget everything."""
        raise NotImplementedError(f"{type(self).__name__} has no reset().")

    def update(self, **kwargs: Any) -> None:
        """Take one batch into account."""
        raise NotImplementedError(f"{type(self).__name__} has no update().")

    def compute(self) -> Any:
        """The metric of everything since the last reset."""
        raise NotImplementedError(f"{type(self).__name__} has no compute().")


class Average(Metric):
    """The mean of values.

    Args:
      argname: the keyword argument of `update` that has the values.

    Attributes: `total` and `count`, float32 scalars.

    >>> import jax.numpy as jnp, nnx
    >>> loss = nnx.metrics.Average("loss")
    >>> loss.update(loss=jnp.array([1.0, 2.0, 3.0]))
    >>> loss.update(loss=4.0)
    >>> float(loss.compute())
    2.5
    """

    total: jax.Array = ref("metrics")
    count: jax.Array = ref("metrics")

    def __init__(self, argname: str = "values"):
        self.argname = argname
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.total = jnp.zeros((), jnp.float32)
        self.count = jnp.zeros((), jnp.float32)

    def update(self, *, mask: Any = None, **kwargs: Any) -> None:
        """Add the values of the argument `argname`, of any shape.

        Args:
          mask: a boolean array that broadcasts to the values: which of them count.
          **kwargs: the values, under the name `argname`.

        Raises:
          TypeError: there is no argument `argname`.
          ValueError: the mask does not broadcast to the values.
        """
        values, weights = _weighted(self, _argument(self, self.argname, kwargs), mask)
        self.total = self.total + jnp.where(weights > 0, values, 0).sum()
        self.count = self.count + weights.sum()

    def compute(self) -> jax.Array:
        """The mean, a float32 scalar; NaN without values."""
        return self.total / self.count


class Perplexity(Average):
    """The exponential of the mean of negative log-likelihoods, such as cross entropies per token.

    Args:
      argname: the keyword argument of `update` that has them.

    >>> import jax.numpy as jnp, nnx
    >>> perplexity = nnx.metrics.Perplexity()
    >>> perplexity.update(values=jnp.log(jnp.array([2.0, 8.0])))
    >>> round(float(perplexity.compute()), 4)
    4.0
    """

    def compute(self) -> jax.Array:
        """The perplexity, a float32 scalar; NaN without values."""
        return jnp.exp(super().compute())


class Accuracy(Average):
    """The share of predictions that are right.

    Args:
      threshold: for binary labels: a logit above it predicts 1. Without it, the prediction is the
        index of the largest logit along the last axis.

    >>> import jax.numpy as jnp, nnx
    >>> accuracy = nnx.metrics.Accuracy()
    >>> accuracy.update(logits=jnp.array([[1.0, 2.0], [3.0, 0.0]]), labels=jnp.array([1, 1]))
    >>> float(accuracy.compute())
    0.5
    """

    def __init__(self, threshold: float | None = None):
        if threshold is not None and not isinstance(threshold, int | float):
            raise TypeError(
                f"The threshold of Accuracy is a number or None, but got a "
                f"{type(threshold).__name__}."
            )
        super().__init__()
        self.threshold = threshold

    def update(self, *, mask: Any = None, **kwargs: Any) -> None:
        """Count the predictions of one batch.

        Args:
          mask: a boolean array that broadcasts to the labels: which predictions count.
          **kwargs: `logits` of shape `(..., classes)`, or with a threshold that of the labels, and
            integer `labels` of shape `(...)`.

        Raises:
          TypeError: `logits` or `labels` are missing, or the labels are no integers.
          ValueError: the shapes do not fit.
        """
        logits = jnp.asarray(_argument(self, "logits", kwargs))
        labels = _labels(self, _argument(self, "labels", kwargs))
        if self.threshold is not None:
            if logits.shape != labels.shape:
                raise ValueError(
                    f"Accuracy with a threshold expects logits of the shape of the labels, "
                    f"{labels.shape}, but got {logits.shape}."
                )
            right = (logits > self.threshold) == (labels != 0)
        else:
            right = _predicted(self, logits, labels) == labels
        super().update(values=right, mask=mask)


class Statistics(NamedTuple):
    """What `Welford` computes.

    Attributes: `mean`; `standard_error_of_mean`; `standard_deviation`, of the population: the
    squares are divided by the number of values.
    """

    mean: jax.Array
    standard_error_of_mean: jax.Array
    standard_deviation: jax.Array


class Welford(Metric):
    """Mean and standard deviation in one stable pass.

    After Welford (1962, https://doi.org/10.1080/00401706.1962.10490022), with the formula of Chan,
    Golub and LeVeque (1983, https://doi.org/10.1080/00031305.1983.10483115) to merge batches.

    Args:
      argname: the keyword argument of `update` that has the values.

    Attributes: `count`, `mean` and `m2`, the sum of squared differences: float32 scalars.

    >>> import jax.numpy as jnp, nnx
    >>> welford = nnx.metrics.Welford()
    >>> welford.update(values=jnp.array([1.0, 2.0]))
    >>> welford.update(values=jnp.array([3.0, 4.0]))
    >>> found = welford.compute()
    >>> float(found.mean), round(float(found.standard_deviation), 4)
    (2.5, 1.118)
    """

    count: jax.Array = ref("metrics")
    mean: jax.Array = ref("metrics")
    m2: jax.Array = ref("metrics")

    def __init__(self, argname: str = "values"):
        self.argname = argname
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.count = jnp.zeros((), jnp.float32)
        self.mean = jnp.zeros((), jnp.float32)
        self.m2 = jnp.zeros((), jnp.float32)

    def update(self, *, mask: Any = None, **kwargs: Any) -> None:
        """Add the values of the argument `argname`; arguments and errors as for `Average.update`."""
        values, weights = _weighted(self, _argument(self, self.argname, kwargs), mask)
        kept = weights > 0
        count = weights.sum()
        mean = jnp.where(kept, values, 0).sum() / jnp.maximum(count, 1)
        m2 = jnp.where(kept, (values - mean) ** 2, 0).sum()
        # An empty batch changes nothing, and the first one is taken as it is.
        total = jnp.maximum(self.count + count, 1)
        delta = mean - self.mean
        self.m2 = self.m2 + m2 + delta**2 * (self.count / total) * count
        self.mean = self.mean + delta * (count / total)
        self.count = self.count + count

    def compute(self) -> Statistics:
        """The `Statistics`; NaN without values."""
        deviation = jnp.sqrt(self.m2 / self.count)
        mean = jnp.where(self.count > 0, self.mean, jnp.nan)
        return Statistics(mean, deviation / jnp.sqrt(self.count), deviation)


class ConfusionMatrix(Metric):
    """How often each class was taken for each other.

    Args:
      num_classes: number of classes.

    Attributes: `counts` of shape `(num_classes, num_classes)`, int32: rows are labels, columns
    predictions.

    >>> import jax.numpy as jnp, nnx
    >>> matrix = nnx.metrics.ConfusionMatrix(2)
    >>> logits = jnp.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    >>> matrix.update(logits=logits, labels=jnp.array([1, 1, 0]))
    >>> matrix.compute().tolist()
    [[0, 1], [1, 1]]
    """

    counts: jax.Array = ref("metrics")

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.counts = jnp.zeros((self.num_classes, self.num_classes), jnp.int32)

    def update(self, *, mask: Any = None, **kwargs: Any) -> None:
        """Count one batch; arguments and errors as for `Accuracy.update` without a threshold.

        A label that is no class, such as -1 for padding, is not counted.
        """
        logits = jnp.asarray(_argument(self, "logits", kwargs))
        labels = _labels(self, _argument(self, "labels", kwargs)).astype(jnp.int32)
        predicted = _predicted(self, logits, labels)
        if logits.shape[-1] != self.num_classes:
            raise ValueError(
                f"ConfusionMatrix expects logits of shape (..., {self.num_classes}), but got "
                f"{logits.shape}."
            )
        _, weights = _weighted(self, labels, mask)
        counted = (weights > 0) & (labels >= 0) & (labels < self.num_classes)
        cell = jnp.where(counted, labels * self.num_classes + predicted, self.num_classes**2)
        counts = self.counts.ravel().at[cell.ravel()].add(1, mode="drop")
        self.counts = counts.reshape(self.counts.shape)

    def compute(self) -> jax.Array:
        """The counts so far."""
        return self.counts


class MultiMetric(Metric):
    """Several metrics, updated by one call.

    Args:
      **metrics: metrics by name; each becomes an attribute of that name.

    Raises:
      TypeError: one of them is no Metric.
      ValueError: a name that a module has already, such as `update`.

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
                    f"MultiMetric takes metrics, but {name!r} is a {type(metric).__name__}. Make it "
                    f"a class with the base nnx.metrics.Metric."
                )
            if hasattr(type(self), name):
                raise ValueError(
                    f"MultiMetric has a method {name!r} already; choose another name for the metric."
                )
            setattr(self, name, metric)

    def _metrics(self) -> dict[str, Metric]:
        return {name: m for name, m in attributes(self).items() if isinstance(m, Metric)}

    def reset(self) -> None:
        """Reset every metric."""
        for metric in self._metrics().values():
            metric.reset()

    def update(self, **updates: Any) -> None:
        """Update every metric; each is called with all the keyword arguments."""
        for metric in self._metrics().values():
            metric.update(**updates)

    def compute(self) -> dict[str, Any]:
        """The metrics by name."""
        return {name: metric.compute() for name, metric in self._metrics().items()}


def _argument(metric: Metric, name: str, given: dict[str, Any]) -> Any:
    if name in given:
        return given[name]
    names = ", ".join(map(repr, given)) or "nothing"
    raise TypeError(
        f"{type(metric).__name__}.update() needs the keyword argument {name!r}, but got {names}."
    )


def _labels(metric: Metric, labels: Any) -> jax.Array:
    labels = jnp.asarray(labels)
    if not (jnp.issubdtype(labels.dtype, jnp.integer) or labels.dtype == jnp.bool_):
        raise TypeError(
            f"{type(metric).__name__} expects integer labels, but got {labels.dtype}. Take the "
            f"argmax of one-hot labels first."
        )
    return labels


def _predicted(metric: Metric, logits: jax.Array, labels: jax.Array) -> jax.Array:
    if logits.ndim != labels.ndim + 1 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"{type(metric).__name__} expects logits of shape (..., classes) and labels of shape "
            f"(...), but got {logits.shape} and {labels.shape}."
        )
    # Not in the dtype of the labels, which may be too small for the number of classes.
    return logits.argmax(-1)


def _weighted(metric: Metric, values: Any, mask: Any) -> tuple[jax.Array, jax.Array]:
    """Values in float32, and for each a 1 if it counts and a 0 if it does not."""
    values = jnp.asarray(values).astype(jnp.float32)
    if mask is None:
        return values, jnp.ones_like(values)
    try:
        kept = jnp.broadcast_to(jnp.asarray(mask) != 0, values.shape)
    except ValueError:
        raise ValueError(
            f"The mask of {type(metric).__name__}.update() must broadcast to the values, of shape "
            f"{values.shape}, but has the shape {jnp.shape(mask)}."
        ) from None
    return values, kept.astype(jnp.float32)
