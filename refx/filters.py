"""Filters select Refs by collection, by path, by type, or by any combination of these.

A filter is a collection name (or any other hashable label), a tuple of filters (any of them), `...`
(everything), `None` (nothing), a callable `(path, ref) -> bool`, or one of the combinators here. A
plain array attribute has no Ref. Its `ref` is the array itself, and no collection selects it.
"""

from __future__ import annotations

import fnmatch
import types
import typing
from collections.abc import Callable, Hashable, Iterable

from refx.errors import FilterError
from refx.node import Node
from refx.partition import Name, Partition
from refx.ref import Ref
from refx.text import ours

__all__ = [
    "All",
    "Any",
    "Filter",
    "InModule",
    "Not",
    "OfType",
    "PathContains",
    "PathMatches",
    "to_predicate",
]

Path = tuple[str, ...]
Predicate = Callable[[Path, object], bool]
Filter = typing.Any  # a label, a tuple, ..., None, a callable: no narrower type covers all of these


def to_predicate(filter: Filter) -> Predicate:
    """Turn a filter into a function `(path, ref) -> bool`.

    Raises:
      FilterError: the value is not a filter, but a list, a dict or an array.

    >>> import refx
    >>> selects = refx.to_predicate(("params", refx.PathContains("bn")))
    >>> selects(("bn", "mean"), refx.Ref(0.0, "batch_stats"))
    True
    """
    if filter is ...:
        return lambda path, ref: True
    if filter is None:
        return lambda path, ref: False
    if isinstance(filter, tuple):
        return Any(*filter)
    if isinstance(filter, (Ref, Node, Partition)):
        raise FilterError(
            f"A {type(filter).__name__} is not a filter. The tree comes first, and then the filter: "
            f"{_FILTERS}."
        )
    if isinstance(filter, type):
        how = f"To select by the type of values, use OfType({filter.__name__})."
        if issubclass(filter, Node):
            how = by_module(filter)
        raise FilterError(f"{filter.__name__} is a class, not a filter. {how}")
    if callable(filter):
        return typing.cast(Predicate, filter)
    if isinstance(filter, slice):
        raise FilterError(
            f"{filter!r} is not a filter. To take parts by number, slice the list that holds them: "
            f"model.layers[1:3]."
        )
    try:
        hash(filter)
    except TypeError:
        raise FilterError(
            f"{filter!r:.200} is not a filter. A filter is {_FILTERS}. To combine filters, use a tuple "
            f"instead of a list."
        ) from None
    return _InCollection(filter)


_FILTERS = (
    "a collection name, a tuple of filters (any of), ..., None, a callable (path, ref) -> bool, or "
    "All, Any, Not, InModule, PathContains, PathMatches, OfType"
)


def to_predicates(filters: Iterable[Filter]) -> list[Predicate]:
    """Turn filters into predicates. A Ref belongs to the first filter that selects it.

    Raises:
      FilterError: a filter can never select anything, because earlier filters take all that it would:
        it comes after `...`, or it was given before.
    """
    filters = list(filters)
    predicates = [to_predicate(f) for f in filters]
    for i, filter in enumerate(filters[1:], 1):
        known = [x for f in filters[:i] for x in _alternatives(f)]
        if any(map(_is_everything, known)):
            why = "the filters before it take everything. Put ... last"
        elif filter is not ... and _alternatives(filter) and _covers(known, filter):
            why = "the filters before it take everything that it selects. Leave it out"
        else:
            continue
        raise FilterError(
            f"The filter {_shown(filter)} can never select anything: each Ref goes to the first filter "
            f"that selects it, and {why}. The filters are {', '.join(map(_shown, filters))}."
        )
    return predicates


def _alternatives(filter: Filter) -> list[Filter]:
    """A flat list of the filters of which any may select. It is empty for a filter that selects nothing."""
    if isinstance(filter, tuple | Any):
        parts = filter if isinstance(filter, tuple) else filter.filters
        return [x for part in parts for x in _alternatives(part)]
    return [] if filter is None else [filter]


def _is_everything(filter: Filter) -> bool:
    if isinstance(filter, tuple | Any):
        return any(map(_is_everything, _alternatives(filter)))
    if isinstance(filter, All):
        return all(map(_is_everything, filter.filters))
    return filter is ... or (isinstance(filter, Not) and not _alternatives(filter.filters[0]))


def _covers(known: list[Filter], filter: Filter) -> bool:
    """Whether some filters together certainly select everything that `filter` selects."""
    # A filter and its opposite leave nothing for other filters.
    opposites = (f.filters[0] for f in known if isinstance(f, Not))
    return any(_is_within(f, known) for f in opposites) or _is_within(filter, known)


def _is_within(filter: Filter, known: list[Filter]) -> bool:
    return all(
        any(x is f or (type(x) is type(f) and bool(x == f)) for f in known)
        or (isinstance(x, All) and any(_is_within(part, known) for part in x.filters))
        for x in _alternatives(filter)
    )


def _shown(filter: Filter) -> str:
    return "..." if filter is ... else repr(filter)


def by_module(kind: type) -> str:
    """For a message: what to write instead of using a class of modules as a filter."""
    return (
        f"Filters see Refs, their values and their paths, but not a {kind.__name__}. Select its contents "
        f"with {ours('InModule')}({kind.__name__}), or by path, as in {ours('PathMatches')}('encoder.**') "
        f"or {ours('PathContains')}('encoder'), or take the values of the module itself: "
        f"model.encoder['params']."
    )


def selects_nothing(filter: Filter) -> bool:
    """Whether a filter is None, or is made of Nones only."""
    return not _alternatives(filter)


def reads_paths(filter: Filter) -> bool:
    """Whether the result of a filter can depend on the path, which some callers do not have."""
    if isinstance(filter, tuple):
        return any(map(reads_paths, filter))
    if isinstance(filter, (All, Any, Not)):
        return any(map(reads_paths, filter.predicates))
    return callable(filter) and not isinstance(filter, (OfType, _InCollection, type))


class _InCollection:
    def __init__(self, collection: Hashable):
        self.collection = collection

    def __call__(self, path: Path, ref: object) -> bool:
        return isinstance(ref, Ref) and ref._collection == self.collection

    def __repr__(self) -> str:
        return repr(self.collection)


class _Selector:
    """A filter made from other values. Equal selectors select the same Refs and share programs."""

    def __init__(self, *given: typing.Any):
        self._given = given

    def __call__(self, path: Path, ref: object) -> bool:
        raise NotImplementedError  # pragma: no cover

    def __repr__(self) -> str:
        given = [x.__name__ if isinstance(x, type) else repr(x) for x in self._given]
        return f"{type(self).__name__}({', '.join(given)})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._given == self._given

    def __hash__(self) -> int:
        return hash((type(self), self._given))


class _Combinator(_Selector):
    def __init__(self, *filters: Filter):
        super().__init__(*filters)
        self.filters = filters
        self.predicates = tuple(map(to_predicate, filters))


class Any(_Combinator):
    """Selects a Ref if at least one of the filters does. `Any()` selects nothing.

    >>> import refx
    >>> refx.Any("params", "batch_stats")
    Any('params', 'batch_stats')
    """

    def __call__(self, path: Path, ref: object) -> bool:
        return any(p(path, ref) for p in self.predicates)


class All(_Combinator):
    """Selects a Ref if all of the filters do. `All()` selects everything.

    >>> import refx
    >>> trunk = refx.All("params", refx.Not(refx.PathContains("head")))
    >>> trunk(("head", "kernel"), refx.Ref(0.0, "params"))
    False
    """

    def __call__(self, path: Path, ref: object) -> bool:
        return all(p(path, ref) for p in self.predicates)


class Not(_Combinator):
    """Selects a Ref if the filter does not.

    >>> import refx
    >>> refx.Not("params")(("count",), refx.Ref(0, "counters"))
    True
    """

    def __init__(self, filter: Filter):
        super().__init__(filter)

    def __call__(self, path: Path, ref: object) -> bool:
        return not self.predicates[0](path, ref)


class PathContains(_Selector):
    """Selects by path: some component equals `part`, or matches it as a glob (`*`, `?`, `[a-z]`).

    Components joined by dots, as in `"blocks.0"`, match that many consecutive components.

    >>> import refx
    >>> path = ("blocks", "0", "bn1", "scale")
    >>> refx.PathContains("bn*")(path, None), refx.PathContains("blocks.0")(path, None)
    (True, True)
    """

    def __init__(self, part: str):
        if not isinstance(part, str):
            raise FilterError(
                f"PathContains takes a string (one component of a path, or several joined by dots), "
                f"but got {part!r}."
            )
        super().__init__(part)
        self.part = part
        self._parts = tuple(part.split("."))

    def __call__(self, path: Path, ref: object) -> bool:
        # A dict key may contain a dot.
        return any(fnmatch.fnmatchcase(name, self.part) for name in path) or (
            len(self._parts) > 1 and _matches(("**", *self._parts, "**"), path)
        )


class PathMatches(_Selector):
    """Selects by path: the whole path matches a glob such as `"blocks.*.attention.**"`.

    `*`, `?` and `[a-z]` match within one component. The component `**` matches any number of components.

    >>> import refx
    >>> kernels = refx.PathMatches("blocks.[01].**.kernel")
    >>> kernels(("blocks", "0", "mlp", "up", "kernel"), None), kernels(("head", "kernel"), None)
    (True, False)
    """

    def __init__(self, glob: str):
        if not isinstance(glob, str):
            raise FilterError(
                f"PathMatches takes a string (a glob for a dotted path), but got {glob!r}."
            )
        super().__init__(glob)
        self.glob = glob
        self._parts = tuple(glob.split(".")) if glob else ()

    def __call__(self, path: Path, ref: object) -> bool:
        return _matches(self._parts, path)


def _matches(parts: Path, path: Path) -> bool:
    if not parts:
        return not path
    if parts[0] == "**":
        return any(_matches(parts[1:], path[i:]) for i in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], parts[0]) and _matches(parts[1:], path[1:])


class _ByClass(_Selector):
    _takes = "a class"

    def __init__(self, kind: type | types.UnionType | tuple[typing.Any, ...]):
        kinds: typing.Any = kind if isinstance(kind, tuple) else typing.get_args(kind) or (kind,)
        if not kinds or not all(isinstance(k, type) for k in kinds):
            raise FilterError(
                f"{type(self).__name__} takes {self._takes}, or a tuple of classes, but got {kind!r:.80}."
            )
        super().__init__(*kinds)
        self.kind = kinds[0] if len(kinds) == 1 else kinds
        self.kinds: tuple[type, ...] = kinds


class InModule(_ByClass):
    """Selects the Refs in modules of a class, including those in their parts.

    Instances of subclasses count as well. A shared Ref belongs to the modules along its path, which is
    the first of its paths. The class need not be a module's: that of a pytree works too.

    >>> import refx
    >>> class Norm(refx.Node):
    ...     def __init__(self):
    ...         self.scale = refx.Ref(1.0, "params")
    >>> tree = {"w": refx.Ref(2.0, "params"), "norm": Norm()}
    >>> refx.get_partition(tree, refx.InModule(Norm))
    Partition({
      'norm.scale': 1.0,
    })
    """

    _takes = "the class of a module"

    def __call__(self, path: Path, ref: object) -> bool:
        return any(isinstance(n, Name) and issubclass(n.owner, self.kinds) for n in path)


class OfType(_ByClass):
    """Selects by type: the value of the Ref, or the plain array, is an instance of the class.

    >>> import jax, refx
    >>> refx.OfType(int)((), refx.Ref(0))
    True
    """

    def __call__(self, path: Path, ref: object) -> bool:
        return isinstance(ref._value if isinstance(ref, Ref) else ref, self.kinds)
