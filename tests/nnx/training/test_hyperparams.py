"""Hyperparameters of an optimizer; no write into its state is lost."""

import copy
import pickle
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnx
from nnx.training import HyperparameterError, OptimizerError

adamw = optax.inject_hyperparams(optax.adamw, static_args=("eps_root",))
sgd = optax.inject_hyperparams(optax.sgd)


@pytest.fixture
def model():
    return nnx.Linear.init(0)(2, 3)


def is_weight(path, ref):
    return path[-1] == "kernel"


def in_masked():
    mask = nnx.Partition({"kernel": True, "bias": False})
    return optax.chain(optax.clip(1.0), optax.masked(sgd(0.5), mask))


# The name of the learning rate in each transformation.
PLACES = {
    "alone": (lambda: sgd(0.5), "learning_rate"),
    "chain": (lambda: optax.chain(optax.clip(1.0), sgd(0.5)), "learning_rate"),
    "named_chain": (
        lambda: optax.named_chain(("clip", optax.clip(1.0)), ("sgd", sgd(0.5))),
        "learning_rate",
    ),
    "masked": (in_masked, "learning_rate"),
    "by filter": (lambda: {is_weight: sgd(0.5), ...: sgd(0.1)}, "0.learning_rate"),
    "one of two": (lambda: {is_weight: sgd(0.5), ...: optax.sgd(0.1)}, "learning_rate"),
    "multi_transform": (
        lambda: optax.multi_transform(
            {"a": sgd(0.5), "b": optax.chain(sgd(0.1))},
            nnx.Partition({"kernel": "a", "bias": "b"}),
        ),
        "a.learning_rate",
    ),
    "multisteps": (lambda: optax.MultiSteps(sgd(0.5), 1), "learning_rate"),
    "twice": (lambda: optax.chain(sgd(0.5), sgd(1.0)), "0.learning_rate"),
}


@pytest.mark.parametrize("place", PLACES)
def test_they_are_found_wherever_the_transformation_is(place, model):
    make, name = PLACES[place]
    optimizer = nnx.Optimizer(model, make())
    assert float(optimizer.hyperparams[name]) == 0.5
    grads = jax.tree.map(jnp.ones_like, model["params"])
    before = model.kernel
    optimizer.hyperparams[name] = 0.25
    optimizer.update(model, grads)
    step = before - model.kernel
    np.testing.assert_allclose(np.abs(step), 0.25, rtol=1e-6)


def test_it_is_a_mapping(model):
    optimizer = nnx.Optimizer(model, adamw(0.1, weight_decay=0.5))
    params = optimizer.hyperparams
    assert set(params) == set(optimizer.opt_state.hyperparams) and len(params) == len(set(params))
    assert "weight_decay" in params and "momentum" not in params
    assert params.get("momentum") is None
    params["learning_rate"] *= 0.5
    params.update(b1=0.8, b2=np.float64(0.9))
    optimizer.hyperparams = {"eps": jnp.asarray(1e-3, jnp.bfloat16)}
    expected = {"learning_rate": 0.05, "weight_decay": 0.5, "b1": 0.8, "b2": 0.9, "eps": 1e-3}
    for name, value in expected.items():
        np.testing.assert_allclose(params[name], value, rtol=1e-2 if name == "eps" else 1e-6)
        assert params[name].dtype == jnp.float32
    assert "'weight_decay'" in repr(params)


def test_the_dtype_stays(model):
    model["params"]  # noqa: B018
    nnx.update(model, jax.tree.map(lambda x: x.astype("bfloat16"), model["params"]), strict=False)
    optimizer = nnx.Optimizer(model, optax.inject_hyperparams(optax.adam)(learning_rate=0.1))
    optimizer.hyperparams["learning_rate"] = jnp.asarray(0.25, jnp.float32)
    assert optimizer.hyperparams["learning_rate"].dtype == jnp.bfloat16
    optimizer.update(model, model["params"])


def test_setting_compiles_nothing_and_works_under_jit(model):
    optimizer = nnx.Optimizer(model, adamw(0.1, weight_decay=0.5))
    traces = []

    @nnx.jit
    def step(model, optimizer, decay):
        traces.append(1)
        optimizer.hyperparams["weight_decay"] = decay
        optimizer.update(model, jax.tree.map(jnp.zeros_like, model["params"]))

    before = model.kernel
    step(model, optimizer, jnp.array(0.0))
    np.testing.assert_array_equal(model.kernel, before)
    optimizer.hyperparams["learning_rate"] = 1.0
    step(model, optimizer, jnp.array(0.5))
    np.testing.assert_allclose(model.kernel, 0.5 * before, rtol=1e-6)
    assert float(optimizer.hyperparams["weight_decay"]) == 0.5 and len(traces) == 1

    @nnx.jit
    def by_closure():
        optimizer.hyperparams["learning_rate"] /= 4

    by_closure()
    by_closure()
    assert float(optimizer.learning_rate) == 1 / 16
    nnx.scan(lambda c, rate: (c, by_closure()), None, jnp.ones(2))
    assert float(optimizer.learning_rate) == 1 / 256


def test_a_write_into_opt_state_is_not_lost(model):
    optimizer = nnx.Optimizer(model, optax.chain(optax.clip(1.0), adamw(0.1, weight_decay=0.5)))
    state = optimizer.opt_state
    state[1].hyperparams["weight_decay"] = jnp.array(0.0)
    assert (
        float(optimizer.hyperparams["weight_decay"]) == 0.0 == state[1].hyperparams["weight_decay"]
    )
    optimizer.opt_state[1].hyperparams.update(b1=0.5)
    params = optimizer.opt_state[1].hyperparams
    params |= {"b2": 0.25}
    assert [float(optimizer.hyperparams[n]) for n in ("b1", "b2")] == [0.5, 0.25]
    with pytest.raises(HyperparameterError, match="no hyperparameter 'decay'; it has 'b1', "):
        optimizer.opt_state[1].hyperparams["decay"] = 1.0
    for change in (
        lambda d: d.pop("b1"),
        lambda d: d.clear(),
        lambda d: d.popitem(),
        lambda d: d.__delitem__("b1"),
    ):
        with pytest.raises(
            OptimizerError, match=r"would not see this write.*optimizer.hyperparams"
        ):
            change(optimizer.opt_state[1].hyperparams)

    two = nnx.Optimizer(model, {is_weight: sgd(0.5), ...: sgd(0.25)})
    inner = two.opt_state.inner_states
    inner["1"].inner_state.hyperparams["learning_rate"] = 2.0
    assert float(two.hyperparams["1.learning_rate"]) == 2.0
    assert float(two.hyperparams["0.learning_rate"]) == 0.5
    with pytest.raises(OptimizerError, match="would not see this write"):
        inner["0"] = inner["1"]


class Listed(NamedTuple):
    values: list


def with_a_list():
    return optax.GradientTransformation(
        lambda params: Listed([jnp.zeros(()), {"n": jnp.zeros(())}]),
        lambda updates, state, params=None: (updates, Listed(list(state.values))),
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.values.append(1),
        lambda s: s.values.__setitem__(0, 1),
        lambda s: s.values.clear(),
        lambda s: s.values.sort(),
        lambda s: s.values[1].__setitem__("n", 1),
        lambda s: s.values[1].update(n=1),
        lambda s: s.values[1].setdefault("m", 1),
    ],
)
def test_lists_and_dicts_of_a_state_are_read_only(change, model):
    optimizer = nnx.Optimizer(model, with_a_list())
    with pytest.raises(OptimizerError, match="is a copy of the state"):
        change(optimizer.opt_state)
    optimizer.update(model, model["params"])


def test_your_own_state_is_writable_and_can_be_assigned(model):
    tx = optax.chain(optax.clip(1.0), adamw(0.1, weight_decay=0.5))
    optimizer = nnx.Optimizer(model, tx)
    mine = jax.tree.map(lambda x: x, optimizer.opt_state)
    mine[1].hyperparams["weight_decay"] = jnp.array(0.0)
    assert float(optimizer.hyperparams["weight_decay"]) == 0.5
    optimizer.opt_state = mine
    assert float(optimizer.hyperparams["weight_decay"]) == 0.0
    optimizer.opt_state = optax.tree.set(optimizer.opt_state, weight_decay=jnp.array(0.25))
    assert float(optax.tree.get(optimizer.opt_state, "weight_decay")) == 0.25
    _, new = tx.update(model["params"], optimizer.opt_state, model["params"])
    optimizer.opt_state = new
    for copied in (copy.deepcopy(optimizer.opt_state), pickle.loads(pickle.dumps(new[1].count))):
        assert copied is not None
    copied = copy.deepcopy(optimizer.opt_state)
    copied[1].hyperparams["weight_decay"] = jnp.array(7.0)
    assert float(optimizer.hyperparams["weight_decay"]) == 0.25
    assert jax.tree.structure(copied) == jax.tree.structure(new)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("momentum", 0.1, "has no hyperparameter 'momentum'; it has 'learning_rate', 'steps'"),
        ("learning_rate", jnp.ones(2), r"'learning_rate' has shape \(\), but got \(2,\)"),
        ("learning_rate", "fast", "'learning_rate' is a number, but got a str"),
        ("learning_rate", None, "'learning_rate' is a number, but got a NoneType"),
        ("learning_rate", 1j, "'learning_rate' is of dtype float32, which cannot hold"),
        ("steps", 0.5, "'steps' is of dtype int32, .* of dtype float32.* 1.0 instead of 1"),
    ],
)
def test_errors_name_the_hyperparameter_and_change_nothing(name, value, message, model):
    def made(learning_rate, steps):
        return optax.sgd(learning_rate * steps)

    optimizer = nnx.Optimizer(model, optax.inject_hyperparams(made)(learning_rate=0.5, steps=2))
    with pytest.raises(HyperparameterError, match=message) as error:
        optimizer.hyperparams.update({"learning_rate": 0.1, name: value})
    assert len(str(error.value).splitlines()) <= 4
    assert float(optimizer.learning_rate) == 0.5 and int(optimizer.hyperparams["steps"]) == 2
    with pytest.raises(HyperparameterError, match="'steps' cannot be removed"):
        del optimizer.hyperparams["steps"]


def test_ambiguous_and_scheduled_names(model):
    two = nnx.Optimizer(model, {is_weight: sgd(0.5), ...: sgd(optax.constant_schedule(0.1))})
    assert list(two.hyperparams) == ["0.learning_rate", "1.learning_rate"]
    with pytest.raises(HyperparameterError, match=r"several.*hyperparams\['0.learning_rate'\]"):
        two.hyperparams["learning_rate"] = 1.0
    with pytest.raises(HyperparameterError, match="'1.learning_rate'.*follows a schedule"):
        two.hyperparams["1.learning_rate"] = 1.0


def test_a_parameter_of_that_name_is_not_a_hyperparameter():
    class Net(nnx.Module):
        def __init__(self):
            self.hyperparams = nnx.Linear(2, 2)
            self.hyperparams.learning_rate = nnx.Ref(jnp.ones(()), "params")

    optimizer = nnx.Optimizer(Net.init(0)(), optax.adam(0.1))
    assert not optimizer.hyperparams and not hasattr(optimizer, "learning_rate")
    with pytest.raises(HyperparameterError, match="optax.inject_hyperparams"):
        optimizer.hyperparams["learning_rate"] = 0.1
