"""Weights go straight into a model of shapes from `nnx.eval_shape`, as into a real model."""

import flax.linen as nn
import flax.nnx as fnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx.bridge import BridgeError, from_flax, from_state_dict, to_flax
from tests.nnx.test_bridge import DIGITS, Ours, Theirs, close


def is_abstract(model):
    return all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(model["params"]))


def test_from_flax():
    theirs = Theirs(fnx.Rngs(0))
    ours = nnx.eval_shape(lambda: Ours.init(1)())
    assert is_abstract(ours)
    assert from_flax(theirs, ours) is ours
    ours.eval(), theirs.eval()
    close(ours(DIGITS), theirs(DIGITS))
    assert not any(
        isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(ours["batch_stats"])
    )


def test_from_linen_variables():
    dense = nn.Dense(3)
    variables = dense.init(jax.random.key(0), jnp.ones((1, 2)))
    ours = from_flax(variables, nnx.eval_shape(lambda: nnx.Linear.init(0)(2, 3)))
    close(ours(jnp.ones((1, 2))), dense.apply(variables, jnp.ones((1, 2))))


LAYERS = [
    (lambda: nnx.Linear(2, 3), {"weight": (3, 2), "bias": (3,)}),
    (lambda: nnx.LinearGeneral((2, 2), (3, 1), axis=(-2, -1)), {"weight": (3, 4), "bias": (3,)}),
    (lambda: nnx.Conv(2, 4, (3, 3)), {"weight": (4, 2, 3, 3), "bias": (4,)}),
    (lambda: nnx.Embed(5, 2), {"weight": (5, 2)}),
    (lambda: nnx.LayerNorm(2), {"weight": (2,), "bias": (2,)}),
    (lambda: nnx.PReLU(), {"weight": (1,)}),
    (
        lambda: nnx.BatchNorm(2),
        {"weight": (2,), "bias": (2,), "running_mean": (2,), "running_var": (2,)},
    ),
    (
        lambda: nnx.MultiHeadAttention(2, 4),
        {
            "in_proj_weight": (12, 4),
            "in_proj_bias": (12,),
            "out_proj.weight": (4, 4),
            "out_proj.bias": (4,),
        },
    ),
    (
        lambda: nnx.RNN(nnx.LSTMCell(2, 3)),
        {
            "weight_ih_l0": (12, 2),
            "weight_hh_l0": (12, 3),
            "bias_ih_l0": (12,),
            "bias_hh_l0": (12,),
        },
    ),
]


@pytest.mark.parametrize("make, shapes", LAYERS)
def test_every_rule_for_a_layer(make, shapes):
    rng = np.random.default_rng(0)
    state = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    def made():
        with nnx.scope(0):
            return make()

    real = from_state_dict(state, made())
    ours = from_state_dict(state, nnx.eval_shape(made))
    for filter in ("params", "batch_stats"):
        jax.tree.map(np.testing.assert_array_equal, ours[filter], real[filter])
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(ours[filter]))


def test_dtypes_and_devices_are_those_of_the_shapes():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    state = {"weight": np.arange(16.0).reshape(8, 2), "bias": np.ones(8)}
    shapes = nnx.eval_shape(lambda: nnx.Linear.init(0)(2, 8, param_dtype=jnp.bfloat16))
    shapes.kernel = jax.ShapeDtypeStruct((2, 8), jnp.bfloat16, sharding=columns)
    from_state_dict(state, shapes)
    assert shapes.kernel.dtype == jnp.bfloat16 and shapes.kernel.sharding == columns
    np.testing.assert_array_equal(np.asarray(shapes.kernel, np.float32), state["weight"].T)
    # An existing model keeps its devices too.
    model = nnx.Linear.init(0)(2, 8)
    model.kernel = jax.device_put(model.kernel, columns)
    assert from_state_dict(state, model).kernel.sharding == columns
    assert to_flax(model, {"params": {"kernel": jnp.zeros((2, 8)), "bias": jnp.zeros(8)}})


def test_a_module_whose_refs_hold_shapes():
    class Shapes(nnx.Module):
        w: jax.Array = nnx.param()

        def __init__(self):
            self.w = jax.ShapeDtypeStruct((2,), jnp.float32)

    model = Shapes()
    assert from_state_dict({"w": np.array([1.0, 2.0])}, model).w.tolist() == [1.0, 2.0]
    model = Shapes()
    from_flax({"params": {"w": np.array([3.0, 4.0])}}, model)
    assert model.w.tolist() == [3.0, 4.0]


def test_what_does_not_fit_is_listed_and_nothing_is_changed():
    ours = nnx.eval_shape(lambda: nnx.Linear.init(0)(2, 3))
    with pytest.raises(BridgeError, match=r"kernel has shape \(2, 3\), but weight gives \(5, 2\)"):
        from_state_dict({"weight": np.ones((2, 5)), "bias": np.ones(3)}, ours)
    message = "bias has dtype float32, but bias has int64"
    with pytest.raises(BridgeError, match=message):
        from_state_dict({"weight": np.ones((3, 2)), "bias": np.ones(3, int)}, ours)
    assert is_abstract(ours)


def test_shapes_give_no_values():
    theirs = jax.eval_shape(lambda: nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 2))))
    ours = nnx.Linear.init(0)(2, 3)
    with pytest.raises(
        BridgeError, match="kernel (would get|gets) a shape without values from kernel"
    ):
        from_flax(theirs, ours)
    # In the other direction, shapes say what is wanted.
    moved = to_flax(ours, theirs)
    assert (moved["params"]["kernel"] == ours.kernel).all()
    shapes = nnx.eval_shape(lambda: nnx.Linear.init(0)(2, 3))
    with pytest.raises(
        BridgeError, match="kernel (would get|gets) a shape without values from kernel"
    ):
        to_flax(shapes, moved)
    wide = nnx.Linear.init(0)(2, 4)
    with pytest.raises(BridgeError, match=r"float32\[2, 3\] in the flax model, .*\[2, 4\] in ours"):
        to_flax(wide, theirs)
