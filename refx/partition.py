"""Partition: an immutable mapping from path to value. JAX sees these values."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import jax
import jax.export

from refx.buffers import dead_error, is_dead
from refx.errors import StructureError, UnknownPathError
from refx.folded import folded
from refx.text import array_text, is_arraylike

__all__ = ["Partition"]

Path = tuple[str, ...]
_MISSING = object()


class Name(str):
    """One name in a path: a string that knows the class of the object that has the name.

    Filters by class use it. Copies and pickles are plain strings.
    """

    __slots__ = ("owner",)

    owner: type

    def __reduce__(self) -> Any:
        return str, (str(self),)


def named(owner: type, name: Any) -> Path:
    """The part of a path for one name in an object of class `owner`."""
    part = Name(name)
    part.owner = owner
    return (part,)


class Partition(Mapping[Path, Any]):
    """An immutable mapping from path to value, in the order of its tree.

    It is a pytree of its values, with key paths, so `jax.tree.map`, `jax.grad` and optax take it as it
    is. Values are raw arrays (or the pytree that the Ref holds), without a wrapper.

    Args:
      items: a mapping, or pairs of a path and a value. A path is a tuple of strings, or one dotted
        string.

    Raises:
      UnknownPathError: a lookup finds no such path.
      DonationError: a lookup finds an array whose buffer is gone.

    >>> import refx
    >>> p = refx.Partition({("block1", "kernel"): 1.0, ("block1", "bias"): 2.0})
    >>> p["block1", "kernel"], p["block1.bias"]
    (1.0, 2.0)
    >>> import jax
    >>> jax.tree.map(lambda v: v * 10, p)
    Partition({
      'block1.kernel': 10.0,
      'block1.bias': 20.0,
    })
    """

    __slots__ = ("_items",)

    def __init__(self, items: Any = ()):
        pairs = items.items() if isinstance(items, Mapping) else items
        self._items: dict[Path, Any] = {as_path(path): value for path, value in pairs}

    @classmethod
    def _of(cls, items: dict[Path, Any]) -> Partition:
        partition = cls.__new__(cls)
        partition._items = items
        return partition

    def __getitem__(self, path: Any) -> Any:
        items = self._items
        try:
            value = items[path]
        except (KeyError, TypeError):
            named = isinstance(path, str)
            known = next((p for p in items if named and ".".join(p) == path), None)
            value = items[known] if known is not None else _MISSING
        if value is not _MISSING:
            if is_dead(value):
                raise dead_error(
                    f"The value at path {dotted(path)!r} of a Partition was read, but its buffer"
                )
            return value
        raise UnknownPathError(
            f"This partition has no path {dotted(path)!r}; it has {listed(items)}."
        )

    def __iter__(self) -> Iterator[Path]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, path: object) -> bool:
        return path in self._items or (
            isinstance(path, str) and any(".".join(known) == path for known in self._items)
        )

    def __or__(self, other: Mapping[Path, Any]) -> Partition:
        """The union. If both have a path, the value of `other` wins."""
        return Partition._of({**self._items, **Partition(other)._items})

    def nested(self) -> Any:
        """The values in nested plain dicts, keyed by the names in the paths.

        Tools for logs, configurations and checkpoints take this form (wandb, clu, tensorboardX); flax
        calls it a pure dict. For a tree that is a single Ref, it returns just the value.

        Raises:
          StructureError: there is a value at a path, and another one below it.

        >>> import refx
        >>> refx.Partition({("block", "kernel"): 1.0, ("block", "bias"): 2.0}).nested()
        {'block': {'kernel': 1.0, 'bias': 2.0}}
        """
        root: dict[str, Any] = {}
        made = {id(root)}
        for path, value in self._items.items():
            if not path and len(self._items) == 1:
                return value
            at: Any = root
            for name in path[:-1]:
                if name not in at:
                    at[name] = {}
                    made.add(id(at[name]))
                at = at[name]
                if id(at) not in made:
                    break
            if not path or id(at) not in made or path[-1] in at:
                raise StructureError(
                    f"The value at path {dotted(path)!r} does not fit into nested dicts: there is another "
                    f"value above or below it. Leave one of them out, or use a flat dict: "
                    f"{{'.'.join(path): value for path, value in partition.items()}}."
                )
            at[path[-1]] = value
        return root

    @classmethod
    def from_nested(cls, nested: Any, like: Mapping[Path, Any] | None = None) -> Partition:
        """The inverse of `nested`: a Partition of the values in nested dicts.

        Args:
          nested: nested dicts. Their keys become strings, and anything that is not a dict is a value.
          like: a Partition with the same paths. You need it if the values themselves are dicts. The
            result has its order.

        Raises:
          UnknownPathError: the dicts lack a value that `like` has, or have an additional one.

        >>> import refx
        >>> refx.Partition.from_nested({"block": {"kernel": 1.0, "bias": 2.0}})
        Partition({
          'block.kernel': 1.0,
          'block.bias': 2.0,
        })
        """
        known = None if like is None else Partition(like)._items
        found: dict[Path, Any] = {}
        todo: list[tuple[Path, Any]] = [((), nested)]
        while todo:
            path, value = todo.pop()
            if isinstance(value, Mapping) and (known is None or path not in known):
                items = list(value.items())
                todo += [((*path, str(name)), inner) for name, inner in reversed(items)]
            else:
                found[path] = value
        if known is None:
            return cls._of(found)
        for path in (*known, *found):
            if path not in found or path not in known:
                lack = "have no" if path not in found else "have a"
                raise UnknownPathError(
                    f"The dicts {lack} value at path {dotted(path)!r}; `like` has {listed(known)}."
                )
        return cls._of({path: found[path] for path in known})

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        # Only treescope calls this, so treescope is installed.
        from treescope import repr_lib

        return repr_lib.render_dictionary_wrapper(
            object_type=Partition,
            wrapped_dict={".".join(p): value for p, value in self._items.items()},
            path=path,
            subtree_renderer=subtree_renderer,
        )

    # Comparing mappings would raise, because == of the arrays does not return a bool.
    __eq__ = object.__eq__
    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        found = folded([(tuple(map(str, p)), _short(v)) for p, v in self._items.items()])
        lines, shown = [], 0
        for path, text, count in itertools.islice(found, _SHOWN):
            times = f"  # ×{count}" if count > 1 else ""
            lines.append(f"  {'.'.join(path)!r}: {text},{times}")
            shown += count
        if shown < len(self._items):
            lines.append(f"  … {len(self._items) - shown:,} more")
        return "\n".join(["Partition({", *lines, "})"]) if lines else "Partition({})"

    def _repr_html_(self) -> str:
        text = html.escape(repr(self))
        if not self._items:
            return f"<pre>{text}</pre>"
        return (
            f'<details open><summary style="cursor: pointer">Partition of {len(self._items):,} values'
            f'</summary><pre style="margin: 0">{text}</pre></details>'
        )


def as_path(path: Any) -> Path:
    """A path as a tuple of strings. `path` may be such a tuple or its dotted form."""
    if isinstance(path, str):
        return tuple(path.split(".")) if path else ()
    if not isinstance(path, tuple | list):
        raise UnknownPathError(
            f"{path!r} is not a path. A path is a tuple of strings, or one string with dots."
        )
    return tuple(map(str, path))


def dotted(path: Any) -> str:
    """A path with dots, for people."""
    return path if isinstance(path, str) else ".".join(map(str, path))


def listed(paths: Any, most: int = 8) -> str:
    """A few paths for a message, and the number of paths left out."""
    names = [repr(dotted(p)) for p in paths]
    rest = len(names) - most
    if not names:
        return "nothing"
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


_SHOWN = 200


class _Text:
    """Stands for an array when a pytree prints, so that printing copies nothing from a device."""

    def __init__(self, array: Any):
        self.array = array

    def __repr__(self) -> str:
        return array_text(self.array)


def _short(value: Any) -> str:
    return repr(jax.tree.map(lambda x: _Text(x) if is_arraylike(x) else x, value))


def _flatten(p: Partition) -> tuple[tuple[Any, ...], Hashable]:
    return tuple(p._items.values()), tuple(p._items)


def _flatten_with_keys(p: Partition) -> tuple[tuple[Any, ...], Hashable]:
    keyed = tuple((jax.tree_util.DictKey(".".join(k)), v) for k, v in p._items.items())
    return keyed, tuple(p._items)


def _unflatten(paths: Any, values: Any) -> Partition:
    return Partition._of(dict(zip(paths, values, strict=True)))


jax.tree_util.register_pytree_with_keys(Partition, _flatten_with_keys, _unflatten, _flatten)

# Lets exported programs with Partitions as arguments be written to files.
jax.export.register_pytree_node_serialization(
    Partition,
    serialized_name="refx.Partition",
    serialize_auxdata=lambda paths: json.dumps([list(path) for path in paths]).encode(),
    deserialize_auxdata=lambda data: tuple(map(tuple, json.loads(data))),
)
