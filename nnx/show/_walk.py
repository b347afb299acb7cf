"""The walk over a model that all displays share: everything that the model holds, in order, by path.

Items are in the order of the first visit. So the contents of an item are the range after it, and
two parts of a model are equal if their ranges are. When the walk meets an object again, it adds an
item that only points back. So sharing and cycles end the walk.
"""

from __future__ import annotations

import inspect
import types
import weakref
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

import jax

from nnx.show._format import short
from nnx.show._placed import placement_text
from refx import Node, Ref
from refx.field import RefField
from refx.node import attributes
from refx.static import Static
from refx.text import array_text, is_arraylike, key_name

__all__ = ["ARRAY", "BACK", "LIST", "MAP", "NODE", "REF", "STATIC", "TREE", "Item", "Walk"]

NODE, LIST, MAP, TREE, REF, ARRAY, STATIC, BACK = range(8)


class Item:
    """Something that a model holds, in one place.

    `name` is its name in the item number `parent`. `end` is the number after the last item inside
    it. For an object that was met before (BACK), `target` is the number of its first item.
    """

    __slots__ = ("end", "kind", "name", "obj", "parent", "target", "text")

    def __init__(self, kind: int, name: Any, obj: Any, parent: int, text: str, target: int = -1):
        self.kind = kind
        self.name = name
        self.obj = obj
        self.parent = parent
        self.text = text
        self.target = target
        self.end = 0


class Walk:
    """Everything that a model holds. `items[0]` is the model itself."""

    def __init__(self, root: Any):
        self.items: list[Item] = []
        # Two items are shown as one if these are equal; their own names may differ.
        self._heads: list[Any] = []
        self._names: list[Any] = []
        self._backs: list[int] = []
        self._leaf_types: dict[type, bool] = {}
        seen: dict[int, int] = {}
        # If only one of several equal parts is shown: the end of the last part.
        self.folded = 0
        # Keep values that flattening a pytree has made alive, so that their ids stay unique.
        self._alive: list[Any] = []
        todo: list[tuple[Any, Any, int, Any]] = [(root, None, -1, None)]
        while todo:
            obj, name, parent, field = todo.pop()
            children = self._visit(obj, name, parent, field, seen)
            if children:
                here = len(self.items) - 1
                todo += [(value, key, here, f) for key, value, f in reversed(children)]
        items = self.items
        for i in range(len(items) - 1, -1, -1):
            item = items[i]
            if item.end <= i:
                item.end = i + 1
            if item.parent >= 0 and items[item.parent].end < item.end:
                items[item.parent].end = item.end

    def _add(self, kind: int, name: Any, obj: Any, parent: int, text: str, head: Any) -> None:
        self.items.append(Item(kind, name, obj, parent, text))
        self._heads.append(head)
        self._names.append(name)

    def _visit(
        self, obj: Any, name: Any, parent: int, field: Any, seen: dict[int, int]
    ) -> list[tuple[Any, Any, Any]] | None:
        kind = type(obj)
        if field is not None and not field.is_ref:
            self._add(STATIC, name, obj, parent, short(obj), _static(obj))
            return None
        if kind in _PLAIN:
            self._add(STATIC, name, obj, parent, short(obj), (kind, obj))
            return None
        container = kind is list or kind is dict
        if container or isinstance(obj, Ref | Node):
            if container and self._is_plain(obj):
                self._add(STATIC, name, obj, parent, short(obj), short(obj, 1000))
                return None
            first = seen.get(id(obj))
            if first is not None:
                self._backs.append(len(self.items))
                self._add(BACK, name, obj, parent, "", BACK)
                self.items[-1].target = first
                return None
            seen[id(obj)] = len(self.items)
        if isinstance(obj, Ref):
            text = ref_text(obj)
            facts = tuple((k, _static(v)) for k, v in obj._metadata.items())
            self._add(REF, name, obj, parent, text, (REF, text, _static(obj._collection), facts))
            return None
        if isinstance(obj, Node):
            self._add(NODE, name, obj, parent, kind.__name__, kind)
            fields = obj._fields
            defaults = _defaults(kind)
            return [
                (k, v, fields.get(k))
                for k, v in attributes(obj).items()
                if not (k in defaults and self._is_default(v, defaults[k]))
                and not self._hidden(k, v)
            ]
        if kind is list:
            self._add(LIST, name, obj, parent, "[]", list)
            return [(i, v, None) for i, v in enumerate(obj)]
        if kind is dict:
            self._add(MAP, name, obj, parent, "{}", dict)
            return [(k, v, None) for k, v in obj.items()]
        if is_arraylike(obj):
            text = array_text(obj) + placement_text(obj)
            self._add(ARRAY, name, obj, parent, text, (ARRAY, text))
            return None
        if kind is tuple:
            if self._is_plain(obj):
                self._add(STATIC, name, obj, parent, short(obj), _static(obj))
                return None
            self._add(LIST, name, obj, parent, "()", tuple)
            return [(i, v, None) for i, v in enumerate(obj)]
        if self._is_leaf(obj):
            self._add(STATIC, name, obj, parent, short(obj), _static(obj))
            return None
        keyed = jax.tree_util.tree_flatten_with_path(obj, lambda x: x is not obj)[0]
        children = [(key_name(path[0]), value, None) for path, value in keyed if path]
        if not children or self._is_plain([v for _, v, _ in children]):
            self._add(STATIC, name, obj, parent, short(obj), _static(obj))
            return None
        self._alive.append(children)
        text = (
            f"{type(obj.__self__).__name__}.{obj.__func__.__name__}"
            if (isinstance(obj, types.MethodType))
            else kind.__name__
        )
        self._add(TREE, name, obj, parent, text, (kind, text))
        return children

    def _hidden(self, name: str, value: Any) -> bool:
        """Attributes that a class keeps for internal use, unless they are part of the model."""
        return name.startswith("_") and self._is_plain([value])

    def _is_default(self, value: Any, default: Any) -> bool:
        kind = type(value)
        if value is default:
            return kind in _PLAIN or self._is_plain([value])
        if kind is not type(default) or kind not in _SAFE or not self._is_plain([value, default]):
            return False
        return value == default and _static(value) == _static(default)

    def _is_leaf(self, obj: Any) -> bool:
        kind = type(obj)
        leaf = self._leaf_types.get(kind)
        if leaf is None:
            leaf = self._leaf_types[kind] = jax.tree_util.all_leaves([obj])
        return leaf

    def _is_plain(self, container: Any) -> bool:
        """Whether a container holds no Ref, module, array or other pytree at any depth."""
        todo, seen = [container], set()
        while todo:
            obj = todo.pop()
            kind = type(obj)
            if kind in _PLAIN:
                continue
            if kind is list or kind is dict or kind is tuple:
                if id(obj) not in seen:
                    seen.add(id(obj))
                    todo += obj.values() if kind is dict else obj
                continue
            if isinstance(obj, Ref | Node) or is_arraylike(obj) or not self._is_leaf(obj):
                return False
        return True

    def children(self, i: int) -> Iterator[int]:
        """The numbers of the items directly inside an item."""
        j, end = i + 1, self.items[i].end
        while j < end:
            yield j
            j = self.items[j].end

    def path(self, i: int) -> tuple[str, ...]:
        """The names from the root to an item."""
        names = []
        while i > 0:
            names.append(str(self.items[i].name))
            i = self.items[i].parent
        return tuple(reversed(names))

    def equal(self, i: int, j: int) -> bool:
        """Whether two items have the same structure: classes, settings, shapes, inner sharing."""
        items, n = self.items, self.items[i].end - i
        if items[j].end - j != n or items[i].kind == BACK or items[j].kind == BACK:
            return False
        try:
            if (
                self._heads[i : i + n] != self._heads[j : j + n]
                or self._names[i + 1 : i + n] != self._names[j + 1 : j + n]
            ):
                return False
        except Exception:
            # The == of a static value may raise. Then the two do not count as equal.
            return False
        for k in range(bisect_left(self._backs, i), bisect_left(self._backs, i + n)):
            at = self._backs[k]
            a, b = items[at].target, items[at - i + j].target
            inside = i <= a < i + n and a - i == b - j
            if a != b and not inside:
                return False
        return True

    def runs(self, i: int) -> Iterator[list[int]]:
        """The contents of an item, with equal neighbours grouped.

        Items that point back are grouped if they all point to one place, or to neighbours in order.
        """
        run: list[int] = []
        for j in self.children(i):
            if run and not self._joins(run, j):
                yield run
                run = []
            run.append(j)
        if run:
            yield run

    def _joins(self, run: list[int], j: int) -> bool:
        last, item = self.items[run[-1]], self.items[j]
        if last.kind == BACK and item.kind == BACK:
            if len(run) == 1:
                return last.target == item.target or self._next(last.target, item.target)
            if self.items[run[0]].target == last.target:
                return item.target == last.target
            return self._next(last.target, item.target)
        return self.equal(run[0], j)

    def _next(self, i: int, j: int) -> bool:
        return self.items[i].end == j and self.items[i].parent == self.items[j].parent


_PLAIN = frozenset({int, float, bool, str, complex, bytes, type(None), type(len), type})
_PLAIN |= {types.FunctionType, type(jax.numpy.float32)}
_SAFE = frozenset({int, float, bool, str, complex, bytes, tuple})


def _static(value: Any) -> Any:
    try:
        hash(value)
        return Static(value)
    except Exception:
        return id(value)


def has_ended(ref: Ref[Any]) -> bool:
    """Whether a Ref has lost its value, because the transformation in which it was made has ended."""
    return ref._value is None and ref._frame is not None and not ref._frame.open


def ref_text(ref: Ref[Any]) -> str:
    """The value of a Ref as text."""
    return "<ended trace>" if has_ended(ref) else value_text(ref._value)


def value_text(value: Any) -> str:
    """The value of a Ref for display: an array as dtype and shape, any other pytree with such texts
    inside.
    """
    if is_arraylike(value):
        return array_text(value) + placement_text(value)
    return short(value, 80)


_known_defaults: weakref.WeakKeyDictionary[type, dict[str, Any]] = weakref.WeakKeyDictionary()


def _defaults(cls: type) -> dict[str, Any]:
    """The defaults of the constructor's arguments. Settings that equal them are not shown."""
    known = _known_defaults.get(cls)
    if known is None:
        known = {}
        try:
            for name, p in inspect.signature(cls.__init__).parameters.items():
                if p.default is not p.empty:
                    known[name] = p.default
        except (TypeError, ValueError):
            pass
        for name, field in getattr(cls, "_fields", {}).items():
            if isinstance(field, RefField):
                known.pop(name, None)
            elif field.has_default and field.default_factory is None:
                known.setdefault(name, field.default)
        _known_defaults[cls] = known
    return known
