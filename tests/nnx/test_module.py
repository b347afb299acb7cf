import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnx
from tests.models import Dense, Net


class Plain(nnx.Module):
    pass


def test_plain_containers_need_no_wrapper(net):
    assert list(nnx.refs(net)) == [
        ("blocks", i, name) for i in "01" for name in ("w", "b", "calls")
    ]
    net.extra = {"a": (Dense(), [nnx.Ref(1.0)]), "b": None}
    assert ("extra", "a", "1", "0") in nnx.refs(net)


def test_surgery_is_seen(net):
    net.blocks.append(Dense(seed=7))
    assert len(nnx.refs(net)) == 9
    net.blocks[2] = Dense(seed=8)
    del net.blocks[0]
    net.head = Dense()
    assert len(nnx.refs(net)) == 12
    del net.head
    assert not hasattr(net, "head") and len(nnx.refs(net)) == 9
    with pytest.raises(AttributeError):
        del net.head


def test_brackets_read_and_write(net):
    before = net["params"]
    net["params"] = jax.tree.map(lambda x: x + 1, before)
    assert (net.blocks[0].w == before["blocks.0.w"] + 1).all()
    assert set(net[nnx.PathContains("w")]) == {("blocks", "0", "w"), ("blocks", "1", "w")}
    with pytest.raises(nnx.UnknownPathError, match=r"'counters' does not select 'blocks\.0\.w'"):
        net["counters"] = before
    with pytest.raises(nnx.ShapeError, match=r"blocks\.0\.w"):
        net["params"] = {"blocks.0.b": jnp.zeros(2), "blocks.0.w": jnp.zeros(5)}
    assert (net.blocks[0].b == 1).all()


def test_train_and_eval_reach_the_whole_tree():
    class Flagged(nnx.Module):
        training = True

    with nnx.scope(0):
        model = nnx.Sequential(nnx.Dropout(0.5), nnx.Sequential(nnx.BatchNorm(2)))
    model.flagged = Flagged()
    assert model.eval() is model
    drop, norm = model.layers[0], model.layers[1].layers[0]
    assert drop.deterministic and norm.use_running_average and model.flagged.training is False
    model.train()
    assert not drop.deterministic and not norm.use_running_average and model.flagged.training
    assert not hasattr(model, "training")


def test_apply_sets_scope_and_limits_writes(dense, data):
    x, _ = data
    norm = nnx.BatchNorm(2)
    norm.apply(use_running_average=True)(x)
    assert (norm.mean == 0).all()
    norm.apply(mutable="batch_stats")(x)
    assert not (norm.mean == 0).all()
    with pytest.raises(nnx.NotMutableError, match=r"BatchNorm\.mean .*'batch_stats'"):
        norm.apply(mutable="params")(x)
    with pytest.raises(nnx.NotMutableError):
        dense.apply(mutable=nnx.PathContains("w"))(x)
    assert dense.calls == 0
    assert nnx.Dropout(0.5).apply(rngs=1)(x).shape == x.shape


def test_apply_reaches_methods_and_submodules():
    class Model(nnx.Module):
        def __init__(self):
            self.inner = nnx.Dropout(1.0)
            self.n = 3

        def encode(self, x):
            return self.inner(x)

    model = Model()
    applied = model.apply(deterministic=True)
    assert applied.encode(jnp.ones(2)).sum() == 2 and applied.inner(jnp.ones(2)).sum() == 2
    assert applied.n == 3 and model.encode(jnp.ones(2)).sum() == 0


def test_a_module_is_a_pytree_of_its_values(net, data):
    x, _ = data
    leaves = jax.tree.leaves(net)
    assert len(leaves) == 6
    doubled = jax.tree.map(lambda v: 2 * v, net)
    assert doubled.blocks[0] is doubled.blocks[2] and doubled.blocks[0] is not net.blocks[0]
    doubled.blocks[0].w = jnp.zeros((2, 2))
    names = [jax.tree_util.keystr(p, simple=True) for p, _ in jax.tree.leaves_with_path(net)]
    assert names[:2] == ["blocks.0.w", "blocks.0.b"]
    shapes = jax.eval_shape(lambda m: m, net)
    assert shapes.blocks[0].w.shape == (2, 2)
    out = jax.jit(lambda m, x: x @ m.blocks[0].w)(net, x)
    assert jnp.allclose(out, x @ net.blocks[0].w)
    grads = jax.grad(lambda m: jnp.sum(x @ m.blocks[0].w), allow_int=True)(net)
    assert isinstance(grads, Net) and (grads.blocks[1].w == 0).all()
    assert jax.device_put(net, jax.devices()[1]).blocks[0].w.devices() == {jax.devices()[1]}
    tx = optax.sgd(0.1)
    tx.init(net)


def test_modules_go_through_plain_vmap_scan_cond_and_checkpoint(data):
    x, _ = data

    @nnx.dataclass
    class Scale(nnx.Module):
        w: jax.Array = nnx.param()

        def __call__(self, x):
            return x * self.w

    stack = Scale(jnp.arange(3.0))
    assert jax.vmap(lambda m, x: m(x), in_axes=(0, None))(stack, 2.0).tolist() == [0, 2, 4]
    assert jax.lax.scan(lambda c, m: (m(c) + 1, None), 1.0, stack)[0] == 5.0
    assert jax.lax.cond(True, lambda m: m(2.0), lambda m: m(3.0), stack).tolist() == [0, 2, 4]
    assert jax.checkpoint(lambda m: m(2.0))(stack).tolist() == [0, 2, 4]
    assert (
        jax.lax.scan(lambda m, _: (jax.tree.map(lambda v: v + 1, m), None), stack, None, 3)[0].w[0]
        == 3
    )


@pytest.mark.parametrize("transform", [jax.jit, nnx.jit, nnx.jit_filter])
def test_what_the_object_of_a_bound_method_holds_is_seen(transform):
    class Plain:
        def __init__(self):
            self.factor, self.table, self.sizes = 2, jnp.ones(3), [1]

        def scale(self, x):
            return (self.table * x).sum() * self.factor + len(self.sizes)

    plain = Plain()
    by_argument = transform(lambda f, x: f(x))

    class Holder(nnx.Module):
        def __init__(self):
            self.scale = plain.scale

    holder, by_attribute = Holder(), transform(lambda m, x: m.scale(x))

    def check(expected):
        for _ in range(2):
            assert float(by_argument(plain.scale, jnp.array(2.0))) == expected
            assert float(by_attribute(holder, jnp.array(2.0))) == expected

    check(13)
    plain.factor = 3
    check(19)
    plain.table = jnp.zeros(3)
    check(1)
    plain.sizes.append(2)
    check(2)


def test_bound_methods_are_pytrees(dense, data):
    x, _ = data

    class Quiet(nnx.Module):
        def __init__(self):
            self.inner = dense

        def encode(self, x):
            return x @ self.inner.w

    model = Quiet()
    out = jax.jit(lambda f, x: f(x))(model.encode, x)
    assert jnp.allclose(out, x @ dense.w)
    assert jnp.allclose(nnx.jit(model.encode)(x), out)
    assert len(jax.tree.leaves(model.encode)) == 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles(net, data, copied):
    x, _ = data
    other = copied(net)
    assert other.blocks[0] is other.blocks[2] and other.blocks[0] is not net.blocks[0]
    assert jnp.allclose(other(x), net(x))
    assert nnx.split(other)[0] is nnx.split(net)[0]


def test_repr_is_a_tree_with_shared_parts_once(net):
    net.me = net
    text = repr(net)
    assert text.startswith("Net(\n  blocks = [\n    0: Dense(\n      w = float32[2,2]  # params")
    assert "2: <same as blocks.0>" in text and "me = <same as the root>" in text


def test_an_unhashable_static_is_named_when_it_reaches_jit(dense):
    dense.options = {1, 2}
    with pytest.raises(nnx.UnhashableStaticError, match=r"'options' is a set.*Use a tuple"):
        nnx.jit(lambda m: None)(dense)
    with pytest.raises(nnx.UnhashableStaticError, match=r"'options'"):
        jax.jit(lambda m: None)(dense)


def test_slot_names_are_refused(dense):
    with pytest.raises(nnx.StructureError, match="refx uses the attribute name '_frame'"):
        dense._frame = 1


def test_numpy_and_array_attributes_are_values(data):
    x, _ = data
    model = Plain()
    model.table = np.arange(3)
    model.pair = (jnp.ones(2), "static")
    assert len(jax.tree.leaves(model)) == 2
    read = nnx.jit(lambda m: m.table.sum() + m.pair[0].sum())
    assert read(model) == 5
    model.table = np.arange(4)
    assert read(model) == 8
    model.table[0] = 10
    assert read(model) == 18
    model.pair = (jnp.zeros(2), "static")
    assert read(model) == 16


def test_brackets_do_not_make_a_module_iterable(dense):
    with pytest.raises(TypeError, match="not iterable"):
        list(dense)


def test_partitions_pickle(dense):
    part = pickle.loads(pickle.dumps(dense["params"]))
    assert (part["w"] == dense.w).all() and list(part) == list(dense["params"])


def test_the_class_of_a_module_stays():
    model = nnx.Linear.init(0)(2, 2)
    with pytest.raises(nnx.StructureError, match="class of a .*Linear cannot be assigned"):
        model.__class__ = nnx.Linear


def test_a_module_of_gradients_is_not_a_partition(dense):
    grads = jax.grad(lambda m: m.w.sum(), allow_int=True)(dense)
    where = r"takes a Partition.*got a Dense\. Pass.*nnx\.get_partition\(grads, 'params'\)\."
    with pytest.raises(nnx.ValueTypeError, match=where):
        dense["params"] = grads
    with pytest.raises(nnx.ValueTypeError, match=r"got a Dense\. Pass .*nnx\.get_partition"):
        nnx.update(dense, grads)
    with pytest.raises(nnx.ValueTypeError, match="but got an int.$"):
        dense["params"] = 3
    dense["params"] = nnx.get_partition(grads, "params")
    assert dense.w.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_what_apply_gives_prints_and_says_that_it_is_no_argument(dense):
    assert repr(dense.apply(training=True)) == "<apply(...) of a Dense, to be called>"
    assert "nnx.jit(model.apply(decode=True))(x)" in type(dense.apply())._as_argument
    assert (
        nnx.jit(dense.apply(training=True))(jnp.ones((1, 2))).shape == (1, 2) and dense.calls == 1
    )


def test_train_and_eval_leave_parts_and_values_of_these_names():
    class Parts(nnx.Module):
        deterministic: float | None = nnx.param(default=None)
        use_running_average: bool | None = nnx.static(default=None)

        def __init__(self):
            self.training = nnx.Linear(2, 2)
            self.inner = nnx.MultiMetric(training=nnx.metrics.Average())
            self.value = nnx.Dropout(0.5, deterministic=None)

    model = Parts.init(0)()
    layer, metric = model.training, model.inner.training
    assert model.eval() is model and model.train() is model
    assert model.training is layer and model.inner.training is metric
    assert len(model["params"]) == 2 and model.deterministic is None
    assert model.use_running_average is False and model.value.deterministic is False
    model.eval()
    assert model.use_running_average is True and model.value.deterministic is True
