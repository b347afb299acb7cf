"""`mutable`: a context that limits which Refs may be written."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
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
    """Within this context, code may write only the Refs that the filter selects.

    If the filter selects nothing, as None does, modules must not change either: setting or deleting an
    attribute is an error. With `tree`, the lists and dicts in the tree must be unchanged at the end.
    Modules and Refs that are made within the context may change.

    Args:
      filter: any filter. A filter that looks at paths (a callable, `PathContains`) needs `tree`.
      tree: limits only the Refs and modules of this tree. By default, the limit is for all of them.

    Raises:
      NotMutableError: a Ref that the filter does not select is written. If nothing may change: an
        attribute is changed, or a list or a dict differs at the end.
      FilterError: the filter looks at paths but there is no tree; or it selects nothing in the tree
        by mistake, as for `get_partition`.

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
    outer = local.limit
    local.limit = limit = Limit(outer, filter, tree)
    try:
        yield
    finally:
        local.limit = outer
    if limit.content is not None:
        limit.content.check()


class Limit:
    """The limit of one `mutable` and of those around it.

    If the filter selects nothing, `_new` has the Refs and Nodes that were made within: by id, because
    a class may define its own hash, and weakly, because those of a body hold tracers.
    """

    def __init__(self, outer: Limit | None, filter: Filter, tree: Any):
        self._outer = outer
        self._predicate = to_predicate(filter)
        if tree is None and reads_paths(filter):
            raise FilterError(
                f"The filter {filter!r} looks at paths, so mutable needs the tree that has them: "
                f"mutable(filter, tree=model)."
            )
        self._paths = None if tree is None else {cell: path for path, cell in refs(tree).items()}
        paths = self._paths or {}
        if tree is not None and not any(self._predicate(path, x) for x, path in paths.items()):
            check_selection(filter, tree)
        nothing = selects_nothing(filter)
        self._new: Any = weakref.WeakValueDictionary() if nothing else None
        self.content = _Content(tree) if nothing and tree is not None else None

    def note_made(self, made: Iterable[Any]) -> None:
        """Note new Refs and Nodes."""
        if self._outer is not None:
            self._outer.note_made(made)
        if self._new is not None:
            self._new.update((id(x), x) for x in made)

    def lets_write(self, cell: Ref[Any]) -> bool:
        """Whether a Ref may be written."""
        if self._outer is not None and not self._outer.lets_write(cell):
            return False
        if self._paths is None:
            return self._predicate((), cell) or self._is_new(cell)
        path = self._paths.get(cell)
        return path is None or self._predicate(path, cell)

    def lets_change(self, node: Node) -> bool:
        """Whether the attributes of a Node may be set and deleted."""
        if self._outer is not None and not self._outer.lets_change(node):
            return False
        if self.content is not None:
            return not self.content.holds(node)
        return self._new is None or self._is_new(node)

    def _is_new(self, x: Any) -> bool:
        return self._new is not None and self._new.get(id(x)) is x


class _Content:
    """The content of the modules, lists and dicts of a tree."""

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
                f"{where} was changed, but the surrounding `mutable` allows no changes. Move "
                f"the change out of it, or change a clone."
            )
