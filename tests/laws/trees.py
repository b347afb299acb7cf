"""Laws 1, 2 and 9: random trees, and the operations of JAX, refx and other libraries on them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nnx
from tests.laws.guests import GUESTS
from tests.laws.neighbours import NEIGHBOURS
from tests.laws.program import NNX, Program, Verdict, difference, render, same, state_of
from tests.laws.world import make_world

_VALUES = (
    "jnp.int32(3)",
    "jnp.ones((2, 2))",
    "np.arange(3.0)",
    "jnp.zeros((0,))",
    "jnp.bfloat16(1)",
    "jax.random.key(0)",
)
_ODD = (
    "jax.ShapeDtypeStruct((2,), jnp.float32)",
    '{"a": jnp.ones(2), "b": (jnp.int32(1), 2.0)}',
    "[jnp.ones(2), jnp.ones(3)]",
    "()",
    "None",
    "True",
    "1.5",
)


def make(law: int, seed: int) -> Program:
    """A random tree, as a prelude whose last line binds it to `tree`."""
    rng = random.Random(f"{law} {seed}")
    world = make_world(rng, real=rng.random() < 0.3)
    for name in world.plains:
        if rng.random() < 0.5:
            world.add(f"{name}.arr = {rng.choice(_VALUES)}")
        if rng.random() < 0.3:
            world.add(f"{name}.y = ({rng.choice(_VALUES)}, [{rng.choice(_VALUES)}])")
        if rng.random() < 0.3:
            world.add(f"{name}.table = {{1: {rng.choice(_VALUES)}, 'b': {rng.choice(world.refs)}}}")
        if rng.random() < 0.3:
            world.add(f"{name}.kids = [{rng.choice(_VALUES)}, {rng.choice(world.leaves)}]")
        if rng.random() < 0.3:
            odd = rng.choice(_ODD if law == 2 else _ODD[:3])
            world.add(
                f"{name}.extra = Ref({odd}, {rng.choice(['None', chr(34) + 'params' + chr(34)])})"
            )
        if rng.random() < 0.1:
            world.add(f"{name}.late = jax.ShapeDtypeStruct((2,), jnp.float32)")
    world.add(f"tree = {_tree(rng, world.modules, world.refs, 2)}")
    return Program(law, tuple(world.lines), (), seed=seed)


def _tree(rng: random.Random, modules: list[str], refs: list[str], depth: int) -> str:
    kind = rng.randrange(8) if depth else 0
    parts = (
        [_tree(rng, modules, refs, depth - 1) for _ in range(rng.randint(1, 3))] if kind > 3 else []
    )
    if kind <= 2:
        # Modules with more contents come last.
        return rng.choice(modules[len(modules) // 2 :])
    if kind == 3:
        return rng.choice([rng.choice(refs), f"{rng.choice(modules)}.step", rng.choice(modules)])
    if kind == 4:
        return f"[{', '.join(parts)}]"
    if kind == 5:
        return f"({', '.join(parts)},)"
    return "{" + ", ".join(f"{name!r}: {part}" for name, part in zip("abc", parts)) + "}"


def judge(program: Program) -> Verdict:
    """Make the tree and check the law."""
    names = NNX.namespace() | {"jax": jax, "jnp": jnp}
    try:
        exec("\n".join(render(program.prelude, 0)), names)
        tree = names["tree"]
    except Exception as error:
        return Verdict("void", f"{type(error).__name__}: {error}")
    rng = random.Random(f"check {program.seed}")
    check = rng.choice(CHECKS[program.law])
    before = state_of(NNX, {"tree": tree}, {})
    try:
        problem = check(tree, rng)
    except nnx.RefError as error:
        if type(error).__name__ in dict(MAY.get(check.__name__, ())):
            return Verdict("raised", type(error).__name__)
        return Verdict(f"{check.__name__} raised {type(error).__name__}", str(error))
    except Exception as error:
        return Verdict(f"{check.__name__} raised {type(error).__name__}", str(error))
    if problem:
        return Verdict(check.__name__, problem)
    if check not in CHANGING and not same(before, state_of(NNX, {"tree": tree}, {})):
        return Verdict(
            f"{check.__name__} changed the tree",
            difference(before, state_of(NNX, {"tree": tree}, {})),
        )
    return Verdict("ok", check.__name__)


class _Thing:
    """An object that no library knows."""


def _objects(rng: random.Random, count: int) -> list[Any]:
    mesh = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    makers: list[Callable[[], Any]] = [
        lambda: rng.random() < 0.5,
        lambda: "a string",
        _Thing,
        lambda: jax.ShapeDtypeStruct((2,), jnp.float32),
        lambda: mesh,
        lambda: jax.sharding.PartitionSpec("x"),
        lambda: 3,
        lambda: 0.5,
        lambda: np.ones(2),
        lambda: jnp.ones(2),
        lambda: len,
        lambda: ...,
        lambda: {1, 2},
        lambda: lambda: None,
        lambda: np.float32,
        lambda: np.dtype("int8"),
    ]
    if rng.random() < 0.6:
        makers = [rng.choice(makers)]
    return [rng.choice(makers)() for _ in range(count)]


def objects_as_leaves(tree: Any, rng: random.Random) -> str | None:
    """flatten(unflatten(treedef, objects)) is (objects, treedef)."""
    _, treedef = jax.tree.flatten(tree)
    objects = _objects(rng, treedef.num_leaves)
    made = jax.tree.unflatten(treedef, objects)
    for again in (made, jax.tree.map(lambda x: x, made)):
        leaves, now = jax.tree.flatten(again)
        if len(leaves) != len(objects) or any(a is not b for a, b in zip(leaves, objects)):
            return f"leaves {objects} came back as {leaves}"
        if now != treedef or hash(now) != hash(treedef):
            return f"with leaves {objects} the structure is\n{now}\nand not\n{treedef}"
        keyed = jax.tree_util.tree_flatten_with_path(again)[0]
        if any(a is not b for (_, a), b in zip(keyed, objects)) or len(keyed) != len(objects):
            return f"with paths, leaves {objects} came back as {keyed}"
        if [p for p, _ in keyed] != [
            p for p, _ in jax.tree_util.tree_leaves_with_path(tree)
        ] and all(x is not None for x in jax.tree.leaves(tree)):
            return f"the paths of leaves {objects} are {[p for p, _ in keyed]}"
    return None


def trees_as_leaves(tree: Any, rng: random.Random) -> str | None:
    """The replacements of leaves may be trees or None; `is_leaf` stops at them."""
    _, treedef = jax.tree.flatten(tree)
    makers: list[Callable[[], Any]] = [
        lambda: (1, 2), lambda: None, lambda: [1], dict, lambda: {"a": object()}, lambda: 5,
        lambda: nnx.Ref(jnp.ones(2)), lambda: NNX.classes["Leaf"](1, 2),
        lambda: nnx.split(NNX.classes["Leaf"](1, 2))[1],
    ]  # fmt: skip
    if rng.random() < 0.5:
        makers = [rng.choice(makers)]
    objects = [rng.choice(makers)() for _ in range(treedef.num_leaves)]
    made = jax.tree.unflatten(treedef, objects)
    ids = {id(x) for x in objects}
    leaves, now = jax.tree.flatten(made, is_leaf=lambda x: id(x) in ids)
    if len(leaves) != len(objects) or any(a is not b for a, b in zip(leaves, objects)):
        return f"with is_leaf, {objects} came back as {leaves}"
    if now != treedef:
        return f"with is_leaf and {objects} the structure is\n{now}\nand not\n{treedef}"
    inner = jax.tree.leaves(made)
    if len(inner) != len(jax.tree.leaves(objects)) or any(
        a is not b for a, b in zip(inner, jax.tree.leaves(objects))
    ):
        return f"the leaves of {objects} came back as {inner}"
    return None


def rebuilt(tree: Any, rng: random.Random) -> str | None:
    """A tree that JAX rebuilt from its own leaves is equal to it, with new objects."""
    found = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, (nnx.Module, nnx.Ref)))
    for x in (x for x in found if isinstance(x, (nnx.Module, nnx.Ref))):
        leaves, treedef = jax.tree.flatten(x)
        if problem := _alike(x, jax.tree.unflatten(treedef, leaves)):
            return problem
    return None


def _alike(tree: Any, made: Any) -> str | None:
    expected, got = state_of(NNX, {"t": tree}, {}), state_of(NNX, {"t": made}, {})
    return None if same(expected, got) else difference(expected, got)


def split_and_merge(tree: Any, rng: random.Random) -> str | None:
    """merge(split(t)) is t with fresh Refs."""
    filters = rng.choice(
        [(), ("params", ...), ("counters", None, ...), (lambda path, ref: len(path) > 1, ...)]
    )
    dagdef, *parts = nnx.split(tree, *filters)
    made = nnx.merge(dagdef, *parts)
    if set(map(id, NNX.refs(tree))) & set(map(id, NNX.refs(made))):
        return "merge gives a Ref of the original"
    if problem := _alike(tree, made):
        return problem
    again, *parts2 = nnx.split(made, *filters)
    if again != dagdef or hash(again) != hash(dagdef):
        return f"the second split gives another structure: {again} and not {dagdef}"
    if [list(p) for p in parts] != [list(p) for p in parts2]:
        return f"the paths are {[list(p) for p in parts2]} and not {[list(p) for p in parts]}"
    if list(nnx.refs(tree)) != list(nnx.refs(made)):
        return f"the paths of Refs are {list(nnx.refs(made))} and not {list(nnx.refs(tree))}"
    return _alike(tree, nnx.clone(tree))


def all_or_nothing(tree: Any, rng: random.Random) -> str | None:
    """An update writes everything, or raises and writes nothing."""
    cells = nnx.refs(tree)
    arrays = {p: r for p, r in cells.items() if isinstance(r.value, jax.Array)}
    new: dict[Any, Any] = {
        p: jnp.zeros_like(r.value) for p, r in arrays.items() if r.value.dtype.kind in "if"
    }
    wrong = rng.choice([None, "path", "shape", "dtype", "type"]) if new else "path"
    path = rng.choice(list(new)) if new else ()
    if wrong == "path":
        new[("nothing", "here")] = jnp.ones(())
    elif wrong == "shape":
        new[path] = jnp.zeros((7, 7), new[path].dtype)
    elif wrong == "dtype":
        new[path] = new[path].astype(jnp.int8)
    elif wrong == "type":
        new[path] = {"a": new[path]}
    items = list(new.items())
    rng.shuffle(items)
    before = state_of(NNX, {"tree": tree}, {})
    try:
        nnx.update(tree, nnx.Partition(dict(items)) if rng.random() < 0.5 else dict(items))
    except nnx.RefError:
        after = state_of(NNX, {"tree": tree}, {})
        if wrong is None:
            raise
        return (
            None
            if same(before, after)
            else f"a failed update ({wrong}): {difference(before, after)}"
        )
    if wrong is not None:
        return f"no error for a wrong {wrong}"
    return next(
        (f"{p} was not written" for p, r in arrays.items() if p in new and r.value is not new[p]),
        None,
    )


CHANGING = {all_or_nothing}
CHECKS: dict[int, tuple[Any, ...]] = {
    1: (objects_as_leaves, objects_as_leaves, trees_as_leaves, rebuilt),
    2: (split_and_merge, all_or_nothing),
    9: NEIGHBOURS + GUESTS,
}
# The errors that a check may raise, and why.
MAY: dict[str, dict[str, str]] = {
    "held_by_another": {"ClosureError": "what the other library hides cannot be an input"},
}
