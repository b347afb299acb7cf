"""Check the paths in a file against those of the tree that it describes.

`load` uses the objects of a file, and `load_state` uses its paths. The two agree only if the paths
are those of the tree. All paths of a deep tree together may be much longer than the file, so here
they are linked lists.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx.serialize.grammar import Damaged, check_distinct, clip
from refx.dagdef import DagDef, Leaf, NodeDef, Tree, parts_of, ref_numbers
from refx.partition import dotted
from refx.walk import Walk

__all__: list[str] = []


def check_paths(
    found: Walk, paths: dict[int, list[str]], leaves: list[tuple[list[str], Any]]
) -> None:
    """Raise if the paths in a file are not those of its tree.

    Args:
      found: the result of a walk of the tree.
      paths: the path in the file for each Ref, by the Ref's id.
      leaves: the path and the value of each plain array in the file.

    Raises:
      Damaged: they differ.
    """
    ref_links, leaf_links = _links(found.dagdef)
    if len(found.refs) != len(paths):
        raise Damaged("one of its Refs is nowhere in the tree")
    claimed = [paths[id(ref)] for ref in found.refs]
    for path, link in zip(claimed, ref_links, strict=True):
        if not _leads(path, link):
            raise Damaged(f"the path {clip(dotted(path))} is not that of its Ref")
    if len(leaves) != len(leaf_links):
        raise Damaged("its list of arrays is not that of the tree")
    for (path, value), link, leaf in zip(leaves, leaf_links, found.leaves, strict=True):
        if not _leads(path, link) or not _same(value, leaf):
            raise Damaged(f"the path {clip(dotted(path))} is not that of its array")
    check_distinct(map(tuple, (*claimed, *(path for path, _ in leaves))), "the list of its paths")


def _links(dagdef: DagDef) -> tuple[list[Any], list[Any]]:
    """The paths of Refs and of plain arrays, in the order of the structure."""
    todo: list[tuple[Any, Any]] = [(dagdef.root, None)]
    found: dict[int, Any] = {}
    leaves: dict[int, Any] = {}
    while todo:
        child, link = todo.pop()
        if type(child) is int:
            if child in found:
                continue
            found[child] = link
            child = dagdef.nodes[child]
        elif type(child) is Leaf:
            leaves[child.number] = link
        if isinstance(child, NodeDef | Tree):
            pairs = zip(reversed(child.names), reversed(child.children), strict=True)
            todo += [(c, functools.reduce(_step, parts_of(name), link)) for name, c in pairs]
    refs = [found[i] for i in ref_numbers(dagdef)]
    return refs, [leaves[i] for i in range(len(leaves))]


def _step(link: Any, part: str) -> Any:
    return link, part


def _leads(path: list[str], link: Any) -> bool:
    """Whether a path equals that of a linked list."""
    for name in reversed(path):
        if link is None or link[1] != name:
            return False
        link = link[0]
    return link is None


def _same(a: Any, b: Any) -> bool:
    """Whether two arrays are the same or equal: `load` of a `saveable` class may have made a new one."""
    if a is b:
        return True
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in (a, b)
    )
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()
