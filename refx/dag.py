"""Operations on a tree of Refs: take it apart, put it together, read it and update it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np

from refx.access import check_value, label, peek, put, writable
from refx.buffers import CONCRETE, dead_error, is_dead
from refx.build import build
from refx.dagdef import DagDef, frozen_def
from refx.errors import (
    DtypeError,
    MissingPathError,
    ShapeError,
    UnknownPathError,
    UnmatchedPathError,
    ValueTypeError,
)
from refx.filters import Filter, to_predicate, to_predicates
from refx.frame import copy_containers
from refx.node import Node
from refx.partition import Partition, Path, as_path, dotted, listed
from refx.ref import Ref
from refx.selection import check_selection, follow
from refx.snapshot import Snapshot, snapshot
from refx.text import ours

__all__ = ["clone", "frozen", "get_partition", "merge", "refs", "split", "update"]

T = TypeVar("T")


@overload
def split(tree: T) -> tuple[DagDef[T], Partition]: ...
@overload
def split(tree: T, first: Filter, /) -> tuple[DagDef[T], Partition]: ...
@overload
def split(tree: T, first: Filter, second: Filter, /) -> tuple[DagDef[T], Partition, Partition]: ...
@overload
def split(tree: T, *filters: Filter) -> tuple[DagDef[T], *tuple[Partition, ...]]: ...
def split(tree: Any, *filters: Filter) -> tuple[Any, ...]:
    """Take a tree apart into its structure and its values.

    Args:
      tree: a module, a Ref, or any pytree that holds some.
      *filters: one for each Partition to return. A value goes to the first filter that selects it.
        Without filters there is one Partition with everything.

    Returns:
      `(dagdef, *partitions)`. `merge` puts them together again.

    Raises:
      UnmatchedPathError: no filter selects a value. `...` as the last filter takes the rest.
      FilterError: a filter selects nothing by mistake, as for `get_partition`; or it can never select
        anything, such as a filter after `...`.
      UnhashableStaticError: a static value cannot be hashed. The message has its path.

    >>> import refx
    >>> tree = {"w": refx.Ref(1.0, "params"), "mean": refx.Ref(0.0, "batch_stats")}
    >>> dagdef, params, rest = refx.split(tree, "params", ...)
    >>> params["w"], rest["mean"]
    (1.0, 0.0)
    """
    snap = snapshot(tree)
    if not filters:
        values = snap.values() + snap.leaves()
        _check_alive(snap.dagdef.paths, values, "was to be split off")
        return snap.dagdef, Partition._of(dict(zip(snap.dagdef.paths, values, strict=True)))
    predicates = to_predicates(filters)
    parts: list[dict[Path, Any]] = [{} for _ in filters]
    unmatched: list[Path] = []
    for path, cell, value in items(snap):
        for predicate, part in zip(predicates, parts, strict=True):
            if predicate(path, cell):
                part[path] = value
                break
        else:
            unmatched.append(path)
    if unmatched:
        raise UnmatchedPathError(
            f"No filter selects {listed(unmatched)}. Add ... as the last filter to take the rest, "
            f"or add a filter for their collection."
        )
    for filter, part in zip(filters, parts, strict=True):
        if not part:
            check_selection(filter, tree)
        _check_alive(part, part.values(), "was to be split off")
    return (snap.dagdef, *map(Partition._of, parts))


def items(snap: Snapshot) -> Iterator[tuple[Path, Any, Any]]:
    """The path, the Ref (or the plain array itself) and the value of everything in a tree."""
    yield from zip(snap.dagdef.ref_paths, snap.refs, snap.values(), strict=True)
    leaves = snap.leaves()
    yield from zip(snap.dagdef.leaf_paths, leaves, leaves, strict=True)


def merge(dagdef: DagDef[T], *partitions: Mapping[Path, Any]) -> T:
    """Put a tree together from its structure and its values: the inverse of `split`.

    The new tree equals the one that was split, but its Refs are fresh. Sharing is the same (one module
    at two paths is one module again), and so are cycles.

    Raises:
      MissingPathError: the partitions together lack a path of the structure.
      UnknownPathError: a partition has a path that the structure lacks, or two partitions have
        different values for one path.

    >>> import refx
    >>> shared = refx.Ref(1.0, "params")
    >>> a, b = refx.merge(*refx.split((shared, shared)))
    >>> a is b, a is shared
    (True, False)
    """
    given: dict[Path, Any] = _content(partitions[0]) if len(partitions) == 1 else {}
    for partition in partitions if len(partitions) > 1 else ():
        for path, value in _content(partition).items():
            if given.setdefault(path, value) is not value:
                raise UnknownPathError(
                    f"Two of the partitions have a value for {dotted(path)!r}. Leave one out, or choose "
                    f"one: in first | second, the second wins."
                )
    paths = dagdef.paths
    missing = [path for path in paths if path not in given]
    if missing:
        raise MissingPathError(
            f"The partitions lack {listed(missing)}, which {dagdef!r} needs. Pass every partition "
            f"that split returned."
        )
    if len(given) > len(paths):
        known = set(paths)
        raise UnknownPathError(
            f"The partitions have {listed(p for p in given if p not in known)}, which {dagdef!r} "
            f"does not have. Was the tree changed after it was split? Then split it again."
        )
    values = _with_own_containers(paths, [given[path] for path in paths], "was to be merged")
    return build(dagdef, values, values[len(dagdef.ref_paths) :])[0]


def _content(partition: Any) -> dict[Path, Any]:
    return partition._items if type(partition) is Partition else Partition(partition)._items


def _with_own_containers(paths: tuple[Path, ...], values: list[Any], what: str) -> list[Any]:
    """Prepare values for new Refs. Raises if the buffer of one is gone."""
    _check_alive(paths, values, what)
    # Almost always, all of them are arrays.
    return values if CONCRETE.issuperset(map(type, values)) else list(map(copy_containers, values))


def clone(tree: T, *, copy: bool = False) -> T:
    """Make a copy with its own Refs: changing the copy does not change the original.

    The copy belongs to the transformation that runs here. So you can write and return a clone of a
    read-only copy that plain `jax.jit` made.

    Args:
      tree: the tree to copy: its Refs, modules, lists and dicts, with their sharing.
      copy: whether to copy the arrays too. By default the clone shares them, which costs nothing, but a
        step that donates the buffers of one takes them from the other.

    Raises:
      DonationError: the buffer of an array is gone.

    >>> import refx
    >>> a = refx.Ref(1.0)
    >>> b = refx.clone(a)
    >>> b.value = 2.0
    >>> a.value
    1.0
    """
    snap = snapshot(tree)
    dagdef = frozen_def(snap.dagdef, False)
    values = [*snap.values(), *snap.leaves()]
    values = _with_own_containers(dagdef.paths, values, "was to be cloned")
    if copy:
        values = [jax.tree.map(_copied, x) for x in values]
    root, objects = build(dagdef, values, values[len(dagdef.ref_paths) :])
    if snap.has_labels:
        label(x for x in objects if type(x) is Ref)
    return root


def frozen(tree: T) -> T:
    """Make a read-only copy, which any program may use as a constant.

    The copy shares the arrays of the tree, but later writes to the tree do not reach it. The results of
    tree operations on it (`jax.tree.map`, a plain `jax.jit`) are frozen too. `clone` makes a copy that
    can be written.

    >>> import jax, refx
    >>> tree = refx.frozen({"w": refx.Ref(3.0, "params")})
    >>> float(jax.jit(lambda x: x * tree["w"].value)(2.0))
    6.0
    >>> try:
    ...     tree["w"].value = 1.0
    ... except refx.ReadOnlyError as error:
    ...     print(str(error)[:65])
    A Ref (collection 'params', 3.0) was written, but it is frozen, s
    """
    dagdef, values = split(tree)
    return merge(frozen_def(dagdef, True), values)


def _copied(x: Any) -> Any:
    if isinstance(x, jax.Array):
        return jnp.copy(x)
    return x.copy() if isinstance(x, np.ndarray) else x


def _check_alive(paths: Iterable[Path], values: Iterable[Any], what: str) -> None:
    values = list(values)
    if CONCRETE.issuperset(map(type, values)) and not any([x.is_deleted() for x in values]):
        return
    dead = next((path for path, x in zip(paths, values, strict=True) if is_dead(x)), None)
    if dead is not None:
        raise dead_error(f"The value at path {dotted(dead)!r} {what}, but its buffer")


def refs(tree: Any) -> dict[Path, Ref[Any]]:
    """The Refs of a tree by their canonical paths, in order. A shared Ref appears once.

    >>> import refx
    >>> refx.refs([refx.Ref(1.0), {"b": refx.Ref(2.0)}])
    {('0',): Ref(1.0, None), ('1', 'b'): Ref(2.0, None)}
    """
    snap = snapshot(tree)
    return dict(zip(snap.dagdef.ref_paths, snap.refs, strict=True))


def get_partition(tree: Any, filter: Filter = ...) -> Partition:
    """The values that a filter selects, as a Partition.

    If the tree does not have the collection, the Partition is empty.

    Raises:
      FilterError: the filter selects nothing and looks like a mistake: a path or a number in place of
        a collection, a misspelled collection, or `OfType` of a module class.

    >>> import refx
    >>> tree = {"w": refx.Ref(1.0, "params"), "n": refx.Ref(0, "counters")}
    >>> refx.get_partition(tree, "params")
    Partition({
      'w': 1.0,
    })
    """
    predicate = to_predicate(filter)
    found = {p: value for p, cell, value in items(snapshot(tree)) if predicate(p, cell)}
    if not found:
        check_selection(filter, tree)
    _check_alive(found, found.values(), "was read")
    return Partition._of(found)


def update(tree: Any, *partitions: Mapping[Path, Any], strict: bool = True) -> None:
    """Write values into the Refs of a tree, by path. It writes either everything or nothing.

    Args:
      tree: the tree whose Refs to write.
      *partitions: mappings from path to value. They need not have every path.
      strict: whether a value must have the shape and the dtype of the old one. An unknown path is
        always an error.

    Raises:
      UnknownPathError: the tree does not have a path, or there is no Ref at it.
      ShapeError, DtypeError, ValueTypeError: a value does not match the old one.
      TraceLevelError, ReadOnlyError, ForeignTracerError, NotMutableError: as for any write.

    >>> import refx
    >>> tree = {"w": refx.Ref(1.0, "params")}
    >>> refx.update(tree, {"w": 5.0})
    >>> tree["w"].value
    5.0
    """
    update_cells(tree, refs(tree), partitions, strict)


def update_cells(
    tree: Any,
    cells: dict[Path, Ref[Any]],
    partitions: Sequence[Any],
    strict: bool = True,
    check: Callable[[Any, Path, Ref[Any]], None] | None = None,
) -> None:
    """`update` for known Refs. `check` is called for each Ref before it is written."""
    writes: dict[Ref[Any], tuple[Any, Any]] = {}
    for partition in partitions:
        if not isinstance(partition, Mapping):
            raise ValueTypeError(
                f"update takes partitions, mappings from path to value, but got a "
                f"{type(partition).__name__}.{values_of(partition)}"
            )
        for given, value in partition.items():
            path, cell = find_ref(tree, given, cells)
            if check is not None:
                check(given, path, cell)
            if cell in writes and writes[cell][1] is not value:
                raise UnknownPathError(
                    f"Two values were given for one shared Ref, at {dotted(writes[cell][0])!r} and "
                    f"at {dotted(given)!r}. Give one of them."
                )
            _check_like(path, cell, value, strict)
            writes[cell] = (given, value)
    targets = [(writable(cell, dotted(path)), value) for cell, (path, value) in writes.items()]
    for target, value in targets:
        put(target, value)


def values_of(given: Any, filter: Filter = "params") -> str:
    """For a message: how to get a Partition from a module of gradients."""
    if not isinstance(given, Node):
        return ""
    return f" Pass the values of the module: {ours('get_partition')}(grads, {filter!r})."


def find_ref(tree: Any, given: Any, cells: Mapping[Path, Ref[Any]]) -> tuple[Path, Ref[Any]]:
    """The Ref at a path, and its canonical path.

    Args:
      tree: the tree.
      given: a tuple of strings or their dotted form. It may be any path of a shared Ref.
      cells: the result of `refs(tree)`.

    Raises:
      UnknownPathError: there is no Ref. The message says what there is.
    """
    if type(given) is tuple and given in cells:
        return given, cells[given]
    path = as_path(given)
    if isinstance(given, str) and path not in cells:
        # A dict key may contain a dot.
        path = next((p for p in cells if dotted(p) == given), path)
    if path in cells:
        return path, cells[path]
    at = follow(tree, path)
    if isinstance(at, Ref):
        return next(p for p, cell in cells.items() if cell is at), at
    if path in snapshot(tree).dagdef.leaf_paths:
        raise UnknownPathError(
            f"Path {dotted(path)!r} is a plain array attribute, not a Ref. Assign to the attribute, or "
            f"make it a Ref: a param() or ref() field, or {ours('Ref')}(...)."
        )
    close = [p for p in cells if path and p and p[-1] == path[-1]] or list(cells)
    raise UnknownPathError(
        f"The tree has no Ref at path {dotted(path)!r}; it has {listed(close)}. Is the partition from "
        f"another model, or from before a layer was replaced? To use only the part that fits, pass "
        f"{{path: value for path, value in partition.items() if path in {ours('refs')}(model)}}."
    )


def _check_like(path: Path, cell: Ref[Any], new: Any, strict: bool) -> None:
    check_value(cell, new)
    if not strict:
        return
    old = peek(cell)
    if isinstance(old, jax.Array) and isinstance(new, jax.Array):
        if old.shape == new.shape and old.dtype == new.dtype:
            return
    where = f"path {dotted(path)!r} (collection {cell._collection!r})"
    old_leaves, old_tree = jax.tree.flatten(old)
    new_leaves, new_tree = jax.tree.flatten(new)
    if old_tree != new_tree:
        raise ValueTypeError(
            f"The value at {where} has the structure {old_tree}, but the new one has {new_tree}. "
            f"Pass a value of that structure, or strict=False to replace it."
        )
    for a, b in zip(old_leaves, new_leaves, strict=True):
        if np.shape(a) != np.shape(b):
            raise ShapeError(
                f"The value at {where} has shape {np.shape(a)}, but the new one has {np.shape(b)}. "
                f"Pass a value of that shape, or use {ours('update')}(..., strict=False) to replace it."
            )
        new_dtype = getattr(b, "dtype", None) or jnp.result_type(b)
        if new_dtype not in (getattr(a, "dtype", None), dtype_of(a)):
            raise DtypeError(
                f"The value at {where} has dtype {dtype_of(a)}, but the new one has {new_dtype}. Cast "
                f"it with value.astype({str(dtype_of(a))!r}), or use {ours('update')}(..., strict=False) to "
                f"change the dtype."
            )


def dtype_of(x: Any) -> Any:
    """The dtype of a value in JAX. For example, JAX computes with NumPy's float64 in float32."""
    if isinstance(x, np.ndarray | np.generic) and jnp.issubdtype(x.dtype, jnp.number):
        return jax.dtypes.canonicalize_dtype(x.dtype)
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
