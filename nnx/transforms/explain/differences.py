"""Records of the calls of a compiled function, and the differences between two, in a user's words."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.core import Tracer

from nnx.sharding.rules import canonical
from nnx.transforms.call import Call
from nnx.transforms.layout import Layout
from nnx.transforms.naming import CallNames
from refx import Node
from refx.dagdef import Leaf, NodeDef, RefDef, Tree
from refx.partition import Path, dotted
from refx.static import Static
from refx.text import array_text, key_name

__all__: list[str] = []

# JAX options on which a compiled program depends.
OPTIONS = (
    "jax_enable_x64",
    "jax_explicit_x64_dtypes",
    "jax_default_dtype_bits",
    "jax_default_matmul_precision",
    "jax_default_device",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_threefry_partitionable",
    "jax_random_seed_offset",
    "jax_softmax_custom_jvp",
    "jax_high_dynamic_range_gumbel",
    "jax_debug_key_reuse",
    "jax_debug_nans",
    "jax_debug_infs",
    "jax_error_checking_behavior_nan",
    "jax_error_checking_behavior_divide",
    "jax_error_checking_behavior_oob",
    "jax_check_static_indices",
    "jax_allow_f16_reductions",
    "jax_auto_pcast",
    "jax_use_direct_linearize",
    "jax_use_shardy_partitioner",
    "jax_optimization_level",
    "jax_memory_fitting_level",
    "jax_enable_pgle",
)


class Program:
    """A record of a call for which a function was traced.

    `avals` are the shapes, dtypes and weak types of all inputs in order, `options` the state of JAX,
    `read` the plain values that the function closes over, and `paths` the variables of its modules.
    `placements` are the devices of the inputs, for each time that it was compiled. To keep tracing fast,
    we leave everything else until an explanation is requested.
    """

    __slots__ = ("avals", "layout", "options", "paths", "placements", "read")

    def __init__(self, jitted: Any, layout: Layout, call: Call):
        self.layout = layout
        self.avals = avals_of(call)
        self.options = {name: getattr(jax.config, name, None) for name in OPTIONS}
        self.options["the mesh"] = jax.sharding.get_abstract_mesh()
        self.read, self.paths = jitted._closure.found()
        self.placements = [placement(call)]

    def is_like(self, other: Program) -> bool:
        """Whether two calls of one layout have the same program, apart from placements."""
        return self.avals == other.avals and list(map(str, self.options.values())) == list(
            map(str, other.options.values())
        )


def avals_of(call: Call) -> tuple[list[Any], ...]:
    """The shapes and dtypes of all values of a call."""
    return tuple(list(map(_aval, values)) for values in call.values)


def _aval(x: Any) -> Any:
    """The shape, dtype and weak type of an array. For a pytree, it is a tuple of these."""
    if isinstance(x, jax.Array):
        return jax.typeof(x)
    leaves = jax.tree.leaves(x)
    if len(leaves) != 1 or leaves[0] is not x:
        return tuple(map(_aval, leaves))
    try:
        return jax.typeof(x)
    except TypeError:
        return type(x)


def placement(call: Call) -> dict[int, Any]:
    """The shardings of the inputs that the user placed on devices, by number."""
    inputs = itertools.chain(*call.values)
    return {
        i: canonical(x.sharding)
        for i, x in enumerate(inputs)
        if isinstance(x, jax.Array) and not isinstance(x, Tracer) and x.committed
    }


class View:
    """A program in the user's words.

    `values` are its inputs by name, `facts` the parts of its structure by path, and `read` the plain
    values that the function closes over.
    """

    def __init__(self, jitted: Any, program: Program):
        self.program = program
        layout = self._layout = program.layout
        # After the closed-over modules comes a token for the steps that lead to them.
        closed = [
            _variable(program.paths[n]) if n < len(program.paths) else _STEPS
            for n in range(layout.closed)
        ]
        others = [*closed, _SCOPE] if layout.has_scope else closed
        self.names = CallNames(jitted._fn, layout, others)
        self.roots, self.arguments = [
            [tuple(map(key_name, path)) for path in paths]
            for paths in (self.names.roots, self.names.arguments)
        ]
        self.values = dict(zip(self._names(), itertools.chain(*program.avals), strict=True))
        self.facts = _facts(layout, self)
        self.read = {dotted(_variable(path)): value for path, value in program.read}

    def path(self, path: Path) -> Path:
        """A path in the structure of the call, with the name of its root."""
        return (*self.roots[int(path[0])], *path[1:]) if path else ()

    def _names(self) -> Iterator[str]:
        dagdef = self._layout.dagdef
        for path in (*dagdef.ref_paths, *dagdef.leaf_paths):
            yield dotted(self.path(path))
        yield from map(dotted, self.arguments)


_SCOPE, _STEPS = ("the scope",), ("the steps to closed-over modules",)


def _variable(path: tuple[Any, ...]) -> Path:
    return tuple(str(part) for part in path if part not in ("", "__closure__", "__globals__"))


# ---- the structure, as facts by path


class Thing(NamedTuple):
    """One object, value or setting: its `kind`, and the `detail` that we compare."""

    kind: str
    detail: Any = None


def _facts(layout: Layout, names: View) -> dict[Path, Any]:
    facts: dict[Path, Any] = {}
    dagdef = layout.dagdef
    first: dict[int, Path] = {}
    todo: list[tuple[Any, Path]] = [
        (child, names.path((str(i),)))
        for i, child in reversed(list(enumerate(dagdef.root.children)))
    ]
    while todo:
        child, path = todo.pop()
        if type(child) is int:
            if child in first:
                facts[path] = Thing("shared", dotted(first[child]))
                continue
            first[child] = path
            child = dagdef.nodes[child]
        if isinstance(child, NodeDef):
            is_node = issubclass(child.kind, Node)
            facts[path] = Thing("module" if is_node else "container", (child.kind, child.revision))
        elif isinstance(child, RefDef):
            facts[path] = Thing("Ref", (child.collection, child.metadata))
        elif isinstance(child, Tree):
            facts[path] = Thing(
                "pytree", jax.tree.unflatten(child.treedef, child.children).__class__
            )
        elif isinstance(child, Leaf):
            facts[path] = Thing("array")
        else:
            facts[path] = Thing("setting", child)
        if isinstance(child, NodeDef | Tree):
            parts = zip(reversed(child.names), reversed(child.children), strict=True)
            todo += [(c, (*path, str(name))) for name, c in parts]
    for i, label in layout.labels:
        at = dagdef.ref_paths[i] if i >= 0 else dagdef.leaf_paths[-1 - i]
        facts[(*names.path(at), "value")] = Thing("setting", label)
    first_closed = len(layout.form.where)
    closed = range(first_closed, first_closed + layout.closed)
    arrays = [names.path(path) for path in dagdef.leaf_paths if int(path[0]) in closed]
    for i, constant in enumerate(layout.constants):
        # If two modules share an array, there are fewer arrays than constants.
        at = arrays[i] if len(arrays) == len(layout.constants) else ("an array",)
        facts[(*at, "constant")] = Thing("constant", constant)
    if layout.statics is not None:
        _, fixed, named = layout.statics
        for i, static in fixed:
            facts[("static", names.names.parameter(i))] = Thing("static", static)
        for name, static in named:
            facts[("static", name)] = Thing("static", static)
    for path in names.arguments:
        facts[path] = Thing("argument")
    return facts


# ---- differences

ANOTHER = "another one"


class Difference(NamedTuple):
    """One difference between two programs, in a user's words.

    If a value that is part of the program has changed, `kind` is "setting", "static argument" or
    "variable", `name` is the name of its holder, `values` are the two values, and `change` describes it.
    """

    text: str
    kind: str = ""
    name: str = ""
    values: tuple[Any, Any] = (None, None)
    change: str = ""


def differences(old: View, new: View) -> list[Difference]:
    reasons = list(_structure(old.facts, new.facts))
    for name, now in new.values.items():
        was = old.values.get(name, now)
        if was != now:
            text = f"{name or 'the Ref'}: {_text(was)} → {_text(now)}{_weak(was, now)}"
            reasons.append(Difference(text))
    # If the structures differ, other code may have run and read other variables.
    names = {**old.read, **new.read} if not reasons else old.read.keys() & new.read.keys()
    for name in sorted(names):
        was, now = old.read.get(name), new.read.get(name)
        if was != now:
            change = _replaced(was, now)
            text = f"{name}, which the function closes over: {change}"
            reasons.append(Difference(text, "variable", name, (was, now), change))
    options = old.program.options
    for name, now in new.program.options.items():
        if str(options[name]) != str(now):
            reasons.append(Difference(f"{name}: {options[name]} → {now}"))
    if not reasons and list(old.facts) != list(new.facts):
        reasons.append(Difference("the order of attributes, or of the keys of a dict"))
    if not reasons:
        text = (
            "the function reaches its modules in another way: a variable, a default or a helper is now "
            "bound to something else"
        )
        reasons.append(Difference(text))
    return reasons


_SETTINGS = {"setting": "setting", "static": "static argument"}
# If one of these is different, its content differs too.
_WITH_PARTS = ("module", "container", "pytree")


def _structure(old: dict[Path, Any], new: dict[Path, Any]) -> Iterator[Difference]:
    done: list[Path] = []

    def is_inside(path: Path) -> bool:
        return any(path[: len(d)] == d for d in done)

    for path in [*new, *(p for p in old if p not in new)]:
        was, now = old.get(path), new.get(path)
        if was == now or is_inside(path) or path[:1] == _STEPS:
            continue
        if was is None or now is None or was.kind != now.kind or was.kind in _WITH_PARTS:
            done.append(path)
        text = _fact(path, was, now)
        if was is not None and now is not None and was.kind == now.kind and now.kind in _SETTINGS:
            name = path[1] if now.kind == "static" else dotted(path)
            change = _change(was.detail, now.detail)
            yield Difference(text, _SETTINGS[now.kind], name, (was.detail, now.detail), change)
        elif text:
            yield Difference(text)


def _fact(path: Path, was: Any, now: Any) -> str:
    name = dotted(path)
    thing = now if now is not None else was
    if path[0] == "the scope":
        name = f"{' '.join(path[2:])!r}"
        what = "the flag" if path[1:2] == ("flags",) else "the random stream"
        if len(path) < 3:
            return f"{'a' if was is None else 'no'} scope is active"
        if was is None or now is None:
            return f"{what} {name} of the scope was {'set' if was is None else 'taken away'}"
        return f"{what} {name} of the scope: {_change(was.detail, now.detail)}"
    if thing.kind == "static":
        name = path[1]
        if was is None or now is None:
            return f"the static argument {name} was {'given' if was is None else 'left out'}"
        return f"the static argument {name}: {_change(was.detail, now.detail)}"
    if thing.kind == "constant":
        if was is None or now is None:
            return ""
        return (
            f"{dotted(path[:-1])} is another array. In a module that the function closes over, it is a "
            f"constant of the program. Pass the module as an argument, or make the array a Ref"
        )
    if was is None or now is None:
        verb = "added" if was is None else "removed"
        setting = f" = {thing.detail!r}" if thing.kind == "setting" else ""
        return f"{_article(thing)} {name!r}{setting} was {verb}"
    if was.kind != now.kind:
        return f"{name}: {_article(was)} → {_article(now)}"
    if was.kind == "shared":
        return f"{name}: shared with {was.detail!r} → shared with {now.detail!r}"
    if was.kind == "Ref":
        (collection, metadata), (new_collection, new_metadata) = was.detail, now.detail
        if collection != new_collection:
            return f"Ref {name!r}: {_change(collection, new_collection)}"
        return f"the metadata of Ref {name!r}: {_change(dict(metadata), dict(new_metadata))}"
    if was.kind in ("module", "container"):
        (kind, revision), (new_kind, new_revision) = was.detail, now.detail
        if kind is new_kind and revision != new_revision:
            return (
                f"the class {kind.__name__} of {name!r} was changed: a method or a class attribute"
            )
        if kind.__name__ != new_kind.__name__:
            return f"{name}: {kind.__name__} → {new_kind.__name__}"
        return f"{name}: another class with the name {kind.__name__}"
    return f"{name}: {_change(was.detail, now.detail)}"


def _replaced(was: Any, now: Any) -> str:
    # A value that is compared by identity has a number here.
    if type(was) is int or type(now) is int or was is None or now is None:
        return ANOTHER
    return _change(was, now)


def _article(thing: Thing) -> str:
    if thing.kind in ("module", "container"):
        name = thing.detail[0].__name__
        return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
    if thing.kind == "pytree":
        return f"a {thing.detail.__name__}"
    return {"shared": "a shared object", "Ref": "a Ref", "array": "an array"}.get(
        thing.kind, "an argument" if thing.kind == "argument" else "the setting"
    )


def _change(was: Any, now: Any) -> str:
    a, b = _repr(was), _repr(now)
    if a == b:
        kinds = type(getattr(was, "value", was)).__name__, type(getattr(now, "value", now)).__name__
        if kinds[0] != kinds[1]:
            return f"{a} ({kinds[0]}) → {b} ({kinds[1]})"
        return "another object with the same repr"
    return f"{a} → {b}"


def _repr(x: Any) -> str:
    x = x.value if isinstance(x, Static) or hasattr(x, "value") else x
    if isinstance(x, type) or callable(x):
        return getattr(x, "__qualname__", repr(x))
    text = repr(x)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(aval: Any) -> str:
    if isinstance(aval, tuple):
        return f"({', '.join(map(_text, aval))})"
    if not hasattr(aval, "shape"):
        return getattr(aval, "__name__", str(aval))
    return array_text(aval)


def _weak(was: Any, now: Any) -> str:
    """The text to add if two types read alike."""
    if _text(was) != _text(now):
        return ""
    if getattr(was, "weak_type", None) != getattr(now, "weak_type", None):
        kinds = ["a Python number" if x.weak_type else "an array" for x in (was, now)]
        return f", {kinds[0]} (or made of one) before, now {kinds[1]}"
    return ", on other devices or sharded otherwise"


def placed_elsewhere(old: View, new: Program) -> list[str]:
    names = list(old.values)
    reasons = []
    known, now = old.program.placements[-1], new.placements[0]
    for i in sorted({*known, *now}):
        if known.get(i) != now.get(i):
            name = names[i] if len(names) > i else f"input {i}"
            reasons.append(f"{name}: {_device(known.get(i))} → {_device(now.get(i))}")
    # If a value is on several devices, its placement is part of the trace.
    if new.layout is old.program.layout:
        reasons.append("this is compiled again, but not traced")
    return reasons


def _device(sharding: Any) -> str:
    if sharding is None:
        return "not committed to a device"
    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        return f"on {next(iter(sharding.device_set))}"
    return str(sharding)
