"""Filters mean the same wherever nnx takes several of them."""

import jax
import jax.numpy as jnp
import optax
import pytest

import nnx
from nnx.training import mask


@pytest.fixture
def model():
    return nnx.Linear.init(0)(2, 3)


def _vmap(model, rules):
    nnx.vmap(lambda m, x: m(x), in_axes=(rules, None), axis_size=2)(model, jnp.ones(2))


USES = {
    "vmap": _vmap,
    "Optimizer": lambda m, rules: nnx.Optimizer(m, {f: optax.sgd(0.1) for f in rules}),
    "jit": lambda m, rules: nnx.jit(lambda m: None, in_shardings=(rules,))(m),
    "jit_filter": lambda m, rules: nnx.jit_filter(lambda m: 0, filter_tree=(rules,))(m),
    "grad_filter": lambda m, rules: nnx.grad_filter(lambda m: 0.0, filter_tree=rules)(m),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("filters", [(..., "params"), (("params", "x"), "params", ...)])
def test_a_filter_that_can_select_nothing_is_an_error(use, filters, model):
    with pytest.raises(nnx.FilterError, match="'params' can never select anything"):
        USES[use](model, dict.fromkeys(filters))


def test_paths_of_partitions_inside_an_argument(model):
    tree = {"model": model, "extra": nnx.Partition({"a.kernel": jnp.ones(2)})}
    grads = nnx.grad(
        lambda t: t["extra"]["a.kernel"].sum() * t["model"].bias.sum(),
        wrt=nnx.PathContains("extra.a"),
    )(tree)
    assert list(grads) == [("extra", "a", "kernel")]
    assert jax.tree.map(jnp.shape, dict(grads)) == {("extra", "a", "kernel"): (2,)}


def test_masks(model):
    assert mask(model["params"], nnx.PathContains("kernel"))["kernel"]
    with pytest.raises(nnx.FilterError, match="Partition have no collection"):
        mask(model["params"], nnx.All("params", nnx.PathContains("kernel")))
    with pytest.raises(nnx.FilterError, match="did you mean 'params'"):
        mask(model, "parms")
