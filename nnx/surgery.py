"""`nnx.modules` and `nnx.replace`: find the modules of a tree, and put others in their place."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax

from nnx.module import Module
from refx import All, Filter, FilterError, Node, Not, PathMatches, to_predicate
from refx import Any as AnyOf
from refx.dagdef import node_paths
from refx.node import attributes, is_identity
from refx.partition import Path, dotted
from refx.selection import follow
from refx.walk import walk

__all__ = ["modules", "replace"]

M = TypeVar("M")
N = TypeVar("N", bound=Node)

Where = Filter
"""What selects modules: a class, a glob over paths, a predicate `(path, module)`, a tuple of them."""


def modules(tree: Any, kind: type[N] = Module) -> dict[Path, N]:
    """The modules of a tree by path, each once: a shared one has its first path.

    Args:
      tree: a module, or any pytree of modules.
      kind: a class; only its instances count.

    Returns:
      A dict from path to module, parents before their children. The tree itself is at `()`.

    >>> import nnx
    >>> with nnx.scope(0):
    ...     model = nnx.Sequential(nnx.Linear(2, 8), nnx.relu, nnx.Linear(8, 1))
    >>> [".".join(path) for path in nnx.modules(model, nnx.Linear)]
    ['layers.0', 'layers.2']
    """
    found = walk(tree)
    paths = node_paths(found.dagdef)
    return {paths[i]: x for i, x in enumerate(found.objects) if isinstance(x, kind)}


def selector(where: Where) -> Callable[[Path, Any], bool]:
    """A predicate `(path, module)` for what selects modules; a string is a glob over paths.

    Raises:
      FilterError: `where` cannot select modules.
    """
    if isinstance(where, str):
        return PathMatches(where)
    if isinstance(where, type):
        return lambda path, module: isinstance(module, where)
    if isinstance(where, tuple):
        return AnyOf(*map(selector, where))
    if isinstance(where, (All, AnyOf, Not)):
        return type(where)(*map(selector, where.filters))
    if where is ... or where is None or callable(where):
        return to_predicate(where)
    raise FilterError(
        f"{where!r} does not select modules. Give a class, a glob over their paths such as "
        f"'blocks.*.mlp' ('**' for any number of names), a predicate (path, module) -> bool, or a "
        f"tuple of these."
    )


def listed_modules(paths: Iterable[Path], most: int = 12) -> str:
    """Paths for a message."""
    names = [dotted(path) or "'' (the model)" for path in paths]
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def replace(tree: M, where: Where, fn: Callable[[Any], Any]) -> M:
    """Put `fn(module)` in the place of every module that `where` selects, in place.

    `fn` is called once for each module, for the inner ones before those that hold them. What it
    returns comes in all places of the module: attributes, lists, tuples, dicts, bound methods.
    Unlike a copy, everything else stays the same object. If `fn` raises, nothing has changed.

    Args:
      tree: a module, or any pytree of modules.
      where: which modules: a class, a glob over their paths such as `"blocks.*.mlp"` (`*` is one
        name, `**` any number), a predicate `(path, module) -> bool`, or a tuple of these.
      fn: makes the new one, a module or any callable, of the old one. It may return that one.

    Returns:
      The tree; or the new module, where the tree itself is selected.

    Raises:
      FilterError: `where` selects no module; the message lists them.
      TypeError: `fn` returned None.
      TraceLevelError: in a transformation that the module was made outside of.

    >>> import jax, nnx
    >>> with nnx.scope(0):
    ...     model = nnx.Sequential(nnx.Linear(2, 8), nnx.relu, nnx.Linear(8, 1))
    >>> model = nnx.replace(model, nnx.Linear, nnx.Remat)
    >>> model.layers
    [Remat(
      fn = Linear(
    ...
    """
    there, selects = modules(tree), selector(where)
    chosen = [(path, x) for path, x in there.items() if selects(path, x)]
    if not chosen and isinstance(where, str):
        # A shared module has other paths than its first.
        other = follow(tree, where.split("."))
        chosen = [(path, x) for path, x in there.items() if x is other]
    if not chosen:
        raise FilterError(
            f"nnx.replace selects no module of {type(tree).__name__} with {where!r}. Its modules "
            f"are: {listed_modules(there)}."
        )
    places = _places(walk(tree).containers, {id(module) for _, module in chosen})
    undo: list[tuple[Any, Any, Any]] = []
    root: Any = tree
    try:
        for path, module in _inner_first(chosen):
            new = fn(module)
            if new is None:
                raise TypeError(
                    f"nnx.replace put nothing in the place of {dotted(path)!r}: fn returned None. "
                    f"Return the new module, or the old one."
                )
            for container, key in places.get(id(module), ()):
                old = _get(container, key)
                undo.append((container, key, old))
                _set(container, key, _substituted(old, module, new))
            root = _substituted(root, module, new)
    except BaseException:
        for container, key, old in reversed(undo):
            _set(container, key, old)
        raise
    return root


def _inner_first(found: list[tuple[Path, Any]]) -> list[tuple[Path, Any]]:
    """Modules with those that they hold before them; they come with these after them."""
    done: list[tuple[Path, Any]] = []
    around: list[tuple[Path, Any]] = []
    for path, module in found:
        while around and around[-1][0] != path[: len(around[-1][0])]:
            done.append(around.pop())
        around.append((path, module))
    return done + around[::-1]


def _places(containers: list[Any], chosen: set[int]) -> dict[int, list[tuple[Any, Any]]]:
    """By the id of a module, the containers that hold it, and where."""
    places: dict[int, list[tuple[Any, Any]]] = {}
    for container in containers:
        content = attributes(container) if isinstance(container, Node) else container
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            for part in {id(part) for part in jax.tree.leaves(value, is_leaf=_is_part)} & chosen:
                places.setdefault(part, []).append((container, key))
    return places


def _is_part(x: Any) -> bool:
    # Lists and dicts are containers themselves.
    return is_identity(x) or type(x) is list or type(x) is dict


def _get(container: Any, key: Any) -> Any:
    return attributes(container)[key] if isinstance(container, Node) else container[key]


def _set(container: Any, key: Any, value: Any) -> None:
    if isinstance(container, Node):
        setattr(container, key, value)
    else:
        container[key] = value


def _substituted(x: Any, old: Any, new: Any) -> Any:
    """`x` with one object in the place of another, inside of tuples and other pytrees too."""
    if x is old:
        return new
    if _is_part(x):
        return x
    if isinstance(x, types.MethodType):
        # The class of the new one may have another method of that name.
        return getattr(new, x.__func__.__name__) if x.__self__ is old else x
    parts, treedef = jax.tree.flatten(x, is_leaf=lambda part: part is not x)
    if len(parts) == 1 and parts[0] is x:
        return x
    changed = [_substituted(part, old, new) for part in parts]
    if all(a is b for a, b in zip(parts, changed, strict=True)):
        return x
    return jax.tree.unflatten(treedef, changed)
