"""The state of an optimizer in optax's form: hyperparameters to set, and containers to read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from nnx.transforms.boundary import write_back
from refx import Ref, RefError
from refx.partition import Path, dotted
from refx.text import a_kind, key_name

__all__ = ["HyperparameterError", "OptimizerError"]


class OptimizerError(RefError, ValueError):
    """Gradients, model and optimizer do not fit together. Nothing was changed."""


class HyperparameterError(RefError, AttributeError, KeyError):
    """The optimizer does not have this hyperparameter, or cannot set it to this value."""


class Place:
    """Where one hyperparameter is: its path in the state, and whether a schedule sets it."""

    __slots__ = ("name", "owner", "path", "scheduled")

    def __init__(self, path: Path, scheduled: bool):
        self.path = path
        # The path of the transformation, and the name among its hyperparameters.
        self.owner = path[:-2]
        self.name = path[-1]
        self.scheduled = scheduled


def find_hyperparameters(treedef: Any, paths: tuple[Path, ...]) -> dict[str, Place]:
    """The hyperparameters that `optax.inject_hyperparams` keeps in a state, by name.

    If several transformations have a hyperparameter of the same name, a prefix tells them apart:
    `"1.learning_rate"`.
    """
    found: list[Place] = []
    todo: list[Any] = [jax.tree.unflatten(treedef, range(len(paths)))]
    while todo:
        state = todo.pop()
        injected = getattr(state, "hyperparams", None) if isinstance(state, tuple) else None
        if isinstance(injected, dict):
            schedules = getattr(state, "hyperparams_states", {})
            found += [Place(paths[i], name in schedules) for name, i in injected.items()]
        children = jax.tree.leaves(state, is_leaf=lambda x, state=state: x is not state)
        todo += [x for x in children if x is not state]
    found.sort(key=lambda place: paths.index(place.path))
    named: dict[str, Place] = {}
    for place in found:
        same = [other.owner for other in found if other.name == place.name]
        columns = itertools.zip_longest(*same)
        differs = [i for i, column in enumerate(columns) if len(set(column)) > 1]
        named[
            ".".join([*(place.owner[i] for i in differs if i < len(place.owner)), place.name])
        ] = place
    return named


class Hyperparams(MutableMapping[str, jax.Array]):
    """The hyperparameters of an optimizer by name. Writing one writes the optimizer's state."""

    def __init__(
        self,
        places: dict[str, Place],
        values: Callable[[], Mapping[Path, Any]],
        cells: Callable[[], Mapping[Path, Ref[Any]]],
    ):
        self._places = places
        self._values = values
        self._cells = cells

    def __getitem__(self, name: str) -> jax.Array:
        return self._values()[self._place(name).path]

    def __setitem__(self, name: str, value: Any) -> None:
        self.update({name: value})

    def __delitem__(self, name: str) -> NoReturn:
        raise HyperparameterError(
            f"The hyperparameter {name!r} cannot be removed: the transformation needs it. Set it, "
            "or make a new Optimizer."
        )

    def update(self, *given: Any, **named: Any) -> None:
        """Set several at once, like `dict.update`. If there is an error, none is set."""
        new = [(self._place(name), name, x) for name, x in dict(*given, **named).items()]
        cells, old = self._cells(), self._values()
        values = [_fitted(name, x, old[place.path], place) for place, name, x in new]
        names = [f"hyperparams.{name}" for _, name, _ in new]
        write_back([cells[place.path] for place, _, _ in new], values, names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        values = self._values()
        return repr({name: values[place.path] for name, place in self._places.items()})

    def _place(self, name: str) -> Place:
        place = self._places.get(name)
        if place is not None:
            return place
        several = [known for known, p in self._places.items() if p.name == name]
        if several:
            paths = ", ".join(repr(dotted(self._places[known].path)) for known in several)
            what = "learning rates" if name == "learning_rate" else f"hyperparameters {name!r}"
            raise HyperparameterError(
                f"This optimizer has several {what}: {paths}. Choose one: "
                f"optimizer.hyperparams[{several[0]!r}]; the others are {several[1:]}."
            )
        if not self._places:
            raise HyperparameterError(
                f"The hyperparameter {name!r} is not in the state of this optimizer: optax keeps it "
                f"in a closure. Make the transformation with optax.inject_hyperparams, as in "
                f"optax.inject_hyperparams(optax.adam)(learning_rate=1e-3), to read and to set it."
            )
        raise HyperparameterError(
            f"This optimizer has no hyperparameter {name!r}; it has "
            f"{', '.join(map(repr, self._places))}."
        )


def _fitted(name: str, value: Any, old: Any, place: Place) -> jax.Array:
    """The value, cast to the dtype of the hyperparameter."""
    if place.scheduled:
        raise HyperparameterError(
            f"The hyperparameter {name!r} of this optimizer follows a schedule, so the next update "
            "would overwrite what you assign. Give optax.inject_hyperparams a number to be able "
            "to set it."
        )
    try:
        new = jnp.asarray(value)
        _kind(new.dtype)
    except (TypeError, ValueError, StopIteration):
        raise HyperparameterError(
            f"The hyperparameter {name!r} is a number, but got {a_kind(type(value))}."
        ) from None
    if new.shape != jnp.shape(old):
        raise HyperparameterError(
            f"The hyperparameter {name!r} has shape {jnp.shape(old)}, but got {new.shape}."
        )
    if _kind(new.dtype) > _kind(old.dtype):
        raise HyperparameterError(
            f"The hyperparameter {name!r} is of dtype {old.dtype}, which cannot hold the assigned "
            f"value of dtype {new.dtype}. Make the transformation with a number of that kind: 1.0 "
            "instead of 1."
        )
    return new.astype(old.dtype)


def _kind(dtype: Any) -> int:
    """The rank of a kind of number: each kind can be cast to all later kinds."""
    kinds = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
    return next(i for i, kind in enumerate(kinds) if jnp.issubdtype(dtype, kind))


class StateDict(dict[str, Any]):
    """A dict in an optimizer's state. A write that would not reach the optimizer is an error.

    The dict of hyperparameters passes writes on to the optimizer. `jax.tree.map` makes a copy of it
    that can be changed freely, like any dict.
    """

    __slots__ = ("_write",)

    # Called with the new items when somebody writes to a dict that the optimizer handed out.
    _write: Callable[[dict[str, Any]], Mapping[str, Any]] | None

    def update(self, *given: Any, **named: Any) -> None:
        new: Mapping[str, Any] = dict(*given, **named)
        if (write := getattr(self, "_write", None)) is not None:
            new = write(dict(new))
        dict.update(self, new)

    def __setitem__(self, name: str, value: Any) -> None:
        self.update({name: value})

    def __ior__(self, other: Any) -> StateDict:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.update(other)
        return self

    def setdefault(self, name: str, default: Any = None) -> Any:
        if name not in self:
            self[name] = default
        return self[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class StateList(list[Any]):
    """A list in an optimizer's state; see `StateDict`."""

    __slots__ = ("_write",)

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


def _guarded(name: str, kind: type) -> Callable[..., Any]:
    method = getattr(kind, name)

    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "_write", None) is not None:
            lost()
        return method(self, *args, **kwargs)

    guarded.__name__ = name
    return guarded


for _name in ("__delitem__", "clear", "pop", "popitem"):
    setattr(StateDict, _name, _guarded(_name, dict))
for _name in (
    *("__setitem__", "__delitem__", "__iadd__", "__imul__", "append", "clear", "extend", "insert"),
    *("pop", "remove", "reverse", "sort"),
):
    setattr(StateList, _name, _guarded(_name, list))


def lost(*_: Any) -> NoReturn:
    """Raise the error for a write into a copy of the state."""
    raise OptimizerError(
        "optimizer.opt_state is a copy of the state, so the optimizer would not see this write. "
        "Assign a whole state: optimizer.opt_state = jax.tree.map(lambda x: ..., "
        "optimizer.opt_state), or optax.tree.set(optimizer.opt_state, count=0). To write one "
        "value, use its Ref in optimizer.state; for a hyperparameter, use optimizer.hyperparams."
    )


def _flatten_dict(d: StateDict) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    names = tuple(sorted(d))
    return tuple(d[name] for name in names), names


jax.tree_util.register_pytree_with_keys(
    StateDict,
    lambda d: (tuple((jax.tree_util.DictKey(k), d[k]) for k in sorted(d)), tuple(sorted(d))),
    lambda names, children: StateDict(zip(names, children, strict=True)),
    _flatten_dict,
)
jax.tree_util.register_pytree_with_keys(
    StateList,
    lambda x: (tuple((jax.tree_util.SequenceKey(i), y) for i, y in enumerate(x)), None),
    lambda _, children: StateList(children),
    lambda x: (tuple(x), None),
)


def guard(
    state: Any, write: Callable[[Path, dict[str, Any]], Mapping[str, Any]], path: Path = ()
) -> Any:
    """A copy of a state in which the dicts and lists refuse any write that would be lost.

    A write to hyperparameters calls `write` with the path of their dict and the new items.
    """
    result = _one_level(state, lambda name, x: guard(x, write, (*path, name)))
    if type(state) is dict:
        result = StateDict(result)
        is_injected = path[-1:] == ("hyperparams",)
        result._write = (lambda new: write(path, new)) if is_injected else lost
    elif type(state) is list:
        result = StateList(result)
        result._write = lost
    return result


def unguard(state: Any) -> Any:
    """The state with plain dicts and lists, as optax makes it."""
    result = _one_level(state, lambda _, x: unguard(x))
    kinds = {StateDict: dict, StateList: list}
    return kinds[type(state)](result) if type(state) in kinds else result


def _one_level(x: Any, fn: Callable[[str, Any], Any]) -> Any:
    """The pytree with `fn(name, child)` for each child."""
    keyed, treedef = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda y: y is not x)
    if len(keyed) == 1 and keyed[0][1] is x:
        return x
    return jax.tree.unflatten(treedef, [fn(key_name(keys[0]), y) for keys, y in keyed])
