"""Filters that select nothing: tell a mistake from a collection that a tree happens to lack."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import numpy as np

from refx import filters
from refx.errors import FilterError
from refx.filters import Filter, InModule, OfType, PathMatches, by_module
from refx.node import Node, attributes
from refx.partition import Partition, Path, as_path
from refx.ref import Ref
from refx.snapshot import snapshot
from refx.text import ALTERNATIVES, ours

__all__: list[str] = []


def check_selection(filter: Filter, *trees: Any) -> None:
    """Raise if a filter that selects nothing in some trees is a mistake.

    Raises:
      FilterError: it is a number, a path or a misspelled collection. The message says what to write.
    """
    problem = mistake(filter, *trees)
    if problem is not None:
        raise FilterError(problem)


def mistake(filter: Filter, *trees: Any) -> str | None:
    """The message for a filter that selects nothing by mistake; None if it may be intended.

    A collection that the tree lacks is not a mistake: a loop over collections must work for all models.
    """
    if isinstance(filter, tuple | filters.Any | filters.All):
        parts = filter if isinstance(filter, tuple) else filter.filters
        return next((text for part in parts if (text := mistake(part, *trees))), None)
    if isinstance(filter, OfType):
        module = next((kind for kind in filter.kinds if issubclass(kind, Node)), None)
        return None if module is None else f"{filter!r} selects nothing. {by_module(module)}"
    if isinstance(filter, InModule) and trees and all(isinstance(t, Partition) for t in trees):
        return (
            f"A Partition does not know its modules, so the filter {filter!r} selects nothing in it. Apply "
            f"it to the model: model[{filter!r}]{ALTERNATIVES['mask'].format(filter)}."
        )
    if filter is None or filter is ... or isinstance(filter, bool) or callable(filter):
        return None
    if trees and all(isinstance(tree, Partition) for tree in trees):
        return (
            f"The values of a Partition have no collection, so the filter {filter!r} selects none. "
            f"Take the partition of the model, model[{filter!r}], or select by path, for example with "
            f"PathContains."
        )
    there = {ref._collection for tree in trees for ref in snapshot(tree).refs}
    if filter in there:
        return None
    if isinstance(filter, int | np.integer):
        return _number(filter, trees)
    if not isinstance(filter, str) or not filter:
        return None
    for tree in trees:
        if (problem := _path(filter, tree)) is not None:
            return problem
    # A name that adds a word to another, such as params_ema, is not a misspelling.
    words = f"_{filter}_"
    others = [c for c in there if isinstance(c, str) and f"_{c}_" not in words]
    others = [c for c in others if words not in f"_{c}_"]
    for close in difflib.get_close_matches(filter, others, 1, 0.75):
        return f"There is no collection {filter!r} here; did you mean {close!r}?"
    return None


def _number(number: Any, trees: tuple[Any, ...]) -> str:
    holders = [
        f"model.{name}"
        for tree in trees
        if isinstance(tree, Node)
        for name, value in attributes(tree).items()
        if isinstance(value, list | tuple) and any(isinstance(x, Node | Ref) for x in value)
    ]
    return (
        f"A filter selects Refs, and {number!r} is not a collection here. To take a part by its number, "
        f"index the list that holds it: {holders[0] if holders else 'model.layers'}[{number!r}]."
    )


def _path(name: str, tree: Any) -> str | None:
    """The message for a string that is the path of a module, a Ref or an array in the tree."""
    paths = snapshot(tree).dagdef.paths
    found = follow(tree, as_path(name))
    matching = (glob for glob in (name, f"{name}.**") if _matches_any(glob, paths))
    glob = name if isinstance(found, Ref) else next(matching, None)
    if glob is None and not isinstance(found, Node):
        return None
    ways = [] if glob is None else [f"{ours('PathMatches')}({glob!r}) selects by path"]
    if found is not None:
        parts = (f"[{p}]" if p.isdecimal() else f".{p}" for p in name.split("."))
        ways.append(f"model{''.join(parts)} goes there")
    return f"{name!r} is a path here, but a string selects a collection: {', and '.join(ways)}."


def _matches_any(glob: str, paths: tuple[Path, ...]) -> bool:
    matches = PathMatches(glob)
    return any(matches(path, None) for path in paths)


def follow(tree: Any, path: Iterable[str]) -> Any:
    """The object at a path, which need not be its first path; None if there is none."""
    for name in path:
        if isinstance(tree, Node):
            tree = attributes(tree).get(name)
        elif isinstance(tree, dict):
            tree = next((x for key, x in tree.items() if str(key) == name), None)
        elif isinstance(tree, list | tuple) and name.isdecimal() and int(name) < len(tree):
            tree = tree[int(name)]
        else:
            return None
    return tree
