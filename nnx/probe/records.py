"""What probes are made of: the marks of modules, and records of outputs, as pytrees."""

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
    """A module's output cannot be seen or changed where it is computed, or there is none."""


class Hook(NamedTuple):
    """What happens to the output of one method: it is patched, and then recorded.

    `patches` are pairs of a number of a patch and the numbers of the layer in its stacks.
    """

    patches: tuple[tuple[int, tuple[int, ...]], ...] = ()
    recorded: bool = False


class Mark(NamedTuple):
    """What a module is to one probe: the mark of a module is a tuple of these, outer ones first.

    `axes` counts the axes of its first Ref, to tell when a loop has taken a slice of it.
    """

    level: int
    path: Path
    axes: int | None
    hooks: tuple[tuple[str, Hook], ...]


class Record:
    """One output: a pytree. `stacks` are the axes that belong to loops over slices of the module."""

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
        """The same with another value."""
        return Record(self.path, self.label, self.stacks, value)


class Group:
    """What was recorded in one body, in order: Records, and Groups of transformations in it.

    `kind` is what the transformation does: `"loop"` stacks, `"while"` keeps one step, whose number
    is `step`.
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
    # As a tuple, since the structure of a tree numbers lists and fills them late.
    lambda g: ((tuple(g.items), g.step), g.kind),
    lambda kind, parts: Group(list(parts[0]), kind, parts[1]),
)
jax.tree_util.register_pytree_node(
    Constant, lambda c: ((), c.static), lambda static, _: Constant(static)
)


class Probe(NamedTuple):
    """The static part of a probe: what makes two programs differ.

    Args:
      patches: functions of an output, by number.
      collection: which values of `nnx.sow` are recorded.
      adds: whether an input is added to each output that is recorded.
      counts: whether it is recorded how many values of an output are not finite, and not the output.
      quiet: whether what cannot come out is left out; otherwise it is an error.
    """

    patches: tuple[Function, ...] = ()
    collection: Any = None
    adds: bool = False
    counts: bool = False
    quiet: bool = False


def counts(given: Any, out: Any) -> Any:
    """How many values of the input and of the output of a call are nan, and how many infinite."""
    return count(given), count(out)


def count(tree: Any) -> jax.Array:
    """The numbers of nan and of infinite values in a pytree."""
    total = jnp.zeros(2, jnp.int32)
    for x in jax.tree.leaves(tree):
        if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact):
            total += jnp.stack([jnp.isnan(x).sum(), jnp.isinf(x).sum()]).astype(jnp.int32)
    return total


def output_of(path: Path, label: str = "") -> str:
    """How a message calls an output."""
    path = (*path, label) if label and label != "sow" else path
    return f"The output of {dotted(path)!r}" if path else "The output of the model"


def plain(out: Any) -> Any:
    """An output that may leave a transformation: what is not an array is part of the structure."""

    def wrapped(x: Any) -> Any:
        if is_identity(x) or hasattr(x, "dtype") or isinstance(x, int | float | complex):
            return x
        return Constant(Static(x))

    return jax.tree.map(wrapped, out, is_leaf=is_identity)


def unwrapped(value: Any) -> Any:
    """The inverse, for the user."""
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
    """Structure, shapes and dtypes, to compare."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(x.shape, x.dtype) for x in leaves]


def text(tree: Any) -> str:
    """Shapes and dtypes for a message."""
    return ", ".join(map(array_text, jax.tree.leaves(tree)))


def blank(like: Any) -> Any:
    """What stands for an output that was not computed: nan, 0 or False."""
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), like.shape)
    fill: Any = np.nan if jnp.issubdtype(like.dtype, jnp.inexact) else 0
    return jnp.full(like.shape, fill, like.dtype)
