"""`mutable`: a context that limits what may be written."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from refx.dag import refs
from refx.dagdef import node_paths
from refx.errors import FilterError, NotMutableError
from refx.filters import Filter, reads_paths, selects_nothing, to_predicate
from refx.frame import local
from refx.node import Node
from refx.partition import dotted
from refx.ref import Ref
from refx.selection import check_selection
from refx.snapshot import Contents
from refx.walk import contents, walk

__all__ = ["mutable"]


@contextlib.contextmanager
def mutable(filter: Filter, tree: Any = None) -> Iterator[None]:
    """Within this context only the Refs that the filter selects may be written.

    With a filter that selects nothing, such as None, modules may not change either: setting or
    deleting an attribute is an error, and with `tree` so is a list or a dict in it that is not what
    it was at the end. Modules and Refs that are made within the context may be changed.

    Args:
      filter: any filter. One that looks at paths (a callable, `PathContains`) needs `tree`.
      tree: limits only the Refs and the modules of this tree; without it, all of them.

    Raises:
      NotMutableError: at the write of a Ref that the filter does not select; where nothing may be
        changed, also at the change of an attribute, or at the end for a list or a dict.
      FilterError: the filter looks at paths and there is no tree to take them from; or it selects
        nothing of the tree, by a mistake that `get_partition` would report too.

    >>> import refx
    >>> w, n = refx.Ref(1.0, "params"), refx.Ref(0, "counters")
    >>> with refx.mutable("counters"):
    ...     n.value += 1
    ...     try:
    ...         w.value = 2.0
    ...     except refx.NotMutableError as error:
    ...         print(str(error)[:44])
    A Ref (collection 'params', 1.0) was written
    """
    predicate = to_predicate(filter)
    if tree is None and reads_paths(filter):
        raise FilterError(
            f"The filter {filter!r} looks at paths, so mutable needs the tree to take them from: "
            f"mutable(filter, tree=model)."
        )
    paths = None if tree is None else {cell: path for path, cell in refs(tree).items()}
    if paths is not None and not any(predicate(path, cell) for cell, path in paths.items()):
        check_selection(filter, tree)
    outer = local.allowed
    frozen = _frozen(tree) if selects_nothing(filter) else contextlib.nullcontext(_nothing)

    def allowed(cell: Ref[Any]) -> bool:
        if outer is not None and not outer(cell):
            return False
        if paths is None:
            return predicate((), cell) or is_new(cell)
        path = paths.get(cell)
        return path is None or predicate(path, cell)

    try:
        with frozen as is_new:
            local.allowed = allowed
            yield
    finally:
        local.allowed = outer


def _nothing(x: Any) -> bool:
    return False


@contextlib.contextmanager
def _frozen(tree: Any) -> Iterator[Callable[[Any], bool]]:
    """Within this context the modules of a tree, or all that there are now, may not change.

    It gives a function that says of a Ref or a module whether it was made within.
    """
    outer, made = local.fixed, local.made
    # By id, since a class may have a hash of its own; weakly, since those of a body hold tracers.
    new: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
    content = None if tree is None else _Content(tree)

    def is_new(x: Any) -> bool:
        return new.get(id(x)) is x

    def is_fixed(node: Node) -> bool:
        return content.holds(node) if content is not None else not is_new(node)

    local.made = (*made, new)
    local.fixed = lambda node: is_fixed(node) or (outer is not None and outer(node))
    try:
        yield is_new
    finally:
        local.fixed, local.made = outer, made
    if content is not None:
        content.check()


class _Content:
    """What the modules, lists and dicts of a tree hold."""

    def __init__(self, tree: Any):
        found = walk(tree)
        paths = node_paths(found.dagdef)
        self._paths = {id(x): paths[i] for i, x in enumerate(found.objects)}
        self._containers = found.containers
        self._content = Contents(list(map(contents, found.containers)))

    def holds(self, node: Node) -> bool:
        return id(node) in self._paths

    def check(self) -> None:
        for i in self._content.changed():
            container = self._containers[i]
            path, kind = self._paths[id(container)], type(container).__name__
            where = f"The {kind} at {dotted(path)!r}" if path else f"The {kind}"
            raise NotMutableError(
                f"{where} was changed, but the surrounding `mutable` lets nothing be changed. Move "
                f"the change out of it, or change a clone."
            )
