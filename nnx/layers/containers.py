"""Modules that consist of modules."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import refx
from nnx.layers._alike import difference
from nnx.layers._sharding import gathered, spec_of
from nnx.module import Module
from nnx.sharding.rules import ShardingError
from nnx.sharding.structure import check_entry, stacked, without_axes
from nnx.transforms import remat as nnx_remat
from nnx.transforms import scan, vmap
from refx.text import a_kind

__all__ = ["Identity", "Sequential", "Stack"]


class Identity(Module):
    """Returns its input unchanged: a placeholder for a layer.

    Args:
      *args, **kwargs: ignored, so that it can replace any other layer.

    >>> import nnx
    >>> nnx.Identity()(3)
    3
    """

    def __init__(self, *args: Any, **kwargs: Any):
        del args, kwargs

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return `x`; other arguments are ignored."""
        del args, kwargs
        return x


def _number(key: Any) -> int | None:
    """The position that a key in brackets stands for; None for a filter."""
    if isinstance(key, bool):
        return None
    try:
        return operator.index(key)
    except TypeError:
        return None


def _checked(layer: Module, number: int, length: int) -> int:
    if not -length <= number < length:
        raise IndexError(
            f"{type(layer).__name__} has {length} layers, so there is no layer {number}."
        )
    return number % length


class Sequential(Module):
    """Calls functions and modules in order, each with the result of the previous one.

    If one returns a tuple, the next gets it as positional arguments; if it returns a dict, as keyword
    arguments. A Sequential supports `len`, indices, slices and iteration like a list. A slice is a
    Sequential with the same layers.

    Args:
      *fns: callables: modules, activations, or any other functions. The attribute `layers` holds them
        in a plain list, which you may change.

    >>> import jax, jax.numpy as jnp, nnx
    >>> with nnx.scope(jax.random.key(0)):
    ...     mlp = nnx.Sequential(nnx.Linear(2, 8), nnx.relu, nnx.Linear(8, 1))
    >>> mlp(jnp.ones((5, 2))).shape
    (5, 1)
    >>> len(mlp), mlp[:-1](jnp.ones((5, 2))).shape, mlp[-1] is mlp.layers[2]
    (3, (5, 8), True)
    """

    def __init__(self, *fns: Callable[..., Any]):
        for i, fn in enumerate(fns):
            if not callable(fn):
                raise TypeError(
                    f"Sequential takes callables, but number {i} is {a_kind(type(fn))}. "
                    f"To pass a list of layers, unpack it: Sequential(*layers)."
                )
            if inspect.isclass(fn):
                raise TypeError(
                    f"Sequential takes instances, but number {i} is the class {fn.__name__}. Call "
                    f"the class: {fn.__name__}(...)."
                )
        self.layers = list(fns)

    def __len__(self) -> int:
        return len(self.layers)

    def __bool__(self) -> bool:
        # Without this, a Sequential without layers would be false, as in `module or default`.
        return True

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return iter(self.layers)

    def __getitem__(self, key: Any) -> Any:
        """The layer at an index, or a Sequential for a slice; other keys work as for any module."""
        if isinstance(key, slice):
            return Sequential(*self.layers[key])
        number = _number(key)
        if number is None:
            return super().__getitem__(key)
        return self.layers[_checked(self, number, len(self.layers))]

    def __setitem__(self, key: Any, value: Any) -> None:
        """Replace the layer at an index. Other keys work as for any module."""
        number = _number(key)
        if number is None:
            super().__setitem__(key, value)
        else:
            number = _checked(self, number, len(self.layers))
            self.layers[number] = Sequential(value).layers[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layers in order. Without layers, return the single argument."""
        if not self.layers:
            return args[0] if len(args) == 1 and not kwargs else args
        out: Any = self.layers[0](*args, **kwargs)
        for layer in self.layers[1:]:
            if isinstance(out, tuple):
                out = layer(*out)
            elif isinstance(out, dict):
                out = layer(**out)
            else:
                out = layer(out)
        return out


class Stack(Module):
    """A sequence of layers with the same structure, compiled in the time of one layer.

    The parameters of the layers are stacked along a leading axis, and the layers run in `nnx.scan`.
    Each layer has its own initial values, and gets the output of the previous one.

    A list of layers and a Stack are two forms of the same thing. `Stack.of(layers)` and
    `stack.unstack()` convert between them. `nnx.load_state` and `nnx.bridge` read weights of either form
    (`blocks.3.kernel`, or `blocks.kernel` with a leading axis) into either. `stack[i]` is layer `i` with
    its own Refs, which hold copies. After changing it, write it back with `stack[i] = layer`.
    `stack[i:j]` is a Stack of copies, and iteration yields the layers as `stack[i]` does.

    Args:
      make: makes one layer, such as a module class or a function; called without arguments.
      length: number of layers.
      remat: compute the intermediate values of a layer again in the backward pass, instead of storing them.
      policy: which values to store anyway, as for `jax.checkpoint`.
      unroll: as for `jax.lax.scan`.
      partition_name: the entry of the leading axis in the `sharding` metadata of the Refs, such as
        "layers" or a mesh axis. Inside a layer, and for `stack[i]`, that entry is removed.

    Attributes: `layers`, a module like those from `make`, whose Refs have a leading axis.

    Raises:
      CarryError: the output of a layer does not have the shape and dtype of its input.
      ShardingError: the output of a layer is sharded along other Explicit axes than its input; or the
        `sharding` of a Ref has the wrong number of dimensions for its value.

    >>> import jax, jax.numpy as jnp, nnx
    >>> stack = nnx.Stack.init(jax.random.key(0))(lambda: nnx.Linear(4, 4), 8)
    >>> stack.layers.kernel.shape, stack(jnp.ones((2, 4))).shape
    ((8, 4, 4), (2, 4))
    >>> len(stack), stack[-1].kernel.shape, len(stack[2:5])
    (8, (4, 4), 3)
    """

    def __init__(
        self,
        make: Callable[[], Module],
        length: int,
        *,
        remat: bool = False,
        policy: Callable[..., bool] | None = None,
        unroll: int = 1,
        partition_name: str | tuple[str, ...] | None = None,
    ):
        if length < 1:
            raise ValueError(f"Stack needs at least one layer, but its length is {length}.")
        mapped = vmap(lambda: make(), axis_size=length, partition_name=partition_name)
        self._set(mapped(), length, remat, policy, unroll)

    def _set(self, layers: Any, length: int, remat: bool, policy: Any, unroll: int) -> None:
        self.layers = layers
        self.length = length
        self.remat = remat
        self.policy = policy
        self.unroll = unroll

    @classmethod
    def of(
        cls,
        layers: Sequence[Module],
        *,
        remat: bool = False,
        policy: Callable[..., bool] | None = None,
        unroll: int = 1,
        partition_name: str | tuple[str, ...] | None = None,
    ) -> Stack:
        """A Stack made from a list of layers, with copies of their values.

        Args:
          layers: at least one; all must have the same structure, settings, shapes and dtypes.
          remat, policy, unroll, partition_name: as for `Stack`.

        Raises:
          ValueError: the layers differ, or share a Ref; the message says where.

        >>> import jax.numpy as jnp, nnx
        >>> with nnx.scope(0):
        ...     layers = [nnx.Linear(4, 4) for _ in range(3)]
        >>> stack = nnx.Stack.of(layers)
        >>> bool((stack.layers.kernel[1] == layers[1].kernel).all())
        True
        """
        layers = list(layers)
        if not layers:
            raise ValueError("Stack.of needs at least one layer, but the list is empty.")
        stack = cls.__new__(cls)
        stack._set(_join(layers, partition_name), len(layers), remat, policy, unroll)
        return stack

    def unstack(self) -> list[Any]:
        """The layers as a list, each with its own Refs: the inverse of `Stack.of`.

        >>> import nnx
        >>> layers = nnx.Stack.init(0)(lambda: nnx.Linear(4, 4), 3).unstack()
        >>> len(layers), layers[0].kernel.shape
        (3, (4, 4))
        """
        return [self[i] for i in range(self.length)]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (self[i] for i in range(self.length))

    def __getitem__(self, key: Any) -> Any:
        """A copy of layer `i`, or a Stack of copies for a slice; other keys work as for any module."""
        if isinstance(key, slice):
            numbers = range(self.length)[key]
            if not numbers:
                raise IndexError(
                    f"The slice selects none of the {self.length} layers, but a Stack needs at least one."
                )
            stack = type(self).__new__(type(self))
            layers = self._part(np.array(numbers))
            stack._set(layers, len(numbers), self.remat, self.policy, self.unroll)
            return stack
        number = _number(key)
        if number is None:
            return super().__getitem__(key)
        return self._part(_checked(self, number, self.length))

    def _part(self, key: Any) -> Any:
        dagdef, values = refx.split(self.layers)
        if not np.ndim(key):
            count = len(dagdef.ref_paths)
            dagdef = without_axes("Stack", dagdef, list(values.values())[:count], [0] * count)
        return refx.merge(dagdef, jax.tree.map(lambda x: _take(x, key), values))

    def __setitem__(self, key: Any, value: Any) -> None:
        """Write the values of a layer into layer `i`; other keys work as for any module.

        Raises:
          ValueError: the structure, shapes or dtypes differ from those of the layers in the Stack.
        """
        number = _number(key)
        if number is None:
            super().__setitem__(key, value)
            return
        number = _checked(self, number, self.length)
        _check_alike([self[number], value], [f"layer {number} of the Stack", "the new layer"])
        dagdef, values = refx.split(self.layers)
        new = refx.split(value)[1]
        joined = jax.tree.map(lambda x, y: jnp.asarray(x).at[number].set(y), values, new)
        if dagdef.leaf_paths:
            self.layers = refx.merge(dagdef, joined)
        else:
            refx.update(self.layers, joined)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the layers in order, each as `layer(x, *args, **kwargs)`."""

        def call(layer: Any, x: Any) -> Any:
            return layer(x, *args, **kwargs)

        body = nnx_remat(call, policy=self.policy) if self.remat else call

        def step(x: Any, layer: Any) -> tuple[Any, None]:
            y = body(layer, x)
            _check_placed(x, y)
            return y, None

        return scan(step, x, self.layers, unroll=self.unroll)[0]


def _take(x: Any, key: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        lead = np.shape(key)
        return jax.ShapeDtypeStruct(lead + x.shape[1:], x.dtype)
    # The layers may be on different devices.
    return (gathered(x, [0]) if isinstance(x, jax.Array) else x)[key]


def _check_placed(x: Any, y: Any) -> None:
    """Raise if a layer's output is sharded along other Explicit axes than its input."""
    if jax.tree.structure(x) != jax.tree.structure(y):
        return
    for old, new in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        if np.shape(old) == np.shape(new) and spec_of(old) != spec_of(new):
            spec = PartitionSpec(*spec_of(old))
            raise ShardingError(
                f"A layer of Stack gets an input {jax.typeof(old)} and returns {jax.typeof(new)}. All "
                f"layers run as one program, so each output must be sharded along the same Explicit "
                f"axes as the input. Inside it, call the last layer with out_sharding={spec}, or use "
                f"jax.sharding.reshard(x, {spec})."
            )


def _join(layers: list[Module], entry: Any) -> Any:
    """One module, with the values of all layers stacked along a leading axis."""
    _check_alike(layers, [f"layer {i}" for i in range(len(layers))])
    seen: dict[Any, tuple[int, str]] = {}
    for i, layer in enumerate(layers):
        for path, ref in refx.refs(layer).items():
            if ref in seen:
                j, first = seen[ref]
                raise ValueError(
                    f"Layers {j} and {i} share the Ref {first!r}, but a Stack would give each a copy "
                    f"of it. Give each its own (nnx.clone(layer)), or keep them in a list."
                )
            seen[ref] = (i, ".".join(path))
    dagdef, first = refx.split(layers[0])
    rest = [refx.split(layer)[1] for layer in layers[1:]]
    entry = check_entry("Stack.of", entry)
    dagdef = stacked("Stack.of", dagdef, list(first.values())[: len(dagdef.ref_paths)], entry)
    return refx.merge(dagdef, jax.tree.map(_stack, first, *rest))


def _stack(*values: Any) -> Any:
    if all(isinstance(x, jax.ShapeDtypeStruct) for x in values):
        return jax.ShapeDtypeStruct((len(values), *values[0].shape), values[0].dtype)
    return jnp.stack(values)


def _check_alike(layers: list[Any], names: list[str]) -> None:
    for layer, name in zip(layers, names, strict=True):
        if not isinstance(layer, Module):
            raise TypeError(f"A Stack takes modules, but {name} is {a_kind(type(layer))}.")
    for layer, name in zip(layers[1:], names[1:], strict=True):
        found = difference(layers[0], layer, names[0], name)
        if found:
            raise ValueError(
                f"The layers of a Stack must be alike, but {found}. Keep layers that differ in a list "
                f"or an nnx.Sequential."
            )
