"""The parts of probes: marks of modules, and records of outputs, as pytrees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnx.probe.functions import Function
from refx import RefError
from refx.node import is_identity
from refx.partition import Path, dotted
from refx.static import Static
from refx.text import array_text

__all__ = ["ProbeError"]


class ProbeError(RefError):
    """The output of a module cannot be seen or changed where it is computed, or there is no output."""


class Hook(NamedTuple):
    """What to do with the output of a method: first patch it, then record it.

    `patches` are pairs: the number of a patch, and the numbers of the layer in its stacks.
    """

    patches: tuple[tuple[int, tuple[int, ...]], ...] = ()
    recorded: bool = False


class Mark(NamedTuple):
    """The mark of a module for one probe. A module carries a tuple of marks, outer probes first.

    `axes` counts the axes of its first Ref. It shows whether a loop has taken a slice of the module.
    """

    level: int
    path: Path
    axes: int | None
    hooks: tuple[tuple[str, Hook], ...]


class Record:
    """One output: a pytree. `stacks` are its axes that come from loops over slices of the module."""

    __slots__ = ("label", "path", "stacks", "value")

    def __init__(self, path: Path, label: str, stacks: tuple[int, ...], value: Any):
        self.path = path
        self.label = label
        self.stacks = stacks
        self.value = value

    @property
    def key(self) -> tuple[Path, str, tuple[int, ...]]:
        return self.path, self.label, self.stacks

    def of(self, value: Any) -> Record:
        """The same record with another value."""
        return Record(self.path, self.label, self.stacks, value)


class Group:
    """The records of one body, in order: Records, and Groups for the transformations inside it.

    `kind` says what the transformation does: `"loop"` stacks, and `"while"` keeps one step, with
    the number `step`.
    """

    __slots__ = ("items", "kind", "step")

    def __init__(self, items: list[Any], kind: str = "call", step: Any = None):
        self.items = items
        self.kind = kind
        self.step = step

    def of(self, kind: str, step: Any = None) -> Group:
        return Group(self.items, kind, step)

    def records(self) -> Iterator[Record]:
        """All Records, in order."""
        for item in self.items:
            if isinstance(item, Group):
                yield from item.records()
            else:
                yield item


class Constant:
    """An output that is not an array, as a pytree without leaves."""

    __slots__ = ("static",)

    def __init__(self, static: Static):
        self.static = static


jax.tree_util.register_pytree_node(
    Record, lambda r: ((r.value,), r.key), lambda key, value: Record(*key, value=value[0])
)
jax.tree_util.register_pytree_node(
    Group,
    # Use a tuple, because the structure of a tree numbers lists and fills them later.
    lambda g: ((tuple(g.items), g.step), g.kind),
    lambda kind, parts: Group(list(parts[0]), kind, parts[1]),
)
jax.tree_util.register_pytree_node(
    Constant, lambda c: ((), c.static), lambda static, _: Constant(static)
)


class Probe(NamedTuple):
    """The static part of a probe, which distinguishes programs.

    Args:
      patches: functions of an output, by number.
      collection: says which values of `nnx.sow` are recorded.
      adds: whether an input is added to each recorded output.
      counts: whether to record how many values of an output are not finite, instead of the output.
      quiet: whether to leave out outputs that cannot be recorded. Otherwise they are an error.
    """

    patches: tuple[Function, ...] = ()
    collection: Any = None
    adds: bool = False
    counts: bool = False
    quiet: bool = False


def counts(given: Any, out: Any) -> Any:
    """How many values are nan and how many are infinite, in the input and the output of a call."""
    return count(given), count(out)


def count(tree: Any) -> jax.Array:
    """The numbers of nan values and of infinite values in a pytree."""
    total = jnp.zeros(2, jnp.int32)
    for x in jax.tree.leaves(tree):
        if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact):
            total += jnp.stack([jnp.isnan(x).sum(), jnp.isinf(x).sum()]).astype(jnp.int32)
    return total


def output_of(path: Path, label: str = "") -> str:
    """The name of an output in messages."""
    path = (*path, label) if label and label != "sow" else path
    return f"The output of {dotted(path)!r}" if path else "The output of the model"


def plain(out: Any) -> Any:
    """An output in a form that can leave a transformation. Anything but arrays becomes structure."""

    def wrapped(x: Any) -> Any:
        if is_identity(x) or hasattr(x, "dtype") or isinstance(x, int | float | complex):
            return x
        return Constant(Static(x))

    return jax.tree.map(wrapped, out, is_leaf=is_identity)


def unwrapped(value: Any) -> Any:
    """The inverse of `portable`, for the user."""
    return jax.tree.map(
        lambda x: x.static.value if isinstance(x, Constant) else x,
        value,
        is_leaf=lambda x: isinstance(x, Constant) or is_identity(x),
    )


def is_float(x: Any) -> bool:
    """Whether a leaf has a gradient."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)


def added(out: Any, given: Any) -> Any:
    """An output plus an input, leaf by leaf, where it has floating-point numbers."""
    if given is None:
        return out
    leaves, treedef = jax.tree.flatten(out, is_leaf=is_identity)
    todo = iter(jax.tree.leaves(given))
    return jax.tree.unflatten(treedef, [x + next(todo) if is_float(x) else x for x in leaves])


def shapes(tree: Any) -> Any:
    """The structure, shapes and dtypes, for comparison."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(x.shape, x.dtype) for x in leaves]


def text(tree: Any) -> str:
    """Shapes and dtypes for a message."""
    return ", ".join(map(array_text, jax.tree.leaves(tree)))


def blank(like: Any) -> Any:
    """The stand-in for an output that was not computed: nan, 0 or False."""
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), like.shape)
    fill: Any = np.nan if jnp.issubdtype(like.dtype, jnp.inexact) else 0
    return jnp.full(like.shape, fill, like.dtype)
