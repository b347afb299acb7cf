"""Axes, shardings and other specifications for values, given by argument, by prefix, or by filter.

A specification is a pytree prefix of the arguments, as in JAX. For a module or a Ref it may be a dict
from filter to specification, and the first filter that selects a Ref decides:
`nnx.vmap(f, in_axes=({"params": 0, ...: None}, 0))`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple, TypeGuard

import jax

from nnx.transforms.boundary import run
from nnx.transforms.call import Call, Place, Values
from nnx.transforms.layout import Layout
from nnx.transforms.naming import named
from nnx.transforms.result import NewValues, Packed
from refx import Ref, RefError, opened
from refx.filters import to_predicate, to_predicates
from refx.node import is_array, is_identity
from refx.partition import Partition, Path, dotted
from refx.selection import check_selection
from refx.snapshot import snapshot

__all__ = ["AxisError"]


class AxisError(RefError, ValueError):
    """Axes do not fit the arguments, each other, or the written values."""


class Specs(NamedTuple):
    """A specification for each value of a call, and for each argument that is a module or a Ref."""

    values: Values
    roots: list[Any]


class ByFilter:
    """A dict from filter to specification, and a default for values that no filter selects."""

    def __init__(self, rules: dict[Any, Any], default: Any):
        self.rules = rules
        self.default = default


UNSET: Any = object()


def assign(
    call: Call,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    specs: Any,
    *,
    name: str,
    keyword: Any,
    ambient: Callable[[Path, Any], Any],
) -> Specs:
    """Give each value of a call its specification.

    Args:
      call: the opened call of these arguments.
      args: the positional arguments.
      kwargs: the keyword arguments.
      specs: a specification for all arguments, or a tuple or list with one for each.
      name: the transformation, for messages.
      keyword: the specification of every keyword argument.
      ambient: returns the specification for Refs outside the arguments: closed-over roots and the scope.

    Raises:
      AxisError: the prefix does not fit, or one Ref gets two different specifications.
      FilterError: a filter selects nothing by mistake; see `refx.get_partition`.
    """
    if isinstance(specs, list | tuple) and not _is_spec(specs):
        if len(specs) != len(args):
            raise AxisError(
                f"{name} has a specification for {len(specs)} arguments, but was called with "
                f"{len(args)} positional arguments."
            )
        each = list(specs)
    else:
        each = [specs] * len(args)
    flat: list[tuple[Any, Any, str]] = []
    for i, (arg, spec) in enumerate(zip(args, each, strict=True)):
        flat += along(arg, spec, name, f"argument {i}")
    for key in sorted(kwargs):
        flat += along(kwargs[key], keyword, name, f"argument {key!r}")
    refs, arrays, _ = call.values
    result = Specs(Values([UNSET] * len(refs), [UNSET] * len(arrays), []), [])
    roots = iter(call.places())
    for x, spec, where in flat:
        if is_identity(x):
            result.roots.append(spec)
            used: set[int] = set()
            choose = _chooser(spec, name, where, used)
            _assign_root(result.values, next(roots), choose, name, where)
            rules = spec.rules if isinstance(spec, ByFilter) else spec
            for i, filter in enumerate(rules if isinstance(rules, dict) else ()):
                if i not in used:
                    check_selection(filter, x)
        elif isinstance(spec, dict):
            raise AxisError(
                f"{name} got the filters {spec!r} for {where}, which has no Refs there. Filters are for "
                f"modules and Refs; give an array its specification directly."
            )
        else:
            result.values.arguments.append(spec.default if isinstance(spec, ByFilter) else spec)
    for root in roots:
        _assign_root(result.values, root, ambient, name, "the closure of the function")
    return result


def _assign_root(
    result: Values, root: list[Place], choose: Callable[[Path, Any], Any], name: str, where: str
) -> None:
    for place in root:
        specs, i = result[place.kind], place.number
        spec = choose(place.path, place.cell)
        if specs[i] is not UNSET and specs[i] != spec:
            raise AxisError(
                f"{name} got two specifications for one shared Ref: {specs[i]!r}, and "
                f"{spec!r} as {dotted(place.path)!r} of {where}. It is one array, so give it only one."
            )
        specs[i] = spec


def _chooser(
    spec: Any, name: str, where: str, used: set[int] | None = None
) -> Callable[[Path, Any], Any]:
    """A function that returns the specification of a value. It notes in `used` which filters selected."""
    used = set() if used is None else used
    said = spec.rules if isinstance(spec, ByFilter) else spec
    if is_identity(said) or isinstance(said, Partition):
        return _chooser_by_path(said, name, where)
    if _is_rule(said):
        return said
    if not isinstance(said, dict):
        return lambda path, ref: said
    rules = list(zip(to_predicates(said), said.values(), strict=True))
    if isinstance(spec, ByFilter):
        rules.append((to_predicate(...), spec.default))

    def choose(path: Path, ref: Any) -> Any:
        for i, (predicate, chosen) in enumerate(rules):
            if predicate(path, ref):
                used.add(i)
                return chosen(path, ref) if _is_rule(chosen) else chosen
        what = f"collection {ref.collection!r}" if isinstance(ref, Ref) else "a plain array"
        raise AxisError(
            f"No filter of {name} selects {dotted(path)!r} ({what}) of {where}. Add an entry for "
            f"the rest: ... : None."
        )

    return choose


def _chooser_by_path(like: Any, name: str, where: str) -> Callable[[Path, Any], Any]:
    """A function that returns the specification at the path of a value, from a tree like the argument.

    `like` is a Partition, or a module with specifications in place of values, as from `jax.tree.map`.
    """
    kept = snapshot(like)
    said = dict(zip(kept.dagdef.ref_paths, [ref._value for ref in kept.refs], strict=True))
    said |= zip(kept.dagdef.leaf_paths, kept.leaves(), strict=True)
    if isinstance(like, Partition):
        said = dict(like.items())

    def choose(path: Path, ref: Any) -> Any:
        if path not in said:
            raise AxisError(
                f"{name} got a {type(like).__name__} of specifications for {where}, which has none "
                f"for {dotted(path)!r}. Make it from the argument, for example with jax.tree.map, or use "
                f"a dict from filter to specification."
            )
        return said[path]

    return choose


def _is_rule(said: Any) -> TypeGuard[Callable[[Path, Any], Any]]:
    """Whether this is a function of path and Ref, such as `nnx.fsdp("data")`."""
    return callable(said) and not isinstance(said, type) and not is_identity(said)


def _is_spec(x: Any) -> bool:
    # In some versions of JAX, a PartitionSpec is a tuple.
    return isinstance(x, jax.sharding.PartitionSpec)


def along(arg: Any, spec: Any, name: str, where: str) -> list[tuple[Any, Any, str]]:
    """The leaves of an argument, including modules and Refs, each with its specification."""
    prefix = isinstance(spec, dict | list | tuple | Partition) and not _is_spec(spec)
    whole = is_identity(arg) or not prefix
    # A dict is a prefix of a dict with the same keys; anywhere else its keys are filters.
    filters = isinstance(spec, dict) and not (isinstance(arg, dict) and set(arg) == set(spec))
    if whole or filters:
        return [(x, spec, where) for x in opened.leaves(arg)]
    children, treedef = jax.tree.flatten(arg, is_leaf=lambda x: x is not arg)
    parts, spec_def = jax.tree.flatten(spec, is_leaf=lambda x: x is not spec)
    if treedef != spec_def:
        raise AxisError(
            f"{name} got {spec!r} for {where}, which is not a prefix of it: {where} is a "
            f"{type(arg).__name__} with {len(children)} items."
        )
    return [
        leaf
        for child, part in zip(children, parts, strict=True)
        for leaf in along(child, part, name, where)
    ]


def along_output(out: Any, spec: Any, name: str) -> list[Any]:
    """A specification for each leaf of an output without Refs."""
    return [s for _, s, _ in along(out, spec, name, "the output")]


def of_new(path: Path, ref: Any, spec: Any, name: str) -> Any:
    """The specification of a new Ref or array at `path` of an output that holds Refs."""
    rest = path
    while rest and isinstance(spec, list | tuple | dict) and not _is_spec(spec):
        if isinstance(spec, dict):
            if rest[0] not in spec or not all(isinstance(k, str) for k in spec):
                break
            spec = spec[rest[0]]
        elif rest[0].isdecimal() and int(rest[0]) < len(spec):
            spec = spec[int(rest[0])]
        else:
            raise AxisError(
                f"{name} got {spec!r} for the output, but that has another structure: it holds "
                f"{dotted(path)!r}. For a module or a Ref, write {{...: {spec!r}}}."
            )
        rest = rest[1:]
    return _chooser(spec, name, "the output")(rest, ref)


def length(
    call: Call, specs: Specs, given: int | None, name: str, axis_of: Callable[[Any], int | None]
) -> int:
    """The size of the mapped axis, which must be the same for all mapped values.

    Raises:
      AxisError: there are two sizes, an array does not have the axis, or no value is mapped.
    """
    sizes: dict[int, str] = {} if given is None else {given: "the size argument"}
    names = Values(
        [dotted(p[1:]) or "a Ref" for p in call.layout.dagdef.ref_paths],
        [dotted(p[1:]) for p in call.layout.dagdef.leaf_paths],
        ["an array argument"] * len(call.values.arguments),
    )
    for value, spec, what in zip(
        *map(chain.from_iterable, (call.values, specs.values, names)), strict=True
    ):
        axis = axis_of(spec)
        if axis is None:
            continue
        for x in jax.tree.leaves(value):
            shape = x.shape if is_array(x) else ()
            if not -len(shape) <= axis < len(shape):
                raise AxisError(
                    f"{name} cannot map axis {axis} of {what!r}, whose shape is {shape}. Give it "
                    f"the axis None, or an axis that it has."
                )
            sizes.setdefault(shape[axis], f"{what!r}, of shape {shape}, along axis {axis}")
    if len(sizes) > 1:
        (a, what_a), (b, what_b), *_ = sizes.items()
        raise AxisError(f"{name} got two sizes to map over: {a} of {what_a} and {b} of {what_b}.")
    if not sizes:
        raise AxisError(
            f"{name} has nothing to map over: no argument has an axis. Give an argument an axis, or pass "
            f"the size (axis_size= of nnx.vmap, length= of nnx.scan)."
        )
    return next(iter(sizes))


class GroupedOutput:
    """Groups the results of a body by specification, because only the trace tells which Refs it writes.

    `keys` is known before the trace: all specifications that were given, and a default. `pure` returns a
    list of arrays for each key, so `keys` is a prefix of its result. `packed` joins the lists again.
    """

    def __init__(
        self,
        name: str,
        call: Call,
        specs: Specs,
        out_specs: Any,
        default: Any,
        kind: type,
        *,
        layout: Layout | None = None,
    ):
        """`layout` is the static part of the call inside the body. The default is that of `call`."""
        self._name = name
        self._call = call
        self._layout = layout
        self._specs = specs
        self._out_specs = out_specs
        self.keys = tuple(dict.fromkeys([default, *_said([*specs, out_specs], kind)]))
        # The specification of each new Ref.
        self.of_new: list[Any] = []

    def pure(
        self, fn: Callable[..., Any], check: Callable[[Packed, tuple[list[Any], ...]], None]
    ) -> Callable[[Values], tuple[list[Any], ...]]:
        """The pure function of `fn`. `check` is called with its result."""

        def finish(packed: Packed, outline: NewValues) -> tuple[list[Any], ...]:
            groups = self._grouped(packed, outline)
            check(packed, groups)
            return groups

        def pure(values: Values) -> tuple[list[Any], ...]:
            options = {"layout": self._layout, "mode": "read", "finish": finish}
            return run(fn, self._name, self._call, values, **options)

        return named(pure, fn, self._call)

    def _grouped(self, packed: Packed, outline: NewValues) -> tuple[list[Any], ...]:
        if packed.spec.graph is None:
            specs = along_output(packed.out, self._out_specs, self._name)
        else:
            specs = [
                self._of_new(path, x)
                for path, x in (*outline.new, *outline.arrays)
                for _ in jax.tree.leaves(x.value if isinstance(x, Ref) else x)
            ]
        self.of_new = [self._of_new(path, x) for path, x in outline.new]
        for i, value in zip(packed.spec.written, packed.written, strict=True):
            specs += [self._specs.values.refs[i]] * len(jax.tree.leaves(value))
        leaves, self._treedef = jax.tree.flatten(packed)
        self._order = [self.keys.index(spec) for spec in specs]
        groups: tuple[list[Any], ...] = tuple([] for _ in self.keys)
        for leaf, group in zip(leaves, self._order, strict=True):
            groups[group].append(leaf)
        return groups

    def packed(self, results: tuple[list[Any], ...]) -> Packed:
        todo = [iter(group) for group in results]
        return jax.tree.unflatten(self._treedef, [next(todo[i]) for i in self._order])

    def _of_new(self, path: Path, x: Any) -> Any:
        if path[0] == "1":
            return of_new(path[1:], x, self._out_specs, self._name)
        # It was added to a root: use the root's specification.
        root = int(path[1])
        spec = self._specs.roots[root] if root < len(self._specs.roots) else self.keys[0]
        return of_new(path[2:], x, spec, self._name)


def _said(spec: Any, kind: type) -> Iterator[Any]:
    if isinstance(spec, kind):
        yield spec
    elif isinstance(spec, ByFilter):
        yield from _said([spec.rules, spec.default], kind)
    elif isinstance(spec, dict | list | tuple):
        for part in spec.values() if isinstance(spec, dict) else spec:
            yield from _said(part, kind)
