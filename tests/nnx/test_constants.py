"""What is no array among the values of a tree is a constant of each program, counted by its content."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import nnx


class Net(nnx.Module):
    w: jax.Array = nnx.param()

    def __init__(self):
        self.w = jnp.ones(2)
        self.table = jnp.arange(3.0)
        self.both = nnx.Ref({"a": jnp.ones(4), "b": [jnp.zeros(5)]}, "both")


CONSTANTS = {
    "text": ("fast", "slow and slower"),
    "none": (None, None),
    "spec": (PartitionSpec("x"), PartitionSpec("x", "yy")),
    "shape": (jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((22,), jnp.float32)),
    "dtype": (jnp.float32, jnp.int8),
    "texts": (np.array(["a"]), np.array(["longer"])),
    "objects": (np.array(["a", 1], object), np.array(["ab", 1], object)),
}

TRANSFORMS = {
    "jit": nnx.jit,
    "jit_filter": nnx.jit_filter,
    "remat": nnx.remat,
    "checkify": lambda f: lambda *a: nnx.checkify(f)(*a)[1],
    "cond": lambda f: lambda *a: nnx.cond(True, f, f, *a),
    "scan": lambda f: lambda *a: nnx.scan(lambda c, _: (c, f(*c)), a, None, length=2)[1][0],
    "fori_loop": lambda f: (
        lambda *a: nnx.fori_loop(0, 2, lambda _, c: (c[0], f(*c[0])), (a, jnp.float32(0)))[1]
    ),
    "vmap": lambda f: lambda *a: nnx.vmap(f, in_axes=None, axis_size=2)(*a)[0],
    "grad": lambda f: lambda *a: nnx.value_and_grad(lambda x, a: x + f(*a))(0.0, a)[0],
    "grad_filter": lambda f: (
        lambda *a: nnx.value_and_grad_filter(lambda x, a: x + f(*a))(jnp.float32(0), a)[0]
    ),
}


def _number(tree):
    """One number of the arrays in a tree, and of how the rest of it is written."""
    leaves = jax.tree.leaves(tree)
    arrays = [isinstance(x, jax.Array) for x in leaves]
    total = sum(jnp.sum(x) for x, is_array in zip(leaves, arrays, strict=True) if is_array)
    return total + float(
        sum(len(str(x)) for x, is_array in zip(leaves, arrays, strict=True) if not is_array)
    )


def _filled(which, value):
    """A Net with a constant in the place of some of its leaves."""
    leaves, treedef = jax.tree.flatten(Net())
    return jax.tree.unflatten(treedef, [value if i in which else x for i, x in enumerate(leaves)])


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_constants_in_refs_in_parts_of_refs_and_in_attributes(transform):
    kinds = CONSTANTS if transform in ("jit", "jit_filter") else ("text", "shape", "texts")
    places = ((0, 1, 2, 3), (1, 3), (0,))
    for i, kind in enumerate(kinds):
        first, second = CONSTANTS[kind]
        tree = _filled(places[i % 3], first)
        by_argument, by_closure = (
            TRANSFORMS[transform](_number),
            TRANSFORMS[transform](
                lambda: _number(tree)  # noqa: B023
            ),
        )
        np.testing.assert_allclose(by_argument(tree), _number(tree), err_msg=kind)
        np.testing.assert_allclose(by_closure(), _number(tree), err_msg=kind)
        tree = _filled(places[i % 3], second)
        np.testing.assert_allclose(by_argument(tree), _number(tree), err_msg=kind)
        np.testing.assert_allclose(by_closure(), _number(tree), err_msg=kind)


def test_two_halves_of_a_partition():
    leaves, treedef = jax.tree.flatten(_filled((1,), jax.ShapeDtypeStruct((2,), jnp.float32)))
    for keep in (True, False):
        chosen = [isinstance(x, jax.Array) is keep for x in leaves]
        pairs = list(zip(leaves, chosen, strict=True))
        first = jax.tree.unflatten(treedef, [x if k else None for x, k in pairs])
        second = jax.tree.unflatten(treedef, [None if k else x for x, k in pairs])

        def f(first, second=second):
            both = jax.tree.map(
                lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None
            )
            return _number(both)

        for transform in (nnx.jit, nnx.jit_filter, nnx.remat):
            np.testing.assert_allclose(transform(f)(first), f(first))


def test_a_shape_stands_for_an_array_where_nothing_is_computed():
    shapes = nnx.eval_shape(Net)
    double = nnx.jit(lambda m: m.w * 2)
    assert nnx.eval_shape(double, shapes).shape == (2,)
    assert double.eval_shape(shapes).shape == (2,)
    assert double.lower(shapes).compile()(Net()).tolist() == [2, 2]
    assert "mul" in str(nnx.make_jaxpr(double)(shapes))
    assert "compiles the first program" in str(nnx.jit(lambda m: m.w * 2).explain(shapes))


def test_a_function_that_was_compiled_for_arrays_sees_shapes_as_they_are():
    @nnx.jit
    def fill(m):
        if isinstance(m.w, jax.ShapeDtypeStruct):
            m.w = jnp.full(m.w.shape, 7.0)
        m.w = m.w + 1

    net, shapes = Net(), nnx.eval_shape(Net)
    for _ in range(2):
        fill(net)
    fill(shapes)
    assert net.w.tolist() == [3, 3] and shapes.w.tolist() == [8, 8]
    fill(shapes)
    assert shapes.w.tolist() == [9, 9]


@pytest.mark.parametrize("transform", ["jit", "remat", "checkify", "cond"])
def test_constants_stay_where_the_structure_changes(transform):
    def grow(m):
        m.grown = True
        m.both.value = {"a": m.both.value["a"] + 1, "b": m.both.value["b"]}
        return jnp.float32(0)

    for value in ("text", np.array(["a", "b"])):
        net = _filled((0, 3), value)
        net.names = np.array(["c"])
        TRANSFORMS[transform](grow)(net)
        assert net.grown and net.w is value and net.table is value
        assert net.names.tolist() == ["c"] and net.both.value["a"].tolist() == [2] * 4


@pytest.mark.parametrize("transform", ["jit", "remat", "cond", "scan", "vmap"])
def test_a_program_gives_no_constants(transform):
    net = _filled((0,), "fast")

    def write(m):
        m.w = "slow"
        return jnp.float32(0)

    with pytest.raises(
        nnx.ValueTypeError, match=r"leaves a str in the Ref or array 'w': 'slow'. A program"
    ):
        TRANSFORMS[transform](write)(net)
    assert net.w == "fast"


def test_what_holds_no_array_cannot_be_differentiated():
    with pytest.raises(
        nnx.DifferentiationError,
        match=r"'w': it holds a ShapeDtypeStruct, not an array: .* Choose a wrt that leaves it out",
    ):
        nnx.grad(lambda m: m.table.sum(), wrt=...)(nnx.eval_shape(Net))


def test_a_custom_rule_with_constants_among_its_values():
    net = _filled((1,), "text")

    @nnx.custom_vjp
    def scaled(x, m):
        return x * m.both.value["b"][0].sum() + x * len(m.both.value["a"])

    scaled.defvjp(lambda x, m: (scaled(x, m), m.w.sum()), lambda kept, g: (g * kept, None))
    assert float(scaled(2.0, net)) == 8.0
    assert float(nnx.grad(scaled)(2.0, net)) == 2.0


def test_a_loop_that_renews_a_module_keeps_its_constants():
    net = _filled((0,), "fast")
    net.names = np.array(["a", "b"])

    def step(m, _):
        m = nnx.clone(m)
        m.table = m.table * 2
        return m, None

    last, _ = nnx.scan(step, net, None, length=3)
    assert last.w == "fast" and last.names.tolist() == ["a", "b"]
    assert last.table.tolist() == [0, 8, 16] and net.table.tolist() == [0, 1, 2]

    def other(m, _):
        m = nnx.clone(m)
        m.w = "slow"
        return m, None

    with pytest.raises(
        nnx.CarryError, match="'fast', which is not an array, .* with 'slow' in its place"
    ):
        nnx.scan(other, net, None, length=3)
