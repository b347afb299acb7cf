"""A module as a plain pytree: values in, a copy out, nothing lost silently."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnx
from nnx import Ref
from tests.models import Dense, Net


def test_leaves_come_in_the_order_of_the_paths(net):
    net.array = jnp.full(3, 9.0)
    dagdef, partition = nnx.split(net)
    keyed = jax.tree_util.tree_leaves_with_path(net)
    assert [jax.tree_util.keystr(k, simple=True) for k, _ in keyed] == [
        ".".join(p) for p in partition
    ]
    assert all(a is b for (_, a), b in zip(keyed, partition.values(), strict=True))
    assert keyed[-1][1] is net.array and dagdef.paths == tuple(partition)


def test_key_paths_inside_other_trees(dense):
    keyed = jax.tree_util.tree_leaves_with_path({"m": [dense]})
    assert jax.tree_util.keystr(keyed[0][0]) == "['m'][0].w"


def test_equal_modules_have_equal_treedefs():
    a, b = jax.tree.structure(Net()), jax.tree.structure(Net())
    assert a == b and hash(a) == hash(b)
    c = Net()
    c.scale = 3.0
    assert jax.tree.structure(c) != a
    d = Net()
    d.blocks[2] = Dense(seed=1)
    assert jax.tree.structure(d) != a


def test_tree_map_over_two_modules_and_over_unequal_ones(net):
    other = nnx.clone(net)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, net, other)
    assert jnp.allclose(mean.blocks[0].w, net.blocks[0].w)
    other.blocks[2] = Dense(seed=1)
    with pytest.raises(ValueError):
        jax.tree.map(jnp.add, net, other)


def test_what_jax_returns_at_the_top_level_is_an_ordinary_module(dense):
    made = jax.jit(lambda m: jax.tree.map(lambda v: v + 1, m))(dense)
    made.b = made.b * 5
    made.note = 1
    assert (made.b == 5).all() and (dense.b == 0).all()
    mapped = jax.vmap(lambda k: Dense(seed=0), out_axes=0)(jnp.arange(3))
    assert mapped.w.shape == (3, 2, 2)
    mapped.w = mapped.w * 0


COPIES = {
    "jit": lambda f, m: jax.jit(f)(m),
    "grad": lambda f, m: jax.grad(lambda m: f(m) or 0.0, allow_int=True)(m),
    "vmap": lambda f, m: jax.vmap(f, axis_size=2, in_axes=None)(m),
    "scan": lambda f, m: jax.lax.scan(lambda c, _: (c, f(c)), m, None, length=2),
    "cond": lambda f, m: jax.lax.cond(jnp.array(True), f, lambda m: None, m),
    "checkpoint": lambda f, m: jax.checkpoint(f)(m),
    "eval_shape": lambda f, m: jax.eval_shape(f, m),
}
WRITES = {
    "a field": (lambda m: setattr(m, "b", m.b + 1), r"Dense\.b \(collection 'params'"),
    "a Ref": (lambda m: setattr(nnx.get_ref(m, "b"), "value", m.b + 1), r"'params'"),
    "a partition": (lambda m: m.__setitem__("params", {"b": m.b + 1}), r"'params'"),
    "an attribute": (lambda m: setattr(m, "note", 1), r"'note' of a Dense"),
    "a tie": (lambda m: setattr(m, "b", nnx.get_ref(m, "w")), r"'b' of a Dense"),
    "a deletion": (lambda m: delattr(m, "b"), r"'b' of a Dense"),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", COPIES)
def test_no_write_to_a_copy_is_lost_silently(name, write, dense):
    change, message = WRITES[write]
    with pytest.raises(nnx.ReadOnlyError, match=message) as error:
        COPIES[name](change, dense)
    for remedy in ("nnx.jit", "nnx.jit_filter", "nnx.clone"):
        assert remedy in str(error.value)
    assert (dense.b == 0).all() and not hasattr(dense, "note")


def test_a_list_of_a_copy_that_is_changed():
    # The list belongs to the copy: an appended item is in the copy, and nobody else sees it.
    net = Net()

    @jax.jit
    def f(m):
        m.blocks.append(m.blocks[0])
        return m

    out = f(net)
    assert len(out.blocks) == 4 and out.blocks[3] is out.blocks[0] and len(net.blocks) == 3


@pytest.mark.parametrize("name", ["jit", "grad", "vmap", "checkpoint"])
def test_a_clone_of_a_copy_may_be_written(name, dense):
    def f(m):
        m = nnx.clone(m)
        m.b = m.b + 1
        return None if name != "grad" else m.b.sum()

    COPIES[name](f, dense)
    assert (dense.b == 0).all()


def test_gradients_are_modules_that_optax_takes(data):
    x, y = data
    dense = Dense()
    params = dense["params"]

    def loss(params, x):
        return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)

    tx = optax.adam(0.1)
    updates, _ = tx.update(jax.grad(loss)(params, x), tx.init(params), params)
    dense["params"] = optax.apply_updates(params, updates)
    assert loss(dense["params"], x) < loss(params, x)


def test_none_and_shapes_stand_for_values(dense):
    empty = jax.tree.map(lambda _: None, dense)
    assert empty.w is None and jax.tree.leaves(empty) == []
    shapes = jax.eval_shape(lambda: Dense())
    assert isinstance(shapes.w, jax.ShapeDtypeStruct)
    assert jax.tree.structure(shapes) == jax.tree.structure(dense)


def test_a_ref_in_a_plain_pytree():
    ref = Ref(jnp.array(2.0), "params", axis=1)
    ((key, value),) = jax.tree_util.tree_leaves_with_path({"r": ref})
    assert jax.tree_util.keystr(key) == "['r'].value" and value == 2.0
    assert jax.tree.structure(ref) == jax.tree.structure(Ref(jnp.array(1.0), "params", axis=1))
    assert jax.tree.structure(ref) != jax.tree.structure(Ref(jnp.array(1.0), "params", axis=2))


def test_plain_grad_is_that_of_the_function(net, data):
    x, _ = data

    def loss(m):
        m = nnx.clone(m)
        return jnp.sum(m(x) ** 2)

    grads = jax.grad(loss, allow_int=True)(net)
    stateful = nnx.grad(loss)(net)
    np.testing.assert_allclose(grads.blocks[0].w, stateful["blocks.0.w"], rtol=1e-5)
    assert grads.blocks[0] is grads.blocks[2]


def test_plain_scan_carries_a_module_and_slices_one(data):
    stack = jax.tree.map(lambda *xs: jnp.stack(xs), *(Dense(seed=i) for i in range(3)))
    x = jnp.ones((1, 2))

    def layer(x, m):
        return x @ m.w + m.b, None

    out, _ = jax.lax.scan(layer, x, stack)
    expected = x
    for i in range(3):
        expected, _ = layer(expected, Dense(seed=i))
    np.testing.assert_allclose(out, expected, rtol=1e-5)
