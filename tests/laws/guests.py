"""More habits of other libraries with a module as a pytree: computing with it, keeping its parts, holding it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nnx
from tests.laws.program import NNX, difference, same, state_of


class Record:
    """A pytree of another library that flattens everything in its attributes at once."""

    def __init__(self, **held: Any):
        self.__dict__.update(held)


def _flatten(record: Record) -> Any:
    leaves, treedef = jax.tree.flatten(record.__dict__)
    return leaves, treedef


jax.tree_util.register_pytree_node(
    Record, _flatten, lambda treedef, leaves: Record(**jax.tree.unflatten(treedef, leaves))
)


def _state(tree: Any) -> Any:
    return state_of(NNX, {"t": tree}, {})


def _one(tree: Any, rng: random.Random) -> Any:
    """A module of the tree; only inside a module does JAX's rebuilding keep sharing."""
    found = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, (nnx.Module, nnx.Ref)))
    return rng.choice([x for x in found if isinstance(x, (nnx.Module, nnx.Ref))])


def _is_number(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray)) and jnp.issubdtype(x.dtype, jnp.number)


def _only_numbers(tree: Any) -> bool:
    leaves = jax.tree.leaves(tree)
    return bool(leaves) and all(map(_is_number, leaves))


def _floating(tree: Any) -> Any:
    """The tree with its arrays as floating-point numbers."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def _sum(tree: Any) -> Any:
    """A number that depends nonlinearly on the arrays of a tree."""
    found = jnp.float32(0)
    for i, x in enumerate(jax.tree.leaves(tree)):
        found = found + (i + 1) * jnp.sum(jnp.sin(jnp.asarray(x, jnp.float32)))
    return found


def _halves(tree: Any, marks: list[bool]) -> tuple[Any, Any]:
    leaves, treedef = jax.tree.flatten(tree)
    first = [x if k else None for x, k in zip(leaves, marks)]
    second = [None if k else x for x, k in zip(leaves, marks)]
    return jax.tree.unflatten(treedef, first), jax.tree.unflatten(treedef, second)


def _combine(first: Any, second: Any) -> Any:
    return jax.tree.map(
        lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None
    )


# Ways in which libraries call a function of one tree; each returns its value.
_CALLS: dict[str, Callable[..., Any]] = {
    "plain": lambda f, x: f(x),
    "jit": lambda f, x: jax.jit(f)(x),
    "nnx.jit": lambda f, x: nnx.jit(f)(x),
    "jit_filter": lambda f, x: nnx.jit_filter(f)(x),
    "checkpoint": lambda f, x: jax.checkpoint(f)(x),
    "remat": lambda f, x: nnx.remat(f)(x),
    "vmap": lambda f, x: jax.vmap(f, in_axes=None, axis_size=2)(x)[1],
    "cond": lambda f, x: jax.lax.cond(jnp.array(True), f, f, x),
    "scan": lambda f, x: jax.lax.scan(lambda c, _: (c, f(c)), x, None, length=2)[1][1],
    "while": lambda f, x: jax.lax.while_loop(
        lambda c: c[1] < 1, lambda c: (c[0], c[1] + 1, f(c[0])), (x, 0, 0.0)
    )[2],
    "nnx.cond": lambda f, x: nnx.cond(jnp.array(True), f, f, x),
    "linearize": lambda f, x: jax.linearize(f, x)[0],
    "vjp": lambda f, x: jax.vjp(f, x)[0],
    "aot": lambda f, x: jax.jit(f).lower(x).compile()(x),
    "callback": lambda f, x: jax.jit(lambda x: jax.lax.stop_gradient(f(x)))(x),
}


def combined_in_a_transformation(tree: Any, rng: random.Random) -> str | None:
    """One half of a module is an argument and the other a closed-over constant, in every transformation."""
    if not _only_numbers(tree):
        return None
    tree = _floating(tree)
    count = len(jax.tree.leaves(tree))
    # A Ref that holds an array must not be a constant of a program that plain JAX keeps.
    first, second = _halves(tree, [True] * count)
    name = rng.choice(list(_CALLS))
    got = _CALLS[name](lambda p: _sum(_combine(p, second)), first)
    expected = _sum(tree)
    return None if np.allclose(got, expected, 1e-4) else f"{name}: expected {expected}, got {got}"


def gradient_of_a_half(tree: Any, rng: random.Random) -> str | None:
    """`jax.grad`, `vjp` and `jvp` with respect to half of a module, the other half closed over."""
    if not _only_numbers(tree):
        return None
    tree = _floating(tree)
    leaves = jax.tree.leaves(tree)
    marks = [rng.random() < 0.6 for _ in leaves]
    first, second = _halves(tree, marks)

    def f(first: Any) -> Any:
        return _sum(_combine(first, second))

    kind = rng.randrange(4)
    if kind == 0:
        got = jax.grad(f)(first)
    elif kind == 1:
        got = jax.vjp(f, first)[1](jnp.float32(1))[0]
    elif kind == 2:
        got = jax.value_and_grad(f)(first)[1]
    else:
        # Both halves as arguments of a compiled function.
        got = jax.jit(jax.grad(lambda a, b: _sum(_combine(a, b))))(first, second)
    # In the order of the halves, `_sum` counts by the place among all leaves.
    expected = [
        (i + 1) * jnp.cos(x) for i, (x, k) in enumerate(zip(leaves, marks, strict=True)) if k
    ]
    found = jax.tree.leaves(got)
    right = len(found) == len(expected) and all(map(np.allclose, found, expected))
    return None if right else f"way {kind}: expected {expected}, got {found}"


def written_where_nobody_sees(tree: Any, rng: random.Random) -> str | None:
    """A copy that plain JAX made cannot be written if the update would be lost; otherwise it is an ordinary copy."""
    tree = _one(tree, rng)
    refs = [r for r in NNX.refs(tree) if isinstance(r.value, jax.Array)]
    if not refs or not _only_numbers(tree):
        return None
    was = _state(tree)

    def f(copy: Any) -> Any:
        for ref in NNX.refs(copy):
            if isinstance(ref.value, jax.Array):
                ref.value = ref.value + jnp.ones((), ref.value.dtype)
        return _sum(copy)

    kinds = ["plain", "jit", "checkpoint", "cond", "scan", "vmap"]
    name = rng.choice(kinds)
    copy = jax.tree.map(lambda x: x, tree)
    try:
        _CALLS[name](f, copy)
    except nnx.ReadOnlyError:
        return None if name != "plain" else "a copy that is no one else's may be written"
    if name != "plain":
        return f"{name}: a write was lost, without an error"
    return None if same(was, _state(tree)) else "the write of a copy reached the original"


def mapped_and_back(tree: Any, rng: random.Random) -> str | None:
    """Shapes, bools or names in the place of the leaves, and then arrays again: a module like any other."""
    tree = _one(tree, rng)
    values = iter(jax.tree.leaves(tree))
    made: dict[int, Any] = {}
    to = rng.choice(
        [
            lambda x: jax.ShapeDtypeStruct(np.shape(x), getattr(x, "dtype", np.float32)),
            lambda x: True,
            lambda x: "a name",
            lambda x: None,
            lambda x: jax.sharding.PartitionSpec(),
            lambda x: (np.shape(x),),
        ]
    )

    def new(x: Any) -> Any:
        found = to(x)
        made[id(found)] = found
        return found

    # The replacement of a leaf may itself be a tree, so `is_leaf` stops at it.
    mapped = jax.tree.map(new, tree)
    back = jax.tree.map(lambda _: next(values), mapped, is_leaf=lambda x: id(x) in made)
    if not same(_state(tree), _state(back)):
        return difference(_state(tree), _state(back))
    if not all(_is_number(r.value) for r in NNX.refs(tree)):
        return None
    one = nnx.clone(tree)
    NNX.real = False
    for x in (one, back):
        nnx.jit(lambda m: NNX.bump(m))(x)
    return None if same(_state(one), _state(back)) else difference(_state(one), _state(back))


def kept_and_changed(tree: Any, rng: random.Random) -> str | None:
    """Kept parts of a module stay as they were, whatever happens to its structure afterwards."""
    # The tree is not the caller's, so it may change here.
    tree = nnx.clone(_one(tree, rng))
    was = _state(tree)
    leaves, treedef = jax.tree.flatten(tree)
    keyed = jax.tree_util.tree_flatten_with_path(tree)
    copy = jax.tree.map(lambda x: x, tree)
    again = jax.tree_util.Partial(lambda treedef, leaves: jax.tree.unflatten(treedef, leaves))
    if isinstance(tree, nnx.Module):
        change = rng.randrange(4)
        if change == 0:
            tree.extra = nnx.Ref(jnp.ones(3))
        elif change == 1:
            tree.mode = "another"
        elif change == 2:
            tree.head = NNX.classes["Leaf"](jnp.float32(1), jnp.float32(2))
        else:
            tree.arr = jnp.arange(3)
    for ref in NNX.refs(tree):
        if isinstance(ref.value, jax.Array):
            ref.value = jnp.zeros_like(ref.value)
    for made in (copy, jax.tree.unflatten(treedef, leaves), again(treedef, leaves)):
        if not same(was, _state(made)):
            return difference(was, _state(made))
    if keyed[1] != treedef or not all(a is b for (_, a), b in zip(keyed[0], leaves)):
        return "with paths, other leaves or another structure were kept"
    if not _only_numbers(copy):
        return None
    got = jax.jit(lambda xs: _sum(jax.tree.unflatten(treedef, xs)))(leaves)
    expected = _sum(leaves)
    return None if np.allclose(got, expected, 1e-4) else f"expected {expected}, got {got}"


def held_in_a_record(tree: Any, rng: random.Random) -> str | None:
    """A pytree that flattens modules itself: alone, inside another, beside the module, and replaced later."""
    if not _only_numbers(tree) or not all(_is_number(r.value) for r in NNX.refs(tree)):
        return None
    tree = _one(_floating(tree), rng)
    outer = NNX.classes["Plain"]()
    record = Record(net=tree, scale=jnp.float32(2))
    outer.head = rng.choice([record, [record], {"a": record}, Record(inner=record)])
    if rng.random() < 0.5:
        outer.late = tree

    def find() -> Any:
        held = outer.head
        held = held[0] if isinstance(held, list) else held["a"] if isinstance(held, dict) else held
        return getattr(held, "inner", held)

    def value(module: Any, found: Any) -> Any:
        return _sum(found.net) * found.scale

    way = rng.randrange(4)
    if way == 0:
        # The gradient goes through the record to the one Ref, however it is reached.
        params = nnx.get_partition(outer)
        if not len(params):
            return None
        grads = nnx.grad(lambda m: _sum(_net(m)), wrt=...)(outer)
        given = {id(r): i for i, r in enumerate(NNX.refs(tree))}
        got = [g for path, g in grads.items() if np.any(np.asarray(g) != 0)]
        return None if got or not given else f"no gradient reached {list(grads)}"
    if way == 1:
        # Updates inside nnx.jit come back through it.
        refs = NNX.refs(tree)
        if not refs:
            return None
        before = refs[0].value
        nnx.jit(lambda m: _raise_by_one(_net(m)))(outer)
        got, expected = refs[0].value, before + 1
        return None if np.allclose(got, expected) else f"expected {expected}, got {got}"
    step = nnx.jit(lambda m: _sum(_net(m))) if way == 2 else nnx.jit(lambda: _sum(_net(outer)))
    arguments = (outer,) if way == 2 else ()
    for _ in range(2):
        got, expected = step(*arguments), _sum(find().net)
        if not np.allclose(got, expected, 1e-4):
            return f"way {way}: expected {expected}, got {got}"
        find().net = jax.tree.map(lambda x: x + 1, find().net)
    return None


def record_as_an_argument(tree: Any, rng: random.Random) -> str | None:
    """A pytree that flattens a module itself, beside the module: a write by one name is read by the other."""
    if not _only_numbers(tree) or not all(_is_number(r.value) for r in NNX.refs(tree)):
        return None
    tree = _one(_floating(tree), rng)
    refs = NNX.refs(tree)
    if not refs:
        return None
    record = Record(net=tree, scale=jnp.float32(2))
    record = rng.choice([record, [record], {"a": record}, Record(net=[record])])

    def body(a: Any, b: Any) -> Any:
        _raise_by_one(a)
        return _sum(b)

    arguments = (tree, record)
    if rng.random() < 0.5:
        body, arguments = (lambda b, a, body=body: body(a, b)), (record, tree)
    before = [r.value for r in refs]
    name = rng.choice(list(_OWN))
    got = _OWN[name](body, arguments)
    after = [x + 1 for x in before]
    if not all(map(np.allclose, [r.value for r in refs], after)):
        return f"{name}: expected {after} in the module, got {[r.value for r in refs]}"
    expected = _sum(record)
    return None if np.allclose(got, expected, 1e-4) else f"{name}: expected {expected}, got {got}"


_OWN: dict[str, Callable[..., Any]] = {
    "jit": lambda f, args: nnx.jit(f)(*args),
    "jit twice": lambda f, args: nnx.jit(lambda *a: nnx.jit(f)(*a))(*args),
    "remat": lambda f, args: nnx.remat(f)(*args),
    "cond": lambda f, args: nnx.cond(jnp.array(True), f, lambda *a: jnp.float32(0), *args),
    "scan": lambda f, args: nnx.scan(lambda c, _: (c, f(*c)), args, None, length=1)[1][0],
    "fori_loop": lambda f, args: nnx.fori_loop(
        0, 1, lambda i, c: (c[0], f(*c[0])), (args, jnp.float32(0))
    )[1],
}


def _net(outer: Any) -> Any:
    held = outer.head
    held = held[0] if isinstance(held, list) else held["a"] if isinstance(held, dict) else held
    return getattr(held, "inner", held).net


def _raise_by_one(module: Any) -> None:
    for ref in NNX.refs(module):
        ref.value = ref.value + 1


_LABELS: tuple[Callable[[int], Any], ...] = (
    lambda i: f"name {i}",
    lambda i: "ab"[i % 2],
    lambda i: jax.sharding.PartitionSpec(f"x{i}"),
    lambda i: (f"a{i}", "b"),
    lambda i: np.dtype(["int8", "int16", "int32"][i % 3]),
)


def ref_without_arrays(tree: Any, rng: random.Random) -> str | None:
    """A Ref that holds no array is a constant of a program that closes over it, and is never stale."""
    make = rng.choice(_LABELS)
    tree = jax.tree.map(lambda _: make(0), _one(tree, rng))
    refs = NNX.refs(tree)
    if not refs:
        return None
    ref = rng.choice(refs)
    name = rng.choice([n for n in _CALLS if n != "aot"])
    seen: list[Any] = []

    def f(x: Any) -> Any:
        seen.append(ref.value)
        return x + float(sum(map(ord, repr(ref.value))))

    other = f if rng.random() < 0.5 else lambda x: f(x)
    kept = {"jit": jax.jit(other), "nnx.jit": nnx.jit(other), "jit_filter": nnx.jit_filter(other)}
    call = kept.get(name, lambda x: _CALLS[name](other, x))
    for i in range(3):
        got, expected = call(jnp.float32(i)), i + float(sum(map(ord, repr(ref.value))))
        if not np.allclose(got, expected):
            return f"{name}, call {i}: expected {expected}, got {got} for {ref.value!r}"
        try:
            ref.value = make(i + 1)
        except nnx.ClosureError:
            # A program that plain JAX keeps has it as a constant, so it must not be written any more.
            return None if name in _KEPT else f"{name}: {ref.value!r} may not be written"
    return None


# The transformations for which plain JAX keeps a program for the next call.
_KEPT = ("jit", "checkpoint", "cond", "scan", "while", "callback")

GUESTS = (
    combined_in_a_transformation,
    gradient_of_a_half,
    written_where_nobody_sees,
    mapped_and_back,
    kept_and_changed,
    held_in_a_record,
    record_as_an_argument,
    ref_without_arrays,
)
