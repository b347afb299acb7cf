"""From names to places: what `sharding` metadata, axis rules and a mesh mean for an array."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from nnx._ambient import ambient
from refx import RefError
from refx.text import a_kind

__all__ = ["ShardingError", "axis_rules"]

AnyMesh = Mesh | AbstractMesh
# JAX compares this before it uses a trace or a program again.
_in_keys = jax.make_user_context(default_value=None)
# A mesh axis, several axes that divide one dimension together, or None.
Target = str | tuple[str, ...] | None


class ShardingError(RefError, ValueError):
    """An array cannot have this sharding: wrong rank, an axis used twice, or a size that does not divide."""


class Rules(Mapping[str, Target]):
    """Logical names with the mesh axes that they stand for. Rules with equal content are equal."""

    __slots__ = ("_hash", "_items")

    def __init__(self, items: Mapping[str, Target]):
        self._items = dict(items)
        self._hash = hash(frozenset(self._items.items()))

    def __getitem__(self, name: str) -> Target:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Rules) and self._items == other._items)


NO_RULES = Rules({})


def as_rules(given: Any, around: Rules = NO_RULES) -> Rules:
    """Make rules from a mapping or pairs. Names that they lack come from the surrounding rules.

    Raises:
      TypeError: a name or an axis is not a string, or a name appears twice.
    """
    if isinstance(given, Rules) and not around:
        return given
    pairs = list(given.items() if isinstance(given, Mapping) else given)
    found: dict[str, Target] = {}
    for pair in pairs:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise TypeError(
                "Axis rules must be a dict from logical name to a mesh axis, a tuple of mesh "
                f"axes, or None, as in {{'embed': 'fsdp', 'batch': ('data', 'fsdp')}}, but got "
                f"{pair!r}."
            )
        name, target = pair
        if isinstance(target, list):
            target = tuple(target)
        if not (target is None or isinstance(target, str) or _all_strings(target)):
            raise TypeError(
                f"The axis rule for {name!r} is {target!r}. It must be the name of a mesh axis, a "
                f"tuple of such names, or None."
            )
        if name in found:
            raise TypeError(f"There are two axis rules for {name!r}. Keep one of them.")
        found[name] = target
    return Rules({**around, **found})


def _all_strings(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(name, str) for name in x)


@contextmanager
def axis_rules(rules: Mapping[str, Target] | Iterable[tuple[str, Target]]) -> Iterator[None]:
    """Map logical axis names to mesh axes within a block of code, in this thread.

    A name without a rule is a mesh axis if the mesh has one of that name. Otherwise that dimension
    is not sharded. It is not sharded either if the mesh lacks the axis that a rule names, so the
    same rules serve a laptop and a cluster. Blocks nest: inner rules win, and the outer ones still
    hold for other names. A function, under `nnx.jit` or plain `jax.jit`, compiles once for each set
    of rules.

    Args:
      rules: a mapping (or pairs) from a logical name to a mesh axis, to a tuple of mesh axes that
        divide the dimension together, or to None.

    Raises:
      TypeError: `rules` is something else, or has a name twice.

    >>> import jax, nnx
    >>> mesh = jax.sharding.AbstractMesh((2, 4), ("data", "tensor"))
    >>> model = nnx.Linear.init(0)(8, 16, kernel_metadata={"sharding": ("embed", "mlp")})
    >>> with nnx.axis_rules({"mlp": "tensor"}):
    ...     nnx.shardings(model, mesh=mesh)["kernel"].spec == jax.P(None, "tensor")
    True
    """
    outer = ambient.rules
    ambient.rules = as_rules(rules, outer if outer is not None else NO_RULES)
    try:
        with _in_keys(ambient.rules):
            yield
    finally:
        ambient.rules = outer


def current_mesh() -> AnyMesh | None:
    """The mesh that `jax.set_mesh` has set. While JAX traces a program, it is abstract."""
    abstract = jax.sharding.get_abstract_mesh()
    if abstract.empty:
        return None
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError:  # JAX raises this while it traces a program.
        return abstract
    return abstract if mesh.empty else mesh


def the_mesh(given: AnyMesh | None, what: str) -> AnyMesh:
    """The given mesh, or the current one.

    Raises:
      ShardingError: there is no mesh.
    """
    mesh = current_mesh() if given is None else given
    if mesh is None:
        raise ShardingError(
            f"{what} needs a mesh, but there is none. Pass mesh=jax.make_mesh(...), or call it "
            "inside `with jax.set_mesh(mesh):`."
        )
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(f"{what} takes a jax.sharding.Mesh, but got {a_kind(type(mesh))}.")
    return mesh


def entries(said: Any) -> tuple[Any, ...]:
    """The entries of a sharding, one for each dimension that it covers.

    Raises:
      TypeError: the sharding is not a PartitionSpec or a tuple of names.
    """
    if said is None:
        return ()
    if isinstance(said, PartitionSpec | tuple | list):
        parts = tuple(tuple(x) if isinstance(x, list) else x for x in said)
        free = PartitionSpec.UNCONSTRAINED
        if all(x is None or x is free or isinstance(x, str) or _all_strings(x) for x in parts):
            return parts
    hint = f" Write a tuple: ({said!r},)." if isinstance(said, str) else ""
    raise TypeError(
        "A sharding must be a PartitionSpec, or a tuple with a name, a tuple of names, or None "
        f"for each dimension, but got {said!r}.{hint}"
    )


def resolve(
    said: Any,
    shape: tuple[int, ...],
    mesh: AnyMesh | Mapping[str, int],
    rules: Rules,
    where: str,
    *,
    strict: bool = False,
) -> PartitionSpec:
    """Translate `said` into a PartitionSpec over mesh axes, for an array of `shape`.

    Args:
      said: a PartitionSpec or a tuple of names: logical names or mesh axes.
      shape: the shape of the array.
      mesh: the mesh, or the sizes of its axes.
      rules: the mesh axes that logical names stand for.
      where: the array's name in error messages.
      strict: whether a name that neither the rules nor the mesh know is an error.

    Raises:
      ShardingError: the rank differs, a mesh axis serves two dimensions, or a size does not divide.
      TypeError: `said` is something else.
    """
    parts = entries(said)
    exact = not isinstance(said, PartitionSpec)
    if len(parts) > len(shape) or (exact and parts and len(parts) != len(shape)):
        raise ShardingError(
            f"{where} has shape {shape}, but its sharding {_shown(said)} has {_count(parts)}. "
            f"Give one entry for each dimension; None leaves a dimension whole."
        )
    given = dict(mesh if isinstance(mesh, Mapping) else mesh.shape)
    # Inside shard_map an array is the part of one device, along these axes.
    manual = jax.sharding.get_abstract_mesh().manual_axes
    sizes = {axis: size for axis, size in given.items() if axis not in manual}
    taken: dict[str, Any] = {}
    spec: list[Any] = []
    for size, part in zip(shape, parts):
        if part is PartitionSpec.UNCONSTRAINED:
            spec.append(part)
            continue
        if strict:
            _check_known(part, given, rules, where)
        axes = _axes(part, sizes, rules)
        for axis in axes:
            if axis in taken:
                raise ShardingError(
                    f"{where} would be divided twice along the mesh axis {axis!r}: for "
                    f"{taken[axis]!r} and for {part!r} in {_shown(said)}. A mesh axis can divide "
                    "only one dimension of an array: give one of the names another rule, or None."
                )
            taken[axis] = part
        count = math.prod(sizes[axis] for axis in axes)
        if size % count:
            raise ShardingError(
                f"{where} has shape {shape}, and its dimension of size {size} cannot be divided "
                f"into {count} equal parts along {' and '.join(map(repr, axes))}. Choose a "
                f"multiple of {count} as the size, or leave this dimension whole with None as its "
                "rule or entry."
            )
        spec.append(entry_of(axes))
    return stripped(spec)


def _axes(part: Any, sizes: Mapping[str, int], rules: Rules) -> tuple[str, ...]:
    found: list[str] = []
    for name in names_in(part):
        found += names_in(rules.get(name, name))
    return tuple(axis for axis in found if axis in sizes)


def _check_known(part: Any, sizes: Mapping[str, int], rules: Rules, where: str) -> None:
    for name in names_in(part):
        if name not in sizes and name not in rules:
            known = ", ".join(map(repr, [*sizes, *rules])) or "no names"
            raise ShardingError(
                f"{where} got a spec with {name!r}, which is not an axis of the mesh and has no rule; "
                f"there are {known}. Name one of these, or add a rule with nnx.axis_rules or axes=."
            )


def names_in(part: Any) -> tuple[Any, ...]:
    """The names in one entry of a sharding."""
    if part is None:
        return ()
    return part if isinstance(part, tuple) else (part,)


def entry_of(names: tuple[Any, ...]) -> Any:
    """The entry with these names: the inverse of `names_in`."""
    return names[0] if len(names) == 1 else (names or None)


def axis_kinds(mesh: AnyMesh) -> dict[str, AxisType]:
    """The kind of each axis of a mesh at this point: inside a `shard_map`, the axes that it maps
    are Manual.
    """
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    current = jax.sharding.get_abstract_mesh()
    return kinds | dict(zip(current.axis_names, current.axis_types, strict=True))


def by_kind(spec: PartitionSpec, mesh: AnyMesh) -> dict[AxisType, PartitionSpec]:
    """Divide a spec by the kind of mesh axis that its entries name."""
    kinds = axis_kinds(mesh)
    free = PartitionSpec.UNCONSTRAINED

    def only(kind: AxisType) -> PartitionSpec:
        kept = ([n for n in names_in(part) if kinds.get(n) == kind] for part in spec)
        pairs = zip(spec, kept, strict=True)
        return PartitionSpec(*(p if p is free else entry_of(tuple(names)) for p, names in pairs))

    return {kind: only(kind) for kind in dict.fromkeys(kinds.values())}


def _count(parts: tuple[Any, ...]) -> str:
    return "1 entry" if len(parts) == 1 else f"{len(parts)} entries"


def _shown(said: Any) -> str:
    return str(said) if isinstance(said, PartitionSpec) else repr(tuple(said))


def stripped(parts: Iterable[Any]) -> PartitionSpec:
    """The PartitionSpec without trailing Nones: to JAX, P("data") and P("data", None) mean the same place."""
    kept = list(parts)
    while kept and kept[-1] is None:
        kept.pop()
    return PartitionSpec(*kept)


def inserted(said: Any, axis: int, entry: Any = None) -> Any:
    """A sharding with one more entry, for an axis that was added at `axis`, counted from 0.

    A PartitionSpec may have fewer entries than the array has dimensions. Missing entries count as None.
    """
    parts = [*entries(said)]
    parts += [None] * (axis - len(parts))
    parts.insert(axis, entry)
    return PartitionSpec(*parts) if isinstance(said, PartitionSpec) else tuple(parts)


def removed(said: Any, axis: int = 0) -> Any:
    """A sharding without the entry of a removed axis, counted from 0."""
    parts = [*entries(said)]
    del parts[axis : axis + 1]
    return PartitionSpec(*parts) if isinstance(said, PartitionSpec) else tuple(parts)


def check_rank(said: Any, value: Any, where: str) -> None:
    """Raise if a sharding cannot follow a change of axes, because it does not fit the value."""
    parts, partial = entries(said), isinstance(said, PartitionSpec)
    for x in jax.tree.leaves(value):
        ndim = getattr(x, "ndim", 0)
        if len(parts) > ndim or (parts and not partial and len(parts) != ndim):
            raise ShardingError(
                f"{where} has the shape {tuple(getattr(x, 'shape', ()))}, but its sharding "
                f"{_shown(said)} has {_count(parts)}, so it cannot follow when an axis is added or removed. "
                f"Give one entry for each dimension; None leaves a dimension whole."
            )


def canonical(sharding: Any) -> Any:
    """A normal form: two shardings with the same meaning have equal results."""
    if type(sharding) is not NamedSharding or (sharding.spec and sharding.spec[-1] is not None):
        return sharding
    return NamedSharding(sharding.mesh, stripped(sharding.spec))
