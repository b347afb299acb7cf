"""Habits of other libraries with a module as a pytree."""

from __future__ import annotations

import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nnx
from tests.laws.program import NNX, difference, same, state_of


class Holder:
    """A pytree of another library that flattens a module itself."""

    def __init__(self, module: Any):
        self.module = module


def _flatten(holder: Holder) -> Any:
    leaves, treedef = jax.tree.flatten(holder.module)
    return leaves, treedef


jax.tree_util.register_pytree_node(
    Holder, _flatten, lambda treedef, leaves: Holder(jax.tree.unflatten(treedef, leaves))
)


def _state(tree: Any) -> Any:
    return state_of(NNX, {"t": tree}, {})


def _module(tree: Any, rng: random.Random) -> Any:
    """One module of the tree: only inside a module does JAX's rebuilding keep sharing."""
    found = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, (nnx.Module, nnx.Ref)))
    return rng.choice([x for x in found if isinstance(x, (nnx.Module, nnx.Ref))])


def _arrays_only(tree: Any) -> bool:
    """Whether plain JAX can compile for the leaves."""
    return all(isinstance(x, (jax.Array, np.ndarray)) for x in jax.tree.leaves(tree))


def _numbers(leaves: list[Any]) -> Any:
    """One number computed from the arrays among some leaves."""
    found = jnp.float32(0)
    for i, x in enumerate(leaves):
        # A number in a Ref is an array in a compiled program.
        numeric = type(x) in (int, float)
        if isinstance(x, (jax.Array, np.ndarray)):
            numeric = jnp.issubdtype(x.dtype, jnp.number)
        if numeric:
            found = found + (i + 1) * jnp.sum(jnp.asarray(x, jnp.float32))
    return found


def partition_and_combine(tree: Any, rng: random.Random) -> str | None:
    """Equinox's idiom: split into two trees, each with None where the other has a leaf, and combine them."""
    tree = _module(tree, rng)
    marks = {id(x): rng.random() < 0.5 for x in jax.tree.leaves(tree)}
    first = jax.tree.map(lambda x: x if marks[id(x)] else None, tree)
    second = jax.tree.map(lambda x: None if marks[id(x)] else x, tree)
    both = jax.tree.map(
        lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None
    )
    a, b = _state(tree), _state(both)
    return None if same(a, b) else difference(a, b)


def partition_under_jit(tree: Any, rng: random.Random) -> str | None:
    """The same with one half closed over and the other an argument of `jax.jit`, or of `jax.grad`."""
    leaves = jax.tree.leaves(tree)
    kind = rng.choice([jax.jit, nnx.jit_filter, nnx.jit, lambda f: f])
    # A Ref that holds an array must not become a constant of a program that `jax.jit` keeps.
    all_arrays = kind is jax.jit
    marks = [
        isinstance(x, (jax.Array, np.ndarray)) and (all_arrays or rng.random() < 0.5)
        for x in leaves
    ]
    treedef = jax.tree.structure(tree)
    first = jax.tree.unflatten(treedef, [x if k else None for x, k in zip(leaves, marks)])
    second = jax.tree.unflatten(treedef, [None if k else x for x, k in zip(leaves, marks)])

    def f(first: Any) -> Any:
        both = jax.tree.map(
            lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None
        )
        return _numbers(jax.tree.leaves(both))

    got = kind(f)(first)
    expected = _numbers(leaves)
    return None if np.allclose(got, expected) else f"expected {expected}, got {got}"


def mask_closed_over(tree: Any, rng: random.Random) -> str | None:
    """A closed-over tree of bools from `jax.tree.map`; then another one under the same name."""
    if not all(isinstance(x, (jax.Array, np.ndarray, float, int)) for x in jax.tree.leaves(tree)):
        return None
    kind = rng.choice([jax.jit, nnx.jit, nnx.jit_filter])
    label = rng.choice([bool, lambda k: "yes" if k else "no", int])

    def new_mask() -> Any:
        return jax.tree.map(lambda _: label(rng.random() < 0.5), tree)

    mask = new_mask()

    def f(tree: Any) -> Any:
        chosen = jax.tree.map(lambda x, k: x if k in (True, "yes") else None, tree, mask)
        return _numbers(jax.tree.leaves(chosen))

    compiled = kind(f)
    for i in range(3):
        if i == 2 and kind is jax.jit:
            break  # JAX keeps the closed-over values as constants.
        if i == 2:
            mask = new_mask()
        got, expected = compiled(tree), f(tree)
        if not np.allclose(got, expected):
            return f"{kind.__name__}, call {i}: expected {expected}, got {got}; mask {mask}"
    return None


def mask_as_argument(tree: Any, rng: random.Random) -> str | None:
    """A tree of bools as `filter_tree`, and for `jax.tree.map` with a tree of axes or shapes."""
    mask = jax.tree.map(lambda x: isinstance(x, jax.Array), tree)
    shapes = jax.tree.map(lambda x: getattr(x, "shape", ()), tree)
    if not all(type(k) is bool for k in jax.tree.leaves(mask)):
        return f"a mask has the leaves {jax.tree.leaves(mask)}"
    sizes = jax.tree.map(
        lambda x, s: int(np.prod(s)), tree, shapes, is_leaf=lambda x: type(x) is tuple and not x
    )
    expected = [int(np.prod(getattr(x, "shape", ()))) for x in jax.tree.leaves(tree)]
    got = jax.tree.leaves(sizes)
    return None if got == expected else f"expected {expected}, got {got}"


_CONSTANTS = (
    lambda x: "text",
    lambda x: None,
    lambda x: jax.sharding.PartitionSpec("x"),
    lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.float32),
    lambda x: np.array(["a", "b"]),
    lambda x: np.array(["a", 1, None], object),
    lambda x: jnp.float32,
)


def constants_among_values(tree: Any, rng: random.Random) -> str | None:
    """Some of the leaves are no arrays any more, by argument and by closure, in any transformation."""
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree)):
        return None
    held = [NNX.classes["Plain"](), tree]
    held[0].x = nnx.Ref({"a": jnp.ones(2), "b": [jnp.zeros(3), jnp.arange(2.0)]})

    def fill() -> Any:
        return jax.tree.map(lambda x: rng.choice(_CONSTANTS)(x) if rng.random() < 0.4 else x, held)

    def f(tree: Any) -> Any:
        leaves = jax.tree.leaves(tree)
        others = [x for x in leaves if not isinstance(x, (jax.Array, bool, int, float, np.generic))]
        others = [x for x in others if getattr(getattr(x, "dtype", None), "kind", "O") in "OU"]
        return _numbers(leaves) + sum(len(str(x)) for x in others if not hasattr(x, "aval"))

    mixed = fill()
    kind = rng.choice(
        [
            nnx.jit,
            nnx.jit_filter,
            nnx.remat,
            lambda f: lambda *a: nnx.checkify(f)(*a)[1],
            lambda f: lambda *a: nnx.cond(True, f, f, *a),
            lambda f: lambda *a: nnx.scan(lambda c, _: (c, f(*c)), a, None, length=1)[1][0],
            lambda f: lambda *a: nnx.vmap(f, in_axes=None, axis_size=2)(*a)[0],
            lambda f: lambda *a: nnx.value_and_grad(lambda x, a: x + f(*a))(0.0, a)[0],
        ]
    )
    by_argument = rng.random() < 0.5
    run = kind(f) if by_argument else kind(lambda: f(mixed))
    for i in range(3):
        if i == 2:
            mixed = fill()
        got = run(mixed) if by_argument else run()
        if not np.allclose(got, f(mixed), atol=1e-5):
            return f"call {i}: expected {f(mixed)}, got {got}"
    return None


def kept_for_later(tree: Any, rng: random.Random) -> str | None:
    """Kept leaves and structure give the tree as it was, whatever happened to it since."""
    tree = _module(tree, rng)
    was = _state(tree)
    leaves, treedef = jax.tree.flatten(tree)
    refs = [r for r in NNX.refs(tree) if isinstance(r.value, jax.Array)]
    old = [r.value for r in refs]
    for ref in refs:
        ref.value = jnp.zeros_like(ref.value)
    got = _state(jax.tree.unflatten(treedef, leaves))
    for ref, value in zip(refs, old):
        ref.value = value
    return None if same(was, got) else difference(was, got)


def held_by_another(tree: Any, rng: random.Random) -> str | None:
    """A pytree that flattens a module itself, as an argument, by closure, and in an attribute."""
    if not _arrays_only(tree):
        return None
    holder = Holder(tree)
    expected = _numbers(jax.tree.leaves(tree))
    way = rng.randrange(4)
    if way == 0:
        got = jax.jit(lambda h: _numbers(jax.tree.leaves(h)))(holder)
    elif way == 1:
        got = nnx.jit(lambda h: _numbers(jax.tree.leaves(h)))(holder)
    elif way == 2:
        outer = NNX.classes["Plain"]()
        outer.head = holder
        got = nnx.jit(lambda m: _numbers(jax.tree.leaves(m.head)))(outer)
    else:
        got = nnx.jit(lambda: _numbers(jax.tree.leaves(holder.module)))()
    if not np.allclose(got, expected):
        return f"way {way}: expected {expected}, got {got}"
    refs = [r for r in NNX.refs(tree) if _is_plain_number(r.value)]
    if refs and way == 3:
        compiled = nnx.jit(lambda: _numbers(jax.tree.leaves(holder.module)))
        compiled()
        old = refs[0].value
        refs[0].value = old + 1
        got, expected = compiled(), _numbers(jax.tree.leaves(tree))
        refs[0].value = old
        if not np.allclose(got, expected):
            return f"after a write: expected {expected}, got {got}"
    return None


def _is_plain_number(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.number)


def shapes_only(tree: Any, rng: random.Random) -> str | None:
    """A tree of ShapeDtypeStructs can be read where it was made and in any transformation."""
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(getattr(x, "shape", ()), getattr(x, "dtype", np.float32)),
        tree,
    )
    expected = sum(int(np.prod(x.shape)) + i for i, x in enumerate(jax.tree.leaves(shapes)))

    def f(*_: Any) -> Any:
        found = jax.tree.leaves(shapes)
        return jnp.float32(sum(int(np.prod(x.shape)) + i for i, x in enumerate(found)))

    ways = [
        f,
        nnx.jit(f),
        lambda: jax.jit(f)(),
        lambda: nnx.cond(jnp.array(True), f, f),
        lambda: nnx.vmap(f)(jnp.arange(2.0))[0],
        lambda: nnx.scan(lambda c, _: (f(), None), jnp.float32(0), None, length=2)[0],
        nnx.remat(f),
    ]
    way = rng.randrange(len(ways))
    got = ways[way]()
    return None if float(got) == expected else f"way {way}: expected {expected}, got {got}"


def axes_as_tree(tree: Any, rng: random.Random) -> str | None:
    """`jax.vmap` over a stack of the tree, with a tree of axes."""
    if not _arrays_only(tree) or not jax.tree.leaves(tree):
        return None
    stacked = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * 2), tree)
    axes = jax.tree.map(lambda _: 0, tree) if rng.random() < 0.7 else 0
    got = jax.vmap(lambda t: _numbers(jax.tree.leaves(t)), in_axes=(axes,))(stacked)
    expected = _numbers(jax.tree.leaves(tree))
    return None if np.allclose(got, expected) else f"expected {expected} twice, got {got}"


def ahead_of_time(tree: Any, rng: random.Random) -> str | None:
    """`lower().compile()`, `eval_shape` and `custom_vjp` of JAX over the tree."""
    if not _arrays_only(tree):
        return None

    def f(tree: Any) -> Any:
        return _numbers(jax.tree.leaves(tree))

    expected = f(tree)
    way = rng.randrange(4)
    if way == 0:
        got = jax.jit(f).lower(tree).compile()(tree)
    elif way == 1:
        shape = jax.eval_shape(lambda t: t, tree)
        a, b = jax.tree.structure(tree), jax.tree.structure(shape)
        return None if a == b else f"eval_shape gives {b} and not {a}"
    elif way == 2:
        g = jax.custom_vjp(f)
        g.defvjp(lambda t: (f(t), t), lambda t, _: (t,))
        got = jax.jit(g)(tree)
    else:
        got = jax.jit(lambda t: jax.lax.scan(lambda c, _: (c, f(c)), t, None, length=2))(tree)[1][0]
    return None if np.allclose(got, expected) else f"way {way}: expected {expected}, got {got}"


def second_derivative(tree: Any, rng: random.Random) -> str | None:
    """`jax.grad` and `jax.hessian` over a module, compared with those over its leaves."""
    leaves, treedef = jax.tree.flatten(tree)
    if not leaves:
        return None
    if not all(isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating) for x in leaves):
        leaves = [jnp.float32(i + 1) for i in range(len(leaves))]
        tree = jax.tree.unflatten(treedef, leaves)

    def f(tree: Any) -> Any:
        return sum(
            [jnp.sum(x * x) * (i + 1) for i, x in enumerate(jax.tree.leaves(tree))], jnp.float32(0)
        )

    kind = rng.choice([jax.grad, jax.hessian, jax.jacfwd])
    got, expected = jax.tree.leaves(kind(f)(tree)), jax.tree.leaves(kind(f)(leaves))
    right = len(got) == len(expected) and all(map(np.allclose, got, expected))
    return None if right else f"{kind.__name__}: expected {expected}, got {got}"


def split_under_jax(tree: Any, rng: random.Random) -> str | None:
    """A DagDef crosses plain JAX as a pytree without leaves."""
    tree = _module(tree, rng)
    if not _arrays_only(tree):
        return None
    dagdef, part = nnx.split(tree)
    expected = _numbers(list(jax.tree.leaves(part)))
    way = rng.randrange(4)
    if way == 0:
        got = jax.jit(lambda d, p: _numbers(jax.tree.leaves(nnx.merge(d, p))))(dagdef, part)
    elif way == 1:
        got = _numbers(jax.tree.leaves(jax.jit(nnx.split)(tree)[1]))
    elif way == 2:
        step = lambda c, _: (c, _numbers(jax.tree.leaves(nnx.merge(*c))))
        got = jax.lax.scan(step, (dagdef, part), None, length=2)[1][0]
    else:
        shape = jax.eval_shape(lambda t: nnx.split(t), tree)
        return None if shape[0] == dagdef else f"eval_shape gives {shape[0]}"
    return None if np.allclose(got, expected) else f"way {way}: expected {expected}, got {got}"


NEIGHBOURS = (
    partition_and_combine,
    partition_under_jit,
    mask_closed_over,
    mask_as_argument,
    constants_among_values,
    kept_for_later,
    held_by_another,
    shapes_only,
    axes_as_tree,
    ahead_of_time,
    second_derivative,
    split_under_jax,
)
