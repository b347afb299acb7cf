"""`out_sharding=` of the layers: its meaning on each kind of mesh, and the error when it is missing."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from nnx.layers._sharding import explicit_mesh, merged_spec, spec_of
from nnx.module import Module
from nnx.sharding.placing import rules_for
from nnx.sharding.rules import ShardingError, by_kind, current_mesh, names_in, resolve
from refx.text import a_kind

__all__ = [
    "ANYWHERE",
    "OutSharding",
    "Wanted",
    "explain_sharding",
    "fewer_heads",
    "wanted_sharding",
]

OutSharding = Any


class Wanted(NamedTuple):
    """The requested sharding of a result, along the Explicit axes of a mesh and along the Auto axes."""

    explicit: NamedSharding | None = None
    auto: NamedSharding | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The argument for the JAX function that computes the result."""
        return {} if self.explicit is None else {"out_sharding": self.explicit}

    def merged(self, axes: int) -> Wanted:
        """The same for a result whose first axes are merged into one."""
        if self.explicit is None:
            return ANYWHERE
        spec: Any = self.explicit.spec
        spec = [*spec, *(None,) * (axes - len(spec))]
        return Wanted(NamedSharding(self.explicit.mesh, merged_spec(spec, axes)))

    def without_last(self, ndim: int) -> Wanted:
        """The same for a result with other features, which are whole on every device."""
        if self.explicit is None:
            return ANYWHERE
        spec: Any = self.explicit.spec
        return Wanted(NamedSharding(self.explicit.mesh, PartitionSpec(*spec[: ndim - 1])))

    def batch(self, like: jax.Array, axes: int) -> list[Any]:
        """The mesh axes of the result's first axes: the requested ones, or those of the input."""
        if self.explicit is None:
            return spec_of(like)[:axes]
        spec: Any = self.explicit.spec
        return [*spec, *(None,) * (axes - len(spec))][:axes]

    def constrained(self, y: jax.Array) -> jax.Array:
        """The result, with a constraint for XLA along the Auto axes."""
        if self.auto is None:
            return y
        if isinstance(y, Tracer):
            return jax.lax.with_sharding_constraint(y, self.auto)
        return jax.device_put(y, self.auto)


ANYWHERE = Wanted()


def wanted_sharding(
    layer: Module, given: OutSharding, shape: tuple[int, ...], *arrays: Any
) -> Wanted:
    """The sharding that an argument `out_sharding` requests for a result.

    Explicit axes of the mesh go to JAX's own `out_sharding`, and Auto axes become a constraint. Along
    the axes of a surrounding `shard_map` the result is already a shard. Without a mesh nothing is
    requested.

    Args:
      layer: the layer, for errors.
      given: the argument of its call.
      shape: the shape of the result, with 0 for a size that is not known yet.
      *arrays: the operands, whose types may name a mesh when none is set.

    Raises:
      ShardingError: the result cannot be sharded like this.
      TypeError: the argument is something else.
    """
    if given is None:
        return ANYWHERE
    name = type(layer).__name__
    if isinstance(given, NamedSharding):
        mesh: Any = given.mesh
        said: Any = given.spec
    elif isinstance(given, PartitionSpec) or type(given) is tuple:
        said = given
        mesh = current_mesh() or explicit_mesh(*arrays)
    else:
        raise TypeError(
            f"The out_sharding of {name} must be a PartitionSpec, a tuple of names or a NamedSharding, "
            f"but got {a_kind(type(given))}: {given!r:.80}."
        )
    if mesh is None:
        return ANYWHERE
    current = jax.sharding.get_abstract_mesh()
    spec = resolve(said, shape, mesh, rules_for(None), f"The output of {name}")
    specs = by_kind(spec, mesh)
    if not current.empty and isinstance(mesh, AbstractMesh):
        mesh = current
    explicit = auto = None
    if AxisType.Explicit in specs:
        explicit = NamedSharding(mesh, specs[AxisType.Explicit])
    if AxisType.Auto in specs and (explicit is None or any(specs[AxisType.Auto])):
        auto = NamedSharding(mesh, specs[AxisType.Auto])
    return Wanted(explicit, auto)


def fewer_heads(layer: Module, given: OutSharding, ndim: int, heads: int, x: Any) -> OutSharding:
    """`out_sharding` for arrays with this number of heads, which stay whole if it cannot divide them."""
    axis, parts = ndim - 2, 1
    for where in wanted_sharding(layer, given, (0,) * ndim, x):
        spec: Any = () if where is None else where.spec
        if where is not None and len(spec) > axis:
            parts *= math.prod(where.mesh.shape[name] for name in names_in(spec[axis]))
    if heads % parts == 0:
        return given
    spec = given.spec if isinstance(given, NamedSharding) else given
    whole = PartitionSpec(*(None if i == axis else entry for i, entry in enumerate(spec)))
    return NamedSharding(given.mesh, whole) if isinstance(given, NamedSharding) else whole


def explain_sharding(
    layer: Module,
    error: Exception,
    argument: str = "out_sharding",
    **arrays: Any,
) -> None:
    """Raise a clearer error if JAX could not infer the sharding of a result.

    Args:
      layer: the layer whose call failed.
      error: the exception; any other one is ignored.
      argument: the argument of the call that sets the sharding.
      **arrays: the operands of the layer, by name.

    Raises:
      ShardingError: with the types of the arrays.
    """
    for cause in (error, error.__cause__):
        # A layer inside this one may have explained it already, in terms of an argument that the user
        # cannot pass.
        if type(cause).__name__ == "ShardingTypeError":
            break
    else:
        return
    shown = ", ".join(f"{k} {jax.typeof(x)}" for k, x in arrays.items() if x is not None)
    what = "its result" if argument == "out_sharding" else "its intermediate results"
    raise ShardingError(
        f"{type(layer).__name__} does not know how to shard {what}. It has {shown}. Say it in "
        f"the call, as in layer(x, {argument}=P({_example(arrays)})), with a mesh axis or None for "
        f"each axis. Or make the mesh with Auto axes (axis_types=), where XLA chooses."
    ) from cause


def _example(arrays: dict[str, Any]) -> str:
    """The sharding of the input's first axis; the user chooses the rest."""
    first = next(iter(arrays.values()))
    spec = spec_of(first)
    return ", ".join([repr(spec[0]), "..."]) if spec else "..."
