"""Pytrees with Refs and Nodes as leaves, even if a class flattens its modules by itself.

A class registered with JAX may hold a module and return the module's arrays as its own leaves
(`distrax.Jittable` does). The leaves do not show any Refs, so JAX's copies of the object would have
their own Refs, which are never trained. This file opens such an object: it flattens the attributes
instead.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from refx.errors import StructureError
from refx.frame import local
from refx.node import is_array, is_identity
from refx.static import Static

__all__: list[str] = []


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """`jax.tree.flatten` with Refs and Nodes as leaves. Objects that hide some are opened.

    Unflattening the structure makes objects of the original classes.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=_stops)
    if not any([_is_hidden(x) for x in leaves]):
        return leaves, treedef
    return jax.tree.flatten(opened(tree), is_leaf=is_identity)


def leaves(tree: Any) -> list[Any]:
    """The leaves that `flatten` returns."""
    return flatten(tree)[0]


def flatten_with_path(tree: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """`flatten` with the key path of each leaf."""
    return jax.tree_util.tree_flatten_with_path(opened(tree), is_leaf=is_identity)


def map(fn: Callable[[Any], Any], tree: Any) -> Any:
    """`jax.tree.map` over the leaves that `flatten` returns."""
    found, treedef = flatten(tree)
    return jax.tree.unflatten(treedef, [fn(x) for x in found])


def holds_identity(tree: Any) -> bool:
    """Whether there is a Ref or a Node in a tree."""
    return any([is_identity(x) for x in leaves(tree)])


def opened(tree: Any) -> Any:
    """Replace each object that hides Refs or Nodes by a pytree of its attributes."""
    found = jax.tree.leaves(tree, is_leaf=_stops)
    if not any([_is_hidden(x) for x in found]):
        return tree
    return jax.tree.map(lambda x: _Opened.of(x) if _is_hidden(x) else x, tree, is_leaf=_stops)


def hides(obj: Any) -> bool:
    """Whether `obj` is a pytree whose class flattens the modules or Refs that it holds.

    Raises:
      StructureError: it keeps them in slots, so it cannot be opened.
    """
    if not _may_hide(type(obj)) or isinstance(obj, _NO_PYTREES) or is_array(obj):
        return False
    held = _attributes(obj)
    if not held:
        return False
    outer, local.peeking = local.peeking, True
    try:
        children = jax.tree.leaves(obj, is_leaf=lambda x: x is not obj)
        if len(children) == 1 and children[0] is obj:
            return False
        seen = {id(x) for x in children}
        # Almost always, its children are its attributes, and all other attributes are settings.
        others = list(_held_by([x for x in held.values() if id(x) not in seen]))
        if not others:
            return False
        seen = {id(x) for x in jax.tree.leaves(obj, is_leaf=is_identity)}
        hidden = next((x for x in others if id(x) not in seen), None)
    finally:
        local.peeking = outer
    if hidden is None:
        return False
    if type(getattr(obj, "__dict__", None)) is not dict:
        raise StructureError(
            f"A {type(obj).__name__} holds a {type(hidden).__name__} in a slot, and gives JAX its arrays "
            f"as leaves. A copy would have its own Refs, which are never trained. Leave out __slots__, "
            f"register the class with jax.tree_util.register_dataclass, or make the "
            f"{type(obj).__name__} where it is used."
        )
    return True


_NO_PYTREES = (type, tuple, types.ModuleType, types.FunctionType, types.MethodType)


@functools.lru_cache(maxsize=1024)
def _may_hide(kind: type) -> bool:
    """Whether objects of a class may be pytrees with attributes."""
    if kind.__module__ == "builtins" or getattr(kind, "_is_node", False):
        return False
    if kind is functools.partial or issubclass(kind, jax.Array | np.ndarray | np.generic):
        return False
    slots = any(vars(base).get("__slots__") for base in kind.__mro__)
    return kind.__dictoffset__ != 0 or slots or hasattr(kind, "__dict__")


def _attributes(obj: Any) -> dict[str, Any]:
    """The attributes of an object, in its dict and in its slots."""
    own = getattr(obj, "__dict__", None)
    found = dict(own) if type(own) is dict else {}
    for base in type(obj).__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(obj, name):
                found[name] = getattr(obj, name)
    return found


def _is_pytree_with_attributes(x: Any) -> bool:
    return (
        _may_hide(type(x))
        and not isinstance(x, _NO_PYTREES)
        and not is_array(x)
        and not is_identity(x)
        and not jax.tree_util.all_leaves([x])
    )


def _held_by(items: list[Any]) -> Iterator[Any]:
    """The Refs and Nodes in some objects, and in the attributes of the pytrees in them."""
    todo, known = list(items), set()
    while todo:
        found = jax.tree.leaves(
            todo.pop(), is_leaf=lambda x: is_identity(x) or _is_pytree_with_attributes(x)
        )
        for x in found:
            if is_identity(x):
                yield x
            elif id(x) not in known and _is_pytree_with_attributes(x):
                known.add(id(x))
                todo += _attributes(x).values()


def _is_hidden(x: Any) -> bool:
    return not is_identity(x) and hides(x)


def _stops(x: Any) -> bool:
    return is_identity(x) or hides(x)


class _Opened:
    """An object as a pytree of its attributes. Unflattening makes an object of the original class."""

    def __init__(self, kind: type, names: tuple[str, ...], children: tuple[Any, ...]):
        self.kind = kind
        self.names = names
        self.children = children

    @classmethod
    def of(cls, obj: Any) -> _Opened:
        """Open an object and its attributes."""
        children = [jax.tree.map(_part, x, is_leaf=_stops) for x in vars(obj).values()]
        return cls(type(obj), tuple(vars(obj)), tuple(children))

    def with_keys(self) -> Any:
        """The children with their keys, and the static part."""
        keys = [jax.tree_util.GetAttrKey(name) for name in self.names]
        return tuple(zip(keys, self.children, strict=True)), (self.kind, self.names)

    @staticmethod
    def build(about: Any, children: Any) -> Any:
        """Make an object of the original class, without calling `__init__`, as `refx.build` does."""
        kind, names = about
        obj = object.__new__(kind)
        vars(obj).update(zip(names, children, strict=True))
        return obj


jax.tree_util.register_pytree_with_keys(
    _Opened,
    _Opened.with_keys,
    _Opened.build,
    lambda opened: (opened.children, (opened.kind, opened.names)),
)


class _Fixed:
    """A static value in an opened object: a pytree without leaves."""

    def __init__(self, value: Any):
        self.value = value


jax.tree_util.register_pytree_node(
    _Fixed, lambda fixed: ((), Static(fixed.value)), lambda static, _: static.value
)


def _part(x: Any) -> Any:
    if is_identity(x) or is_array(x):
        return x
    return _Opened.of(x) if hides(x) else _Fixed(x)
