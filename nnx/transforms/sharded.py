"""`nnx.shard_map`: run a function of one shard on every device of a mesh."""

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

    Inside the function, a Ref with a spec holds a shard, and its writes are shards again. Closed-over
    Refs and the streams of the ambient scope are whole on every device. Their writes must be the same
    on every device: average them with `jax.lax.pmean`, or give `nnx.BatchNorm` an `axis_name`. With
    `check_vma=False` this is not checked, and one device's value is kept.

    Args:
      fn: the function, a module, or a bound method of a module.
      in_specs: a `PartitionSpec`, or a tuple with one for each argument, or a pytree prefix of
        that; for a module or a Ref it may be a dict from filter to spec.
      out_specs: the same for the output.
      mesh: the mesh. The default is the ambient one.
      **options: as for `jax.shard_map`.

    Raises:
      AxisError: the specs do not fit the arguments, one Ref has two specs, or the devices write
        different values to a Ref that is whole.

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
                # JAX refuses too, but its message names functions and outputs that are not the user's.
                if differing:
                    raise _differs(name, differing) from None
                raise
            return close_call(call, output.packed(results))

        return until_lifted(attempt)

    return sharded


def _varying(value: Any) -> set[Any]:
    """The mesh axes along which a value may differ. Empty without `check_vma`."""
    kinds = [getattr(jax.typeof(x), "manual_axis_type", None) for x in jax.tree.leaves(value)]
    return {axis for kind in kinds if kind is not None for axis in kind.varying}


def _axes(spec: PartitionSpec) -> set[Any]:
    return {x for part in spec for x in (part if isinstance(part, tuple) else (part,))}


def _differs(name: str, differing: dict[str, set[Any]]) -> AxisError:
    axes = sorted(set[Any]().union(*differing.values()))
    axis = axes[0] if len(axes) == 1 else tuple(axes)
    return AxisError(
        f"{name} writes values to {', '.join(map(repr, differing))} that differ between the shards "
        f"along {axis!r}, but such a Ref has one value on all of them. Average over the axis first, with "
        f"jax.lax.pmean(value, {axis!r}), or with the axis_name of BatchNorm. If each device should keep "
        f"a part of the Ref, give it a spec with the axis: in_specs takes a dict from filter to spec."
    )
