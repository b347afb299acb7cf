"""`nnx.vmap`: map a function over an axis of its arguments and of their Refs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax

from nnx._ambient import ambient
from nnx.scope import Scope, entered
from nnx.sharding.structure import check_entry
from nnx.transforms.added_axis import of_slices, with_axes
from nnx.transforms.axes import AxisError, GroupedOutput, Specs, assign, length
from nnx.transforms.boundary import close_call, until_lifted
from nnx.transforms.call import Call, Roots, open_call
from nnx.transforms.callables import function_name, unbound
from nnx.transforms.result import Packed
from refx.partition import Path
from refx.text import array_text
from refx.trace import is_batched

__all__ = ["vmap"]


P = ParamSpec("P")
R = TypeVar("R")


def vmap(
    fn: Callable[P, R],
    in_axes: Any = 0,
    out_axes: Any = 0,
    *,
    axis_name: Hashable | None = None,
    axis_size: int | None = None,
    spmd_axis_name: Any = None,
    partition_name: str | tuple[str, ...] | None = None,
) -> Callable[P, R]:
    """Map a function over an axis of its arguments; Refs are mapped as their axes say.

    A Ref with an axis has one slice in each lane, and its writes are stacked again. A Ref with the axis
    None, or one that the function closes over, is the same in every lane: its writes must be the same
    in every lane too. Each stream of the ambient scope draws one key and splits it into a key for each
    lane. Lane `i` draws the keys that the function alone would draw in
    `nnx.scope(jax.random.split(stream.next(), n)[i])`.

    Args:
      fn: the function, a module, or a bound method of a module.
      in_axes: an axis, or a tuple with one for each positional argument, or a pytree prefix of
        that. For a module or a Ref it may be a dict from filter to axis: `{"params": 0, ...: None}`.
        Keyword arguments are mapped over axis 0.
      out_axes: the same for the output. New modules and Refs in it may have a dict from filter.
      axis_name, axis_size, spmd_axis_name: as for `jax.vmap`.
      partition_name: the entry for the mapped axis in the `sharding` metadata of new Refs: a logical
        name, a mesh axis, or a tuple of them. The default is `spmd_axis_name`, or None. In the body,
        the `sharding` of a mapped Ref has no entry for that axis.

    Raises:
      AxisError: the axes do not fit the arguments, one Ref has two axes, the mapped axes have different
        sizes, or the lanes write different values to a Ref without an axis. The message names the Ref.
      ShardingError: the `sharding` of a mapped Ref is for another number of dimensions.

    >>> import jax, jax.numpy as jnp, nnx
    >>> class Scale(nnx.Module):
    ...     scale: jax.Array = nnx.param()
    ...     def __init__(self):
    ...         self.scale = jax.random.normal(self.make_rng("params"), (2,))
    >>> stack = nnx.vmap(lambda key: Scale.init(key)())(jax.random.split(jax.random.key(0), 3))
    >>> stack.scale.shape
    (3, 2)
    """
    inner, bound = unbound(fn)
    name = f"nnx.vmap({function_name(fn)})"
    entry = check_entry(name, spmd_axis_name if partition_name is None else partition_name)
    if bound and isinstance(in_axes, list | tuple):
        in_axes = (None, *in_axes)

    @functools.wraps(inner)
    def mapped(*args: Any, **kwargs: Any) -> Any:
        args = bound + args
        axes = in_axes
        if bound and not isinstance(axes, list | tuple):
            axes = (None, *[axes] * (len(args) - 1))
        if ambient.probe is not None:
            options = {"axis_name": axis_name, "axis_size": axis_size}
            return ambient.probe.vmap(
                inner,
                args,
                kwargs,
                axes,
                out_axes,
                spmd_axis_name=spmd_axis_name,
                partition_name=partition_name,
                **options,
            )

        def attempt(roots: Roots) -> Any:
            def opened() -> tuple[Call, Specs]:
                call = open_call(args, kwargs, roots)
                specs = assign(
                    call, args, kwargs, axes, name=name, keyword=0, ambient=_ambient_axis
                )
                return call, specs

            with entered(None):
                size = length(*opened(), axis_size, name, _axis)
            with _lanes(size):
                call, specs = opened()
                call.repeats = size
                sliced = of_slices(name, call, specs.values.refs)
                output = GroupedOutput(name, call, specs, out_axes, None, int, layout=sliced)

                def check(packed: Packed, groups: tuple[list[Any], ...]) -> None:
                    _check_expressible(name, call, specs, packed)
                    _check_output(name, groups[output.keys.index(None)])

                results = jax.vmap(
                    output.pure(inner, check),
                    in_axes=(specs.values,),
                    out_axes=output.keys,
                    axis_name=axis_name,  # pyright: ignore[reportArgumentType]
                    axis_size=size,
                    spmd_axis_name=spmd_axis_name,
                )(call.values)
                packed = with_axes(name, output.packed(results), output.of_new, entry)
                return close_call(call, packed)

        return until_lifted(attempt)

    return mapped


def _axis(spec: Any) -> int | None:
    return spec


def _ambient_axis(path: Path, ref: Any) -> int | None:
    # Closed-over Refs are the same in every lane, but each lane has its own streams.
    return 0 if path[:1] == ("streams",) else None


@contextlib.contextmanager
def _lanes(size: int) -> Iterator[None]:
    """Enter the ambient scope with a key for each lane. On exit, each outer stream advances by one."""
    scope: Scope | None = ambient.scope
    if scope is None:
        yield
        return
    with entered(scope.lanes(size)):
        yield
    for stream in scope.streams.values():
        stream.advance()


def _check_expressible(name: str, call: Call, specs: Specs, packed: Packed) -> None:
    for i, value in zip(packed.spec.written, packed.written, strict=True):
        if specs.values.refs[i] is None and is_batched(value):
            raise AxisError(
                f"{call.layout.name_of(i)} was written in {name} with a value that differs between "
                f"the lanes, but its axis is None, so all lanes share one value. Give it an axis, as in "
                f"in_axes=({{'batch_stats': 0, ...: None}}, 0), or reduce the value over the lanes "
                f"with jax.lax.pmean and axis_name."
            )


def _check_output(name: str, values: list[Any]) -> None:
    for value in values:
        if is_batched(value):
            raise AxisError(
                f"{name} returns a value (or a new Ref that holds one) that differs between the "
                f"lanes, but out_axes gives it the axis None: {array_text(value)}. Give it "
                f"an axis, as in out_axes=0 or out_axes={{'params': 0, ...: None}}, or reduce it."
            )
