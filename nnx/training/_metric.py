"""The base classes of metrics, and how metrics read their arguments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from nnx.module import Module
from nnx.training._totals import Count, Sum
from refx.text import a_kind

__all__: list[str] = []


class Metric(Module):
    """The base of metrics: `reset()`, `update(**kwargs)` with one batch, `compute()` of all so far.

    A metric takes the keyword arguments of `update` that it needs and ignores the others. So one
    call can update several metrics; see `MultiMetric`.

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
        """Add one batch."""
        raise NotImplementedError(f"{type(self).__name__} has no update().")

    def compute(self) -> Any:
        """Return the metric over everything since the last reset."""
        raise NotImplementedError(f"{type(self).__name__} has no compute().")

    def merge(self, *others: Any) -> None:
        """Add everything that other metrics of this kind have seen. The others stay unchanged."""
        raise NotImplementedError(f"{type(self).__name__} has no merge().")


class Accumulator(Metric):
    """The base of metrics that keep a few arrays as state. A function merges two such states."""

    axis_name: Any = None

    def _get(self) -> Any:
        raise NotImplementedError

    def _set(self, state: Any) -> None:
        raise NotImplementedError

    def _both(self, a: Any, b: Any) -> Any:
        raise NotImplementedError

    def _over_lanes(self, x: Any) -> Any:
        """The sum over the lanes of `axis_name`."""
        return x if self.axis_name is None else jax.lax.psum(x, self.axis_name)

    def merge(self, *others: Any) -> None:
        """Add everything that other metrics of this kind have seen. The others stay unchanged.

        Args:
          *others: metrics of the same class. If a state has leading axes (from `nnx.vmap`), all its
            lanes are added.

        Raises:
          TypeError: a metric has another class.
          ValueError: a metric has a state of another shape.

        >>> import jax.numpy as jnp, nnx
        >>> a, b = nnx.metrics.Average(), nnx.metrics.Average()
        >>> a.update(values=jnp.array([1.0, 2.0]))
        >>> b.update(values=6.0)
        >>> a.merge(b)
        >>> float(a.compute())
        3.0
        """
        state = self._get()
        for other in others:
            if type(other) is not type(self):
                raise TypeError(
                    f"{a_kind(type(self), start=True)} merges only metrics of its own class, but got "
                    f"{a_kind(type(other))}."
                )
            # Give every state a leading axis of lanes; an ordinary metric has one lane.
            lanes = jax.tree.map(lambda own, x: _lanes(self, own, x), state, other._get())
            state = jax.lax.scan(lambda a, b: (self._both(a, b), None), state, lanes)[0]
        self._set(state)


def argument(metric: Metric, name: str, given: dict[str, Any]) -> Any:
    if name in given:
        return given[name]
    names = ", ".join(map(repr, given)) or "nothing"
    raise TypeError(
        f"{type(metric).__name__}.update() needs the keyword argument {name!r}, but got {names}."
    )


def integer_labels(metric: Metric, labels: Any) -> jax.Array:
    labels = jnp.asarray(labels)
    if not (jnp.issubdtype(labels.dtype, jnp.integer) or labels.dtype == jnp.bool_):
        raise TypeError(
            f"{type(metric).__name__} expects integer labels, but got {labels.dtype}. Take the "
            f"argmax of one-hot labels first."
        )
    return labels


def largest(metric: Metric, logits: jax.Array, labels: jax.Array, top_k: int) -> jax.Array:
    """The indices of the largest logits, the largest first, along a new last axis."""
    if logits.ndim != labels.ndim + 1 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"{type(metric).__name__} expects logits of shape (..., classes) and labels of shape "
            f"(...), but got {logits.shape} and {labels.shape}."
        )
    if top_k == 1:
        return logits.argmax(-1, keepdims=True)
    if top_k > logits.shape[-1]:
        raise ValueError(
            f"{type(metric).__name__} has top_k={top_k}, but the logits, of shape {logits.shape}, "
            f"have only {logits.shape[-1]} classes."
        )
    return jax.lax.top_k(logits, top_k)[1]


def weighted(metric: Metric, values: Any, mask: Any, dtype: Any) -> tuple[jax.Array, Any]:
    """The values in a dtype, and a mask of those that count; None if all count."""
    values = jnp.asarray(values).astype(dtype)
    if mask is None:
        return values, None
    try:
        return values, jnp.broadcast_to(jnp.asarray(mask) != 0, values.shape)
    except ValueError:
        raise ValueError(
            f"The mask of {type(metric).__name__}.update() must broadcast to the values, of shape "
            f"{values.shape}, but has the shape {jnp.shape(mask)}."
        ) from None


def sum_of(values: jax.Array, kept: Any) -> jax.Array:
    return (values if kept is None else jnp.where(kept, values, 0)).sum()


def how_many(values: jax.Array, kept: Any) -> Any:
    return values.size if kept is None else kept.sum(dtype=jnp.int32)


def no_sum() -> Sum:
    # float64 if JAX has it enabled.
    return Sum(jnp.zeros((), float), jnp.zeros((), float))


def no_count() -> Count:
    return Count(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def _lanes(metric: Metric, own: jax.Array, x: jax.Array) -> jax.Array:
    """The state of another metric, with exactly one leading axis."""
    lead = x.ndim - own.ndim
    if lead < 0 or x.shape[lead:] != own.shape:
        raise ValueError(
            f"{a_kind(type(metric), start=True)} with a state of shape {own.shape} cannot be merged with one "
            f"of shape {x.shape}. Make both with the same arguments."
        )
    return x.reshape(-1, *own.shape).astype(own.dtype)
