"""Leaves of a filtered transformation: tests of their kind, and what `filter_tree` says about each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refx import FilterError

__all__ = ["is_array", "is_inexact_array"]


def is_array(x: Any) -> bool:
    """Whether `x` is a JAX or a NumPy array.

    >>> import jax.numpy as jnp, nnx
    >>> nnx.is_array(jnp.ones(2)), nnx.is_array(1.0)
    (True, False)
    """
    return isinstance(x, jax.Array | np.ndarray)


def is_inexact_array(x: Any) -> bool:
    """Whether `x` is an array of floating-point or complex numbers.

    >>> import jax.numpy as jnp, nnx
    >>> nnx.is_inexact_array(jnp.ones(2)), nnx.is_inexact_array(jnp.arange(2))
    (True, False)
    """
    return is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact)


def example(leaf: Any) -> Any:
    """The leaf to pass to `filter_fn`. For a ShapeDtypeStruct it is an array of that shape and dtype."""
    if not isinstance(leaf, jax.ShapeDtypeStruct) or not isinstance(leaf.dtype, np.dtype):
        return leaf
    shape = [n if isinstance(n, int) else 1 for n in leaf.shape]
    return np.broadcast_to(np.zeros((), leaf.dtype), shape)


def spread(spec: Any, value: Any) -> Iterator[tuple[Any, Any]]:
    """Pair each leaf of a value with its spec: one spec for all leaves, or a tree with one for each."""
    leaves, treedef = jax.tree.flatten(value)
    parts, like = jax.tree.flatten(spec)
    return zip(parts if like == treedef else [spec] * len(leaves), leaves, strict=True)


def says(spec: Any, leaf: Any, name: str) -> bool:
    """Apply an entry of a filter_tree to a leaf."""
    if callable(spec) and not isinstance(spec, type):
        spec = spec(leaf)
    if spec is None or isinstance(spec, bool | np.bool_ | int):
        return bool(spec)
    if is_array(spec) and spec.shape == () and spec.dtype == bool:
        return bool(spec)
    raise FilterError(
        f"The filter_tree of {name} must have bools, or functions from leaf to bool, not "
        f"{type(spec).__name__}: {spec!r:.60}."
    )
