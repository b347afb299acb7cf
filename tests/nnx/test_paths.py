"""One language for paths: in JAX's key paths, Partitions, messages and filters."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.tree_util import keystr, tree_flatten_with_path

import nnx
from tests.models import Dense


class Block(nnx.Module):
    def __init__(self, seed):
        self.bn = nnx.BatchNorm(2)
        self.dense = Dense(seed=seed)


class Model(nnx.Module):
    def __init__(self):
        self.blocks = [Block(1), Block(2)]
        self.heads = {"main": Dense(seed=3), 7: Dense(seed=4)}

    def __call__(self, x):
        for block in self.blocks:
            x = block.bn(block.dense(x), use_running_average=False)
        return self.heads["main"](x) + self.heads[7](x)


@pytest.fixture
def model():
    with nnx.scope(0):
        return Model()


def test_jax_partitions_and_refs_have_the_same_paths(model):
    of_refs = [".".join(path) for path in nnx.refs(model)]
    of_partition = [".".join(path) for path in nnx.get_partition(model, ...)]
    of_split = [".".join(path) for path in nnx.split(model)[1]]
    of_module = [keystr(k, simple=True, separator=".") for k, _ in tree_flatten_with_path(model)[0]]
    of_values = [
        keystr(k, simple=True, separator=".") for k, _ in tree_flatten_with_path(model[...])[0]
    ]
    assert of_refs == of_partition == of_split == of_module == of_values
    assert "blocks.1.bn.mean" in of_refs and "heads.7.w" in of_refs


def test_messages_have_the_same_paths(model):
    name = "blocks.1.dense.w"
    with pytest.raises(nnx.ShapeError, match=f"'{name}'"):
        nnx.update(model, {name: jnp.ones(3)})
    with pytest.raises(nnx.ClosureError, match="Dense.w"):
        jax.jit(lambda: model.blocks[1].dense.w)()
    with pytest.raises(nnx.NotMutableError, match=f"'{name}'|Dense.w"):
        with nnx.mutable("batch_stats", model):
            model.blocks[1].dense.w = 0
    with pytest.raises(nnx.TraceLevelError, match="Dense.w"):
        jax.vmap(lambda x: setattr(model.blocks[1].dense, "w", x))(jnp.ones((1, 2, 2)))
    with pytest.raises(nnx.UnknownPathError, match="'blocks.1.dense.q'.*'blocks.0"):
        model["params"] = {"blocks.1.dense.q": 1}


FILTERS = {
    "bn": (nnx.PathContains("bn"), 8),
    "blocks.*.dense.*": (nnx.PathMatches("blocks.*.dense.*"), 6),
    "**.w": (nnx.PathMatches("**.w"), 4),
    "blocks.**": (nnx.PathMatches("blocks.**"), 14),
    "blocks.*": (nnx.PathMatches("blocks.*"), 0),
    "predicate": (lambda path, ref: ref.collection == "params" and path[-1] == "b", 4),
    "both": (nnx.All("params", nnx.Not(nnx.PathMatches("heads.**"))), 8),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters_in_brackets_and_split(model, name):
    filter, count = FILTERS[name]
    assert len(model[filter]) == count
    assert list(nnx.split(model, filter, ...)[1]) == list(model[filter])
    model[filter] = jax.tree.map(lambda x: x + 1, model[filter])


TRAINED = [
    nnx.PathMatches("heads.**.[wb]"),
    lambda path, ref: path[0] == "heads" and path[-1] in "wb",
]


@pytest.mark.parametrize("filter", TRAINED)
def test_filters_everywhere_else(model, filter):
    x = jnp.arange(6.0).reshape(3, 2)
    loss = lambda m: jnp.sum(m(x) ** 2)
    grads = nnx.grad(loss, wrt=filter)(model)
    assert list(grads) == list(model[filter]) and len(grads) == 4
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=filter)
    before = model[...]
    optimizer.update(model, grads)
    moved = [path for path, value in model[...].items() if not jnp.array_equal(value, before[path])]
    assert set(moved) <= set(grads) and moved

    old = model.heads["main"].w
    kept = model.blocks[0].dense.w

    @nnx.jit(donate=filter)
    def step(model):
        model["params"] = jax.tree.map(lambda w: w * 0.5, model["params"])

    step(model)
    assert old.is_deleted() and not kept.is_deleted()
    with pytest.raises(nnx.NotMutableError):
        with nnx.mutable(filter, model):
            model.blocks[0].dense.w = kept
    assert nnx.vmap(
        lambda m: m.heads["main"].w.sum(), in_axes=({filter: None, ...: None},), axis_size=2
    )(model).shape == (2,)


def test_path_matches():
    f = nnx.PathMatches("a.**.z?.**")
    assert f(("a", "z1"), None) and f(("a", "b", "zz", "c"), None)
    assert not f(("a",), None) and not f(("a", "z"), None) and not f(("b", "z1"), None)
    assert nnx.PathMatches("")((), None) and not nnx.PathMatches("")(("a",), None)
    assert f == nnx.PathMatches("a.**.z?.**") and hash(f) == hash(nnx.PathMatches("a.**.z?.**"))
    with pytest.raises(nnx.FilterError, match="PathMatches takes a string .a glob .* but got 3"):
        nnx.PathMatches(3)
