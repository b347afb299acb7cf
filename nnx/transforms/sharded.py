"""`nnx.shard_map`: a function of one shard, run on every device of a mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from nnx.transforms.axes import Sorted, assign
from nnx.transforms.boundary import close_call, run, until_lifted
from nnx.transforms.call import Roots, open_call
from nnx.transforms.jit import function_name, unbound

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
    Refs and the streams of the ambient scope are whole on every device.

    Args:
      fn: the function, a module, or a bound method of one.
      in_specs: a `PartitionSpec`, or a tuple with one for each argument, or a pytree prefix of
        that; for a module or a Ref it may be a dict from filter to spec.
      out_specs: the same for the output.
      mesh: the mesh; the ambient one without it.
      **options: as for `jax.shard_map`.

    Raises:
      AxisError: specs that do not fit the arguments; one Ref with two specs.

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
            layout = Sorted(name, call, where, out_specs, PartitionSpec(), PartitionSpec)
            results = jax.shard_map(
                lambda *flat: run(inner, name, call, *flat, mode="read", finish=layout.sort),
                in_specs=(where.refs, where.leaves, where.others),
                out_specs=layout.keys,
                **given,
                **options,
            )(call.values, call.leaves, call.others)
            return close_call(call, layout.packed(results))

        return until_lifted(attempt)

    return sharded
