"""`nnx.shard_map`: a function of one shard, run on every device of a mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from nnx._ambient import ambient
from nnx.transforms.axes import AxisError, GroupedOutput, assign
from nnx.transforms.boundary import close_call, until_lifted
from nnx.transforms.call import Roots, open_call
from nnx.transforms.callables import function_name, unbound
from nnx.transforms.result import Packed
from refx.partition import dotted

__all__ = ["shard_map"]


def shard_map(
    fn: Callable[..., Any] | None = None,
    *,
    in_specs: Any,
    out_specs: Any,
    mesh: Any = None,
    **options: Any,
) -> Callable[..., Any]:
    """Run a function on the shards of its arguments; Refs are sharded as their specs say.

    A Ref with a spec is a shard inside, and what is written to it is a shard again. Closed-over
    Refs and the streams of the ambient scope are whole on every device, so what is written to them
    must be the same on every device: averaged with `jax.lax.pmean`, by `nnx.BatchNorm` with
    `axis_name`. With `check_vma=False` nobody checks that, and the value of one device is kept.

    Args:
      fn: the function, a module, or a bound method of one.
      in_specs: a `PartitionSpec`, or a tuple with one for each argument, or a pytree prefix of
        that; for a module or a Ref it may be a dict from filter to spec.
      out_specs: the same for the output.
      mesh: the mesh; the ambient one without it.
      **options: as for `jax.shard_map`.

    Raises:
      AxisError: specs that do not fit the arguments; one Ref with two specs; a write that differs
        between the devices of a Ref that is whole.

    >>> import jax, jax.numpy as jnp, nnx
    >>> from jax.sharding import PartitionSpec as P
    >>> auto = (jax.sharding.AxisType.Auto,)
    >>> mesh = jax.make_mesh((1,), ("x",), axis_types=auto)
    >>> total = nnx.Ref(jnp.array(0.0))
    >>> @nnx.shard_map(mesh=mesh, in_specs=(P(), P("x")), out_specs=P())
    ... def add(total, x):
    ...     total.value += jax.lax.psum(x.sum(), "x")
    >>> add(total, jnp.arange(4.0))
    >>> float(total.value)
    6.0
    """
    if fn is None:
        return functools.partial(
            shard_map, in_specs=in_specs, out_specs=out_specs, mesh=mesh, **options
        )
    inner, bound = unbound(fn)
    name = f"nnx.shard_map({function_name(fn)})"
    given = {} if mesh is None else {"mesh": mesh}

    @functools.wraps(inner)
    def sharded(*args: Any, **kwargs: Any) -> Any:
        specs = in_specs
        if bound:
            each = specs if isinstance(specs, list) or type(specs) is tuple else [specs] * len(args)
            specs = (PartitionSpec(), *each)
        if ambient.probe is not None:
            more = given | options
            return ambient.probe.shard_map(inner, bound + args, kwargs, specs, out_specs, more)

        def attempt(roots: Roots) -> Any:
            call = open_call(bound + args, kwargs, roots)
            where = assign(
                call,
                bound + args,
                kwargs,
                specs,
                name=name,
                keyword=PartitionSpec(),
                ambient=lambda path, ref: PartitionSpec(),
            )
            output = GroupedOutput(name, call, where, out_specs, PartitionSpec(), PartitionSpec)
            differing: dict[str, set[Any]] = {}

            def check(packed: Packed, groups: tuple[list[Any], ...]) -> None:
                paths = call.layout.dagdef.ref_paths
                for i, value in zip(packed.spec.written, packed.written, strict=True):
                    if axes := _varying(value) - _axes(where.values.refs[i]):
                        differing[dotted(paths[i][1:]) or "a Ref"] = axes

            try:
                results = jax.shard_map(
                    output.pure(inner, check),
                    in_specs=(where.values,),
                    out_specs=output.keys,
                    **given,
                    **options,
                )(call.values)
            except ValueError:
                # JAX refuses too, but speaks of functions and outputs that are not the user's.
                if differing:
                    raise _differs(name, differing) from None
                raise
            return close_call(call, output.packed(results))

        return until_lifted(attempt)

    return sharded


def _varying(value: Any) -> set[Any]:
    """The axes of the mesh along which a value differs, or may; none without `check_vma`."""
    kinds = [getattr(jax.typeof(x), "manual_axis_type", None) for x in jax.tree.leaves(value)]
    return {axis for kind in kinds if kind is not None for axis in kind.varying}


def _axes(spec: PartitionSpec) -> set[Any]:
    return {x for part in spec for x in (part if isinstance(part, tuple) else (part,))}


def _differs(name: str, differing: dict[str, set[Any]]) -> AxisError:
    axes = sorted(set[Any]().union(*differing.values()))
    axis = axes[0] if len(axes) == 1 else tuple(axes)
    return AxisError(
        f"{name} writes to {', '.join(map(repr, differing))} what differs between the shards along "
        f"{axis!r}, but such a Ref has one value on all of them. Average over the axis first, by "
        f"jax.lax.pmean(value, {axis!r}), which BatchNorm does over the axes in its axis_name. Or, if "
        f"each device is to keep a part of the Ref, give it a spec with the axis: in_specs takes a "
        f"dict from filter to spec."
    )
