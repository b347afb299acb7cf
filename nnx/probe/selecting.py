"""What `where` selects among modules and their methods, and what was recorded of it, by path."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnx.module import Module
from nnx.probe.records import Group, ProbeError, Record, output_of, unwrapped
from nnx.surgery import Where, listed_modules, selector
from refx import Partition, PathMatches
from refx.partition import Path
from refx.selection import follow

__all__: list[str] = []


class At(NamedTuple):
    """Where a number is in the path of a layer of a stack, and which."""

    position: int
    number: int


# By path and method, what was selected: whole outputs are `()`, and layers of a stack by number.
Selected = dict[tuple[Path, str], list[tuple[At, ...]]]


def select(name: str, where: Where, found: dict[Path, Module]) -> Selected:
    """Find what `where` selects among the modules of a model.

    Raises:
      FilterError: it cannot select modules.
      ProbeError: it selects no callable module.
    """
    selected: Selected = {}
    for part in where if isinstance(where, tuple) else (where,):
        here = _select_part(part, found)
        if not here and part is not None:
            raise ProbeError(
                f"{name} with {'...' if part is ... else repr(part)} selects no callable module of "
                f"{type(found[()]).__name__}. Its modules are: {listed_modules(found)}. A method is "
                f"named after its module, as in 'embed.attend', and a layer of a stack by its number, "
                f"as in 'layers.3'."
            )
        for place, at in here:
            if at not in selected.setdefault(place, []):
                selected[place].append(at)
    return selected


def _select_part(
    where: Where, found: dict[Path, Module]
) -> list[tuple[tuple[Path, str], tuple[At, ...]]]:
    if not isinstance(where, str):
        selects = selector(where)
        return [
            ((path, "__call__"), ())
            for path, module in found.items()
            if _has(module, "__call__") and selects(path, module)
        ]
    parts = where.split(".") if where else []
    places = _match(parts, found)
    if places:
        return [(place, ()) for place in places]
    # Layers of a stack have one path, in which a number says which.
    digits = [i for i, part in enumerate(parts) if part.isdigit()]
    for count in range(1, len(digits) + 1):
        for chosen in itertools.combinations(digits, count):
            rest = [part for i, part in enumerate(parts) if i not in chosen]
            if places := _match(rest, found):
                at = tuple(At(i - len(parts), int(parts[i])) for i in chosen)
                return [(place, at) for place in places]
    return []


def _match(parts: list[str], found: dict[Path, Module]) -> list[tuple[Path, str]]:
    # A shared module has other paths than its first.
    for size in {len(parts), len(parts) - 1} if parts else ():
        other = follow(found[()], parts[:size]) if () in found else None
        if isinstance(other, Module) and tuple(parts[:size]) not in found:
            first = next(path for path, module in found.items() if module is other)
            return _match([*first, *parts[size:]], found)
    whole, owner = PathMatches(".".join(parts)), PathMatches(".".join(parts[:-1]))
    places = [
        (path, "__call__")
        for path, module in found.items()
        if whole(path, module) and _has(module, "__call__")
    ]
    if places or not parts:
        return places
    return [
        (path, parts[-1])
        for path, module in found.items()
        if owner(path, module) and _has(module, parts[-1])
    ]


def _has(module: Module, method: str) -> bool:
    # Every class has a `__call__`, that of its metaclass.
    found = next((vars(c)[method] for c in type(module).__mro__ if method in vars(c)), None)
    other = isinstance(found, staticmethod | classmethod | property)
    return callable(found) and not other and method not in vars(Module)


def assembled(name: str, found: dict[Path, Module], selected: Selected, group: Group) -> Partition:
    """What was recorded, by path in the order of the model."""
    values: dict[Path, list[Any]] = {}
    order = {path: i for i, path in enumerate(found)}
    places: dict[Path, Any] = {}
    for record in group.records():
        module_path = record.path[:-1] if record.label == "sow" else record.path
        method = record.label or "__call__"
        wanted = [()] if record.label == "sow" else selected[record.path, method]
        for at in wanted:
            path = record.path if method in ("__call__", "sow") else (*record.path, method)
            value = record.value
            if at:
                value = _layer(name, record, at)
                names, size = list(path), len(path) + len(at)
                for position, number in at:
                    names.insert(size + position, str(number))
                path = tuple(names)
            values.setdefault(path, []).append(unwrapped(value))
            places[path] = (order[module_path], method != "__call__", [n for _, n in at])
    return Partition(
        (path, outs[0] if len(outs) == 1 else tuple(outs))
        for path, outs in sorted(values.items(), key=lambda item: places[item[0]])
    )


def _layer(name: str, record: Record, at: tuple[At, ...]) -> Any:
    what = output_of(record.path, record.label)
    numbers = ", ".join(str(n) for _, n in at)
    if len(at) != len(record.stacks):
        raise ProbeError(
            f"{what} was to be taken by {name} in layer {numbers} of a stack, but "
            f"{len(record.stacks)} loops around its call take slices of its Refs. Leave out the number."
        )
    # The last axes first, so that the numbers of the others stay.
    layers = [(axis, n) for axis, (_, n) in zip(record.stacks, at, strict=True)][::-1]

    def take(x: Any) -> Any:
        for axis, number in layers:
            if number >= x.shape[axis]:
                raise ProbeError(
                    f"{what} was to be taken by {name} in layer {numbers}, but the stack has "
                    f"{x.shape[axis]} layers."
                )
            x = jnp.take(x, number, axis)
        return x

    return jax.tree.map(take, record.value)
