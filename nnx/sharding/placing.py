"""Find where the values of a tree belong, and put them there."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

import refx.ref as ref_module
from nnx._ambient import ambient
from nnx.sharding.putting import move
from nnx.sharding.rules import (
    NO_RULES,
    AnyMesh,
    Rules,
    ShardingError,
    as_rules,
    by_kind,
    current_mesh,
    entry_of,
    resolve,
    the_mesh,
)
from refx import All, FilterError, Partition, PathContains, PathMatches, Ref
from refx.access import put, writable
from refx.dag import items
from refx.filters import Any as AnyOf
from refx.filters import to_predicates
from refx.frame import local
from refx.partition import Path, dotted, listed
from refx.selection import check_selection
from refx.snapshot import snapshot
from refx.text import a_kind

__all__ = ["constrain", "fsdp", "shard", "shardings"]

T = TypeVar("T")
Specs = Mapping[Any, Any] | Callable[[Path, Any], PartitionSpec | None] | None

KEY = "sharding"


def rules_for(axes: Any) -> Rules:
    """The ambient rules, with those of a call in front."""
    around = ambient.rules if ambient.rules is not None else NO_RULES
    return around if axes is None else as_rules(axes, around)


def place(x: Any, sharding: NamedSharding) -> Any:
    """Apply a sharding to one array: move an array, constrain a tracer, annotate a shape."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=x.weak_type)
    if not isinstance(x, Tracer) and isinstance(sharding.mesh, Mesh):
        return move(x, sharding)
    specs = by_kind(sharding.spec, sharding.mesh)
    current = jax.sharding.get_abstract_mesh()
    mesh = sharding.mesh if current.empty else current
    auto = specs.get(AxisType.Auto)
    if AxisType.Explicit in specs:
        x = jax.sharding.reshard(x, NamedSharding(mesh, specs[AxisType.Explicit]))
        if auto is not None and not any(auto):
            auto = None
    return x if auto is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, auto))


def map_value(
    value: Any, said: Any, mesh: AnyMesh, rules: Rules, where: str, *, strict: bool = False
) -> Any:
    """The NamedSharding of a value, or a tree of them for a value that is a tree of arrays.

    In a tree, a spec applies to the arrays with that many dimensions. Leaves that are not arrays,
    such as Python numbers, get None.
    """
    if isinstance(said, NamedSharding):
        mesh, said, strict = said.mesh, said.spec, True
    if _is_array(value):
        spec = resolve(said, value.shape, mesh, rules, where, strict=strict)
        return NamedSharding(mesh, spec)
    if said is not None and not isinstance(said, PartitionSpec | tuple):
        return _map_tree(value, said, mesh, rules, where)
    leaves, treedef = jax.tree.flatten(value)

    def of(x: Any) -> NamedSharding | None:
        if not _is_array(x):
            return None
        mine = said if said is not None and len(said) == x.ndim else None
        return NamedSharding(mesh, resolve(mine, x.shape, mesh, rules, where, strict=strict))

    return jax.tree.unflatten(treedef, list(map(of, leaves)))


def _map_tree(value: Any, said: Any, mesh: AnyMesh, rules: Rules, where: str) -> Any:
    """Like `map_value`, but each array in the value has its own sharding."""
    treedef = jax.tree.structure(value)
    try:
        each = treedef.flatten_up_to(said)
    except ValueError:
        raise ShardingError(
            f"{where} got {said!r:.100}, which is neither a sharding nor a tree of shardings like its "
            f"value. Give a PartitionSpec, or a tuple with a name or None for each dimension."
        ) from None
    leaves = zip(jax.tree.leaves(value), each, strict=True)
    return jax.tree.unflatten(
        treedef, [map_value(x, s, mesh, rules, where) if _is_array(x) else None for x, s in leaves]
    )


def _is_array(x: Any) -> bool:
    if isinstance(x, np.ndarray):
        # NumPy arrays of strings or of foreign byte order stay on the host.
        return x.dtype.isnative and x.dtype.kind not in "USOMm"
    return isinstance(x, jax.Array | jax.ShapeDtypeStruct)


def shardings(
    tree: Any, specs: Specs = None, *, axes: Any = None, mesh: AnyMesh | None = None
) -> Partition:
    """Where each value of a tree belongs.

    Nothing is moved: see `shard`. You can pass the result to `jax.jit` as `in_shardings`, and to
    `nnx.load` as `specs`.

    Args:
      tree: a module, a Ref, or a pytree that holds some, with arrays or shapes (`nnx.eval_shape`).
      specs: a dict from filter to PartitionSpec, where the first filter that selects a Ref counts; or a
        function `(path, ref) -> PartitionSpec`, such as `nnx.fsdp("data")`, which may also be a value
        of the dict; or a Partition by path, as this function returns it. They override the
        metadata. If no filter selects a Ref, or the function returns None for it, its `sharding`
        metadata counts. Without metadata, it is whole on every device.
      axes: axis rules for this call, which come before those of `nnx.axis_rules`.
      mesh: a `jax.sharding.Mesh`, or an `AbstractMesh` for devices that do not exist yet. The
        default is the mesh of `jax.set_mesh`.

    Returns:
      A Partition with a `NamedSharding` for each path.

    Raises:
      ShardingError: an array cannot have its sharding, or a spec has a name that neither the mesh nor
        the rules know; the message names the Ref, its shape and the axis. Or there is no mesh.
      FilterError: a filter of `specs` selects nothing.

    >>> import jax, nnx
    >>> mesh = jax.sharding.AbstractMesh((2, 4), ("data", "model"))
    >>> model = nnx.eval_shape(lambda: nnx.Linear.init(0)(8, 16))
    >>> where = nnx.shardings(model, {nnx.PathContains("kernel"): jax.P("data", "model")}, mesh=mesh)
    >>> where["kernel"].spec == jax.P("data", "model"), where["bias"].spec == jax.P()
    (True, True)
    """
    mesh = the_mesh(mesh, "nnx.shardings")
    return Partition._of({path: s for path, _, _, s in _planned(tree, specs, axes, mesh)})


def _planned(tree: Any, specs: Specs, axes: Any, mesh: AnyMesh) -> list[tuple[Any, Any, Any, Any]]:
    """The path, the Ref (or plain array), the value and the sharding of everything in a tree."""
    cells = list(items(snapshot(tree)))
    rules, said = rules_for(axes), _said(specs, tree, [(path, cell) for path, cell, _ in cells])
    planned = []
    outer, _planning.mesh = _planning.mesh, mesh
    try:
        for path, cell, value in cells:
            what = said(path, cell)
            strict = what is not None
            if not strict and isinstance(cell, Ref):
                what = cell._metadata.get(KEY)
            where = f"Ref {dotted(path)!r}" if path else "A Ref"
            there = map_value(value, what, mesh, rules, where, strict=strict)
            planned.append((path, cell, value, there))
    finally:
        _planning.mesh = outer
    return planned


def _said(specs: Specs, tree: Any, cells: list[tuple[Path, Any]]) -> Callable[[Path, Any], Any]:
    """The spec that `specs` gives for a path and the Ref (or plain array) there."""
    if specs is None:
        return lambda path, cell: None
    if isinstance(specs, Partition):
        return _by_path(specs)
    if isinstance(specs, Mapping):
        predicates = to_predicates(specs)
        for filter, predicate in zip(specs, predicates, strict=True):
            if filter is not ... and not any(predicate(path, cell) for path, cell in cells):
                check_selection(filter, tree)
                _check_path(filter, [path for path, _ in cells])
        values = list(specs.values())

        def chosen(path: Path, cell: Any) -> Any:
            hits = (v for p, v in zip(predicates, values, strict=True) if p(path, cell))
            hit = next(hits, None)
            return hit(path, cell) if callable(hit) else hit

        return chosen
    if isinstance(specs, PartitionSpec):
        raise TypeError(
            f"specs must say which array gets which sharding: write {{...: {specs!r}}} for all "
            f"arrays, or {{'params': {specs!r}}} for those of one collection."
        )
    if not callable(specs):
        raise TypeError(
            "specs must be a dict from filter to PartitionSpec, or a function (path, ref) -> "
            f"PartitionSpec such as nnx.fsdp('data'), but got {a_kind(type(specs))}."
        )
    return specs


def _by_path(specs: Partition) -> Callable[[Path, Any], Any]:
    said = dict(specs.items())

    def chosen(path: Path, cell: Any) -> Any:
        if path not in said:
            raise ShardingError(
                f"The Partition of shardings has none for {dotted(path)!r}; it has {listed(said)}. "
                f"Make it from a tree with the same structure, or use a dict from filter to PartitionSpec."
            )
        return said[path]

    return chosen


def _check_path(filter: Any, paths: list[Path]) -> None:
    """Raise for a path filter that selects nothing, because its values would stay whole unnoticed."""
    if _asks_for_path(filter):
        raise FilterError(
            f"The filter {filter!r} of specs selects nothing; the paths are {listed(paths, 4)}. Leave "
            f"it out, or write an existing path."
        )


def _asks_for_path(filter: Any) -> bool:
    if isinstance(filter, AnyOf | All | tuple):
        return any(map(_asks_for_path, filter if isinstance(filter, tuple) else filter.filters))
    return isinstance(filter, PathMatches | PathContains)


def shard(tree: T, specs: Specs = None, *, axes: Any = None, mesh: AnyMesh | None = None) -> T:
    """Put every value of a tree where it belongs, in place, and return the tree.

    Arrays are moved, tracers constrained, and `ShapeDtypeStruct`s annotated. If it raises, nothing
    has changed. Shared Refs stay shared.

    Args:
      tree: a module, a Ref, or a pytree that holds some. Plain arrays in modules, lists and dicts
        are placed, too.
      specs, axes, mesh: say what belongs where; see `shardings`.

    Raises:
      ShardingError: an array cannot have its sharding, or there is no mesh. FilterError: a filter
        of `specs` selects nothing.
      TraceLevelError, ReadOnlyError: a Ref must not be written here.

    >>> import jax, nnx
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> model = nnx.Linear.init(0)(8, 16)
    >>> nnx.shard(model, nnx.fsdp("data"), mesh=mesh).kernel.sharding.mesh.shape["data"]
    1
    """
    mesh = the_mesh(mesh, "nnx.shard")
    planned = _planned(tree, specs, axes, mesh)
    refs = [(path, cell, value, s) for path, cell, value, s in planned if isinstance(cell, Ref)]
    targets = [writable(cell, dotted(path)) for path, cell, _, _ in refs]
    placed = [_placed(value, s) for _, _, value, s in planned]
    kept = snapshot(tree)
    holders = kept.holders()
    leaves = placed[len(refs) :]
    paths = kept.dagdef.leaf_paths
    for (holder, _), path, new, old in zip(holders, paths, leaves, kept.leaves(), strict=True):
        if holder is None and new is not old:
            raise ShardingError(
                f"The plain array {dotted(path)!r} is in a tuple or another pytree that cannot be "
                "changed in place. Put it in an attribute, a list, a dict, or a Ref."
            )
    for target, new in zip(targets, placed, strict=False):
        put(target, new)
    if local.frame is not None:
        local.frame.placed.update(targets)
    for (holder, key), new in zip(holders, leaves, strict=True):
        if holder is not None:
            holder[key] = new
    return tree


def _placed(value: Any, where: Any) -> Any:
    if isinstance(where, NamedSharding):
        return place(value, where)
    return jax.tree.map(
        lambda x, s: x if s is None else place(x, s), value, where, is_leaf=lambda x: x is None
    )


def with_places(value: Any, where: Any) -> list[tuple[Any, Any]]:
    """The parts of a value, each with its sharding or None. `where` is one sharding for all, or a tree."""
    leaves, places = (jax.tree.leaves(t, is_leaf=lambda x: x is None) for t in (value, where))
    if where is None or isinstance(where, Sharding):
        places = [where] * len(leaves)
    return list(zip(leaves, places, strict=True))


def fsdp(
    axis: str | tuple[str, ...], min_size: int = 2**16
) -> Callable[[Path, Any], PartitionSpec | None]:
    """A rule for `shardings` and `shard`: divide every large array along its largest dimension.

    This is fully sharded data parallelism (ZeRO stage 3; Rajbhandari et al. 2019,
    https://arxiv.org/abs/1910.02054): each device keeps a part of every array, and XLA gathers the
    parts of a layer while it runs.

    Args:
      axis: the mesh axis, or several that divide the dimension together.
      min_size: arrays with fewer elements stay whole on every device, because gathering them costs
        more than keeping them.

    Returns:
      A function `(path, ref) -> PartitionSpec`. It picks the largest dimension that divides evenly
      over the devices. If there is none, the array stays whole. The function needs the sizes of the
      mesh, which only `shardings` and `shard` pass to it.

    >>> import jax, nnx
    >>> mesh = jax.sharding.AbstractMesh((8,), ("data",))
    >>> model = nnx.eval_shape(lambda: nnx.Linear.init(0)(1024, 512))
    >>> nnx.shardings(model, nnx.fsdp("data"), mesh=mesh)["kernel"].spec == jax.P("data")
    True
    """
    names = (axis,) if isinstance(axis, str) else tuple(axis)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"nnx.fsdp takes the name of a mesh axis, or a tuple of them, but got {axis!r}."
        )

    def rule(path: Path, ref: Any) -> PartitionSpec | None:
        mesh = _planning.mesh or the_mesh(None, "nnx.fsdp")
        sizes = dict(mesh.shape)
        if unknown := [name for name in names if name not in sizes]:
            raise ShardingError(
                f"nnx.fsdp({axis!r}) needs a mesh axis {unknown[0]!r}, but the mesh has "
                f"{', '.join(map(repr, sizes)) or 'no axes'}."
            )
        value = ref._value if isinstance(ref, Ref) else ref
        count = math.prod(sizes[name] for name in names)
        if not _is_array(value) or value.size < min_size:
            return None
        divisible = [i for i, size in enumerate(value.shape) if size and size % count == 0]
        if not divisible:
            return None
        largest = max(divisible, key=lambda i: value.shape[i])
        return PartitionSpec(*[None] * largest, entry_of(names))

    return rule


def constrain(x: Any, *names: Any, axes: Any = None, mesh: AnyMesh | None = None) -> Any:
    """Say where an activation belongs, with the names that the parameters use.

    Under `nnx.jit` this constrains the compiled program; outside, it moves the array. Without a
    mesh it returns `x` unchanged, so the same model also runs on one device.

    Args:
      x: an array.
      *names: one for each dimension: a logical name, a mesh axis, a tuple of these, or None. A name
        that neither the mesh nor the rules know leaves the dimension whole.
      axes: axis rules for this call.
      mesh: the mesh. The default is that of `jax.set_mesh`.

    Raises:
      ShardingError: the number of names differs from the number of dimensions; an axis is used
        twice; or a size does not divide evenly.

    >>> import jax.numpy as jnp, nnx
    >>> nnx.constrain(jnp.ones((4, 8)), "batch", "embed").shape
    (4, 8)
    """
    mesh = current_mesh() if mesh is None else the_mesh(mesh, "nnx.constrain")
    if len(names) != x.ndim:
        raise ShardingError(
            f"nnx.constrain got an array of shape {tuple(x.shape)} and {len(names)} names: "
            f"{names!r}. Give one for each dimension; None leaves a dimension whole."
        )
    if mesh is None:
        return x
    spec = resolve(names, x.shape, mesh, rules_for(axes), "The array given to nnx.constrain")
    return place(x, NamedSharding(mesh, spec))


class _Planning(threading.local):
    # The mesh for which specs are being computed.
    mesh: AnyMesh | None = None


_planning = _Planning()


def at_birth(value: Any, collection: Any, metadata: Mapping[str, Any]) -> Any:
    """The value of a new Ref, placed as its metadata and the current mesh say."""
    said = metadata.get(KEY)
    mesh = current_mesh() if said is not None else None
    if mesh is None:
        return value
    where = map_value(value, said, mesh, rules_for(None), f"A new Ref of {collection!r}")
    return _placed(value, where)


def drawn_in_place(
    init: Callable[..., Any], key: Any, shape: tuple[int, ...], dtype: Any, said: Any
) -> Any:
    """Run an initializer so that each device draws its own part. None if there is no mesh."""
    mesh = current_mesh() if said is not None else None
    if mesh is None or isinstance(mesh, jax.sharding.AbstractMesh) or isinstance(key, Tracer):
        return None
    spec = resolve(said, shape, mesh, rules_for(None), "A new parameter")
    draw = jax.jit(init, static_argnums=(1, 2), out_shardings=NamedSharding(mesh, spec))
    return draw(key, shape, dtype)


ref_module.at_birth = at_birth
