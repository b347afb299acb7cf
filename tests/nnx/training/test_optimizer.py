"""The optimizer against the same steps written by hand with optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnx
from nnx.training import HyperparameterError, Optimizer, OptimizerError, mask
from tests.models import Dense, Net


def loss_fn(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def check_against_optax(tx, steps=4, model=Net, extra=lambda loss: {}, **options):
    """Jitted steps with the optimizer equal those of optax by hand."""
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(4, 2)), jnp.float32) for _ in range(2))
    ours, theirs = model(), model()
    optimizer = Optimizer(ours, tx, **options)
    by_hand = optax.with_extra_args_support(tx) if isinstance(tx, tuple) else tx
    state = by_hand.init(theirs["params"])

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
        optimizer.update(model, grads, **extra(loss))

    dagdef, _ = nnx.split(theirs)
    rest = nnx.get_partition(theirs, "counters")

    @jax.jit
    def hand(params, state):
        loss, grads = jax.value_and_grad(lambda p: loss_fn(nnx.merge(dagdef, p, rest), x, y))(
            params
        )
        updates, state = by_hand.update(grads, state, params, **extra(loss))
        return optax.apply_updates(params, updates), state

    params = theirs["params"]
    for _ in range(steps):
        step(ours, optimizer)
        params, state = hand(params, state)
    same = {"rtol": 2e-5, "atol": 1e-6}
    for path, value in params.items():
        np.testing.assert_allclose(ours["params"][path], value, **same)
    leaves = jax.tree.leaves(optimizer.opt_state), jax.tree.leaves(state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **same), *leaves)
    assert int(optimizer.step) == steps and optimizer.step.dtype == jnp.int32
    assert step._compiled._cache_size() == 1
    return optimizer


def decayed(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


@pytest.mark.parametrize(
    "tx",
    [
        optax.sgd(0.1),
        optax.sgd(optax.linear_schedule(0.1, 0.0, 3), momentum=0.9),
        optax.adam(1e-2),
        optax.adamw(1e-2, weight_decay=0.1, mask=decayed),
        optax.chain(optax.clip_by_global_norm(0.1), optax.lion(1e-2)),
        optax.adafactor(1e-2, min_dim_size_to_factor=2),
        optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
        optax.masked(optax.sgd(0.1), decayed),
        optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2),
        optax.apply_if_finite(optax.adam(1e-2), 3),
    ],
    ids=[
        "sgd", "momentum", "adam", "adamw", "chain", "adafactor", "inject", "masked", "multisteps",
        "if_finite",
    ],
)  # fmt: skip
def test_steps_are_those_of_optax(tx):
    check_against_optax(tx)


def test_extra_arguments_reach_the_transformation():
    tx = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1, cooldown=0))
    check_against_optax(tx, extra=lambda loss: {"value": jnp.ones(())})
    # A transformation that takes none ignores them, as in optax.
    check_against_optax(optax.sgd(0.1), extra=lambda loss: {"value": loss})


def test_lbfgs_finds_the_minimum():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 2)), jnp.float32)
    y = x @ jnp.array([[1.0, 2.0], [3.0, 4.0]]) + 1
    model = Dense()
    optimizer = Optimizer(model, optax.lbfgs())
    dagdef, _ = nnx.split(model)
    rest = nnx.get_partition(model, "counters")

    def value_fn(params):
        return loss_fn(nnx.merge(dagdef, params, rest), x, y)

    @nnx.jit
    def step(model, optimizer):
        value, grads = jax.value_and_grad(value_fn)(model["params"])
        optimizer.update(model, grads, value=value, grad=grads, value_fn=value_fn)
        return value

    losses = [float(step(model, optimizer)) for _ in range(10)]
    assert losses[-1] < 1e-8 < losses[0]


def test_the_state_has_the_paths_of_the_parameters():
    model = Net()
    optimizer = Optimizer(model, optax.adam(0.1))
    assert set(optimizer["opt_state"]) == {
        ("step",),
        ("state", "0", "count"),
        *(("state", "0", moment, *path) for moment in ("mu", "nu") for path in model["params"]),
    }
    assert all(ref.collection == "opt_state" for ref in nnx.refs(optimizer).values())
    moment = nnx.get_partition(optimizer, nnx.All(nnx.PathContains("mu"), nnx.PathContains("w")))
    assert list(moment) == [("state", "0", "mu", "blocks", i, "w") for i in "01"]
    nnx.update(optimizer, {"state.0.mu.blocks.0.w": jnp.ones((2, 2))})
    assert (optimizer.opt_state[0].mu["blocks.0.w"] == 1).all()
    assert "state = 9 arrays for 4 parameters" in repr(optimizer)


def test_the_state_has_the_metadata_of_the_parameters_of_its_shape():
    model = nnx.Linear.init(0)(130, 140, kernel_metadata={"sharding": ("in", "out")})
    optimizer = Optimizer(model, optax.adafactor(0.1, momentum=0.9))
    kinds = {
        path[:-1]: ref.metadata.get("sharding")
        for path, ref in nnx.refs(optimizer).items()
        if path[-1] == "kernel"
    }
    # The rest of the parameter's sharding: the sums are over its longest dimension.
    assert kinds[("state", "0", "v_row")] == ("in",)
    assert [v for k, v in kinds.items() if k[-1] == "ema"] == [("in", "out")]


def test_saved_state_goes_on_where_it_was():
    x, y = jnp.ones((4, 2)), jnp.zeros((4, 2))
    model = Net()
    optimizer = Optimizer(model, optax.adam(0.1))

    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss_fn)(model, x, y))

    step(model, optimizer)
    other = nnx.clone(model)
    resumed = Optimizer(other, optax.adam(0.1))
    nnx.update(resumed, optimizer["opt_state"])
    third = Optimizer(nnx.clone(model), optax.adam(0.1))
    third.opt_state = optimizer.opt_state
    step(model, optimizer)
    step(other, resumed)
    for path, value in model["params"].items():
        assert (other["params"][path] == value).all()
    assert int(resumed.step) == 2 and int(third.opt_state[0].count) == 1
    with pytest.raises(OptimizerError, match="has the structure .* but the assigned one"):
        third.opt_state = optax.sgd(0.1).init(model["params"])
    wrong = jax.tree.map(lambda x: x[..., None], optimizer.opt_state)
    with pytest.raises(OptimizerError, match=r"at '0.count' has shape \(1,\), not \(\)"):
        third.opt_state = wrong


def test_donation_after_construction():
    model = Net()
    # Its state has the parameters themselves.
    optimizer = Optimizer(model, optax.lbfgs(0.1, linesearch=None))
    x, y = jnp.ones((4, 2)), jnp.zeros((4, 2))

    @nnx.jit(donate=True)
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss_fn)(model, x, y))

    for _ in range(3):
        step(model, optimizer)
    assert np.isfinite(model.blocks[0].w).all() and int(optimizer.step) == 3


def test_the_state_is_sharded_like_the_parameters_and_cloned():
    mesh = jax.make_mesh((4,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    model = nnx.Linear.init(0)(4, 8)
    model["params"] = jax.tree.map(lambda x: jax.device_put(x, sharding), model["params"])
    optimizer = Optimizer(model, optax.adam(0.1))
    assert optimizer.opt_state[0].mu["kernel"].sharding.is_equivalent_to(sharding, 2)
    step = nnx.jit(lambda m, o: o.update(m, m["params"]))
    step(model, optimizer)
    assert model.kernel.sharding.is_equivalent_to(sharding, 2)
    assert optimizer.opt_state[0].nu["bias"].sharding.is_equivalent_to(sharding, 1)
    same_model, same = nnx.clone((model, optimizer))
    step(model, optimizer)
    step(same_model, same)
    assert (same_model.kernel == model.kernel).all() and int(same.step) == 2


def test_only_what_wrt_selects_is_trained():
    model = Net()
    head = nnx.All("params", nnx.PathContains("1"))
    optimizer = Optimizer(model, optax.adam(0.1), wrt=head)
    before = model["params"]
    grads = nnx.grad(loss_fn, wrt=head)(model, jnp.ones((4, 2)), jnp.zeros((4, 2)))
    optimizer.update(model, grads)
    changed = {path for path, v in model["params"].items() if not jnp.array_equal(v, before[path])}
    assert changed == set(grads) == {("blocks", "1", "w"), ("blocks", "1", "b")}


def test_transformations_by_filter():
    model = Net()
    optimizer = Optimizer(
        model,
        {nnx.PathContains("b"): optax.set_to_zero(), nnx.PathContains("0"): optax.sgd(0.5),
         ...: optax.adam(0.1)},
    )  # fmt: skip
    x, y = jnp.ones((4, 2)), jnp.zeros((4, 2))
    before, grads = model["params"], nnx.grad(loss_fn)(model, x, y)
    nnx.jit(lambda m, o: o.update(m, grads))(model, optimizer)
    after = model["params"]
    assert (after["blocks.0.b"] == before["blocks.0.b"]).all()
    np.testing.assert_allclose(
        after["blocks.0.w"], before["blocks.0.w"] - 0.5 * grads["blocks.0.w"], rtol=1e-6
    )
    np.testing.assert_allclose(
        after["blocks.1.w"],
        before["blocks.1.w"] - 0.1 * jnp.sign(grads["blocks.1.w"]),
        rtol=1e-4,
    )
    paths = [path for path in nnx.refs(optimizer) if "mu" in path]
    assert [path[-3:] for path in paths] == [("blocks", "1", "w")]
    with pytest.raises(
        nnx.UnmatchedPathError, match=r"selects 'blocks.0.b', 'blocks.1.b'. Add \.\.\. as the last"
    ):
        Optimizer(model, {nnx.PathContains("w"): optax.sgd(0.1)})


def test_masks_by_filter():
    model = Net()
    weights = mask(model, nnx.PathContains("w"))
    assert {path for path, m in weights.items() if m} == {p for p in model["params"] if "w" in p}
    assert dict(mask(model["params"], nnx.PathContains("w"))) == dict(weights)
    assert all(mask(model, "params").values())
    check_against_optax(optax.adamw(1e-2, weight_decay=0.5, mask=weights))
    with pytest.raises(nnx.FilterError, match="have no collection, so the filter 'params'"):
        mask(model["params"], "params")
    with pytest.raises(OptimizerError, match="selects no Ref of the Net"):
        mask(model, ..., wrt="parms")


def test_the_learning_rate_can_be_read_and_set():
    model = Dense()
    optimizer = Optimizer(model, optax.inject_hyperparams(optax.sgd)(learning_rate=0.5))
    step = nnx.jit(lambda m, o, g: o.update(m, g))
    grads = jax.tree.map(jnp.ones_like, model["params"])
    assert float(optimizer.learning_rate) == 0.5
    step(model, optimizer, grads)
    optimizer.learning_rate = 0.25
    before = model.w
    step(model, optimizer, grads)
    np.testing.assert_allclose(model.w, before - 0.25, rtol=1e-6)
    assert step._compiled._cache_size() == 1

    @nnx.jit
    def halve():
        optimizer.learning_rate = optimizer.learning_rate / 2

    halve()
    assert float(optimizer.learning_rate) == 0.125
    with pytest.raises(HyperparameterError, match=r"has shape \(\), but got \(2,\)"):
        optimizer.learning_rate = jnp.ones(2)


def test_errors_of_the_learning_rate_say_what_to_do():
    model = Dense()
    with pytest.raises(HyperparameterError, match=r"optax.inject_hyperparams\(optax.adam\)\("):
        _ = Optimizer(model, optax.adam(0.1)).learning_rate
    assert not hasattr(Optimizer(model, optax.adam(0.1)), "learning_rate")
    sgd = optax.inject_hyperparams(optax.sgd)
    several = Optimizer(model, {nnx.PathContains("w"): sgd(0.1), ...: sgd(0.2)})
    with pytest.raises(HyperparameterError, match="several learning rates: 'inner_states.0.inner"):
        _ = several.learning_rate
    rates = {p: v for p, v in several["opt_state"].items() if p[-1] == "learning_rate"}
    np.testing.assert_allclose(list(rates.values()), [0.1, 0.2], rtol=1e-6)
    scheduled = Optimizer(model, sgd(optax.linear_schedule(1.0, 0.0, 10)))
    scheduled.update(model, model["params"])
    scheduled.update(model, model["params"])
    assert float(scheduled.learning_rate) == pytest.approx(0.9)
    with pytest.raises(HyperparameterError, match="follows a schedule"):
        scheduled.learning_rate = 0.1


def nothing_changed(model, optimizer, call, error, match):
    before = {**model["params"], **optimizer["opt_state"]}
    with pytest.raises(error, match=match):
        call()
    after = {**model["params"], **optimizer["opt_state"]}
    assert before.keys() == after.keys() and all(after[p] is before[p] for p in before)


@pytest.mark.parametrize(
    "change, match",
    [
        (
            lambda g: nnx.Partition({p: v for p, v in g.items() if p[-1] == "w"}),
            r"The gradients lack 'b'\. The optimizer was made for wrt='params'.*nnx.grad\(loss, "
            r"wrt='params'\)",
        ),
        (
            lambda g: g | {"calls": jnp.zeros(())},
            "The gradients have 'calls', which wrt does not select",
        ),
        (
            lambda g: nnx.Partition({"w": g["w"], "c": g["b"]}),
            "lack 'b'; they have 'c', which wrt does not select",
        ),
        (
            lambda g: g | {"w": g["w"][:1]},
            r"gradient at 'w' has shape \(1, 2\), not \(2, 2\) as the parameter",
        ),
        (
            lambda g: jax.tree.map(lambda x: x.astype(jnp.bfloat16), g),
            "at 'w' has dtype bfloat16, not float32",
        ),
        (lambda g: g | {"w": [g["w"]]}, "at 'w' has the structure"),
        (lambda g: (g,), "but got a tuple. Take one of them"),
        (lambda g: g["w"], "must be a Partition, as nnx.grad gives it"),
    ],
)
def test_gradients_that_do_not_match_change_nothing(change, match):
    model = Dense()
    optimizer = Optimizer(model, optax.adam(0.1))
    grads = change(jax.tree.map(jnp.ones_like, model["params"]))
    nothing_changed(model, optimizer, lambda: optimizer.update(model, grads), OptimizerError, match)


def test_another_or_a_changed_model_changes_nothing():
    model = Net()
    for tx in (optax.adam(0.1), optax.sgd(0.1)):
        optimizer = Optimizer(model, tx)
        other = Dense()
        nothing_changed(
            other,
            optimizer,
            lambda: optimizer.update(other, other["params"]),
            OptimizerError,
            "lack 'blocks.0.w'.*they have 'w', 'b', which are new.*Make a new Optimizer",
        )
    optimizer = Optimizer(model, optax.adam(0.1))
    model.blocks[1] = Dense(2, 3)
    nothing_changed(
        model,
        optimizer,
        lambda: optimizer.update(model, model["params"]),
        OptimizerError,
        r"'blocks.1.w' has shape \(2, 3\), but had \(2, 2\) when",
    )


def test_a_write_that_is_not_allowed_changes_nothing():
    model = Dense()
    optimizer = Optimizer(model, optax.adam(0.1))
    grads = model["params"]

    def limited():
        with nnx.mutable("params"):
            optimizer.update(model, grads)

    nothing_changed(model, optimizer, limited, nnx.NotMutableError, "opt_state")
    nothing_changed(
        model,
        optimizer,
        lambda: jax.jit(lambda m, g: optimizer.update(m, g))(model, grads),
        nnx.RefError,
        "jax.jit",
    )


def test_mistakes_at_construction():
    with pytest.raises(
        OptimizerError, match=r"'parms' selects no Ref of the Dense.*'counters', 'p"
    ):
        Optimizer(Dense(), optax.sgd(0.1), wrt="parms")
    with pytest.raises(TypeError, match="takes an optax transformation.* got a float: 0.1"):
        Optimizer(Dense(), 0.1)
    with pytest.raises(OptimizerError, match="changed the structure of its state"):
        tx = optax.GradientTransformation(lambda p: (), lambda g, s, p: (g, (jnp.ones(()),)))
        Optimizer(model := Dense(), tx).update(model, model["params"])


def test_a_closure_over_model_and_optimizer_trains_in_one_program():
    model = Net()
    optimizer = Optimizer(model, optax.adam(0.01))
    batches = jnp.ones((20, 4, 2))

    @nnx.jit
    def epoch(batches):
        def step(_, x):
            loss, grads = nnx.value_and_grad(loss_fn)(model, x, x * 0)
            optimizer.update(model, grads)
            return None, loss

        return nnx.scan(step, None, batches)[1]

    losses = jnp.concatenate([epoch(batches), epoch(batches)])
    assert losses[-1] < losses[0] and int(optimizer.step) == 40
    assert epoch._compiled._cache_size() <= 2


def test_an_ensemble_trains_under_vmap():
    models = nnx.vmap(lambda key: nnx.Linear.init(key)(2, 1))(
        jax.random.split(jax.random.key(0), 3)
    )
    optimizers = nnx.vmap(lambda m: Optimizer(m, optax.adam(0.1)))(models)
    x, y = jnp.ones((4, 2)), jnp.zeros((4, 1))

    @nnx.jit
    @nnx.vmap
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
        optimizer.update(model, grads)
        return loss

    first, *_, last = (step(models, optimizers) for _ in range(30))
    assert first.shape == (3,) and (last < first).all()
    assert optimizers.step.tolist() == [30] * 3


def test_gradients_as_a_module_and_a_bare_ref():
    model = nnx.Linear.init(0)(2, 1)
    optimizer = Optimizer(model, optax.sgd(1.0))
    before = model.kernel
    optimizer.update(model, jax.grad(lambda m: m(jnp.ones(2)).sum())(model))
    np.testing.assert_allclose(model.kernel, before - 1)
    w = nnx.Ref(jnp.array(3.0), "params")
    optimizer = Optimizer(w, optax.adam(1.0))
    optimizer.update(w, nnx.grad(lambda r: r.value**2)(w))
    assert float(w.value) == pytest.approx(2.0, rel=1e-4)
    assert ("state", "0", "mu", "value") in nnx.refs(optimizer)


def test_a_parameter_that_is_a_pytree():
    w = [nnx.Ref({"a": jnp.ones(2), "b": jnp.ones((3, 1))}, "params", sharding="x")]
    optimizer = Optimizer(w, optax.adam(1.0))
    assert ("state", "0", "mu", "0", "b") in nnx.refs(optimizer)
    assert nnx.refs(optimizer)["state", "0", "mu", "0", "b"].metadata["sharding"] == "x"
    optimizer.update(w, nnx.grad(lambda w: sum(x.sum() for x in w[0].value.values()))(w))
    np.testing.assert_allclose(w[0].value["b"], jnp.zeros((3, 1)), atol=1e-5)
    w[0].value = {"a": jnp.ones(2), "b": jnp.ones((3, 2))}
    with pytest.raises(OptimizerError, match=r"'0' has shape \(2,\)\(3, 2\), but had"):
        optimizer.update(w, nnx.get_partition(w))


def test_swapped_arguments_are_an_error():
    model = nnx.Linear.init(0)(2, 1)
    message = r"the model first.*nnx\.Optimizer\(model, optax\.adam\(1e-3\)\), but got a Gradient.* and a Linear"
    with pytest.raises(TypeError, match=message):
        nnx.Optimizer(optax.adam(0.1), model)


@pytest.mark.parametrize(
    "make",
    [
        lambda labels: optax.adamw(0.1, mask=labels),
        lambda labels: optax.adamw(0.1, mask=lambda params: labels),
        lambda labels: optax.masked(optax.adam(0.1), labels),
        lambda labels: optax.multi_transform(
            {True: optax.adam(0.1), False: optax.sgd(1.0)}, labels
        ),
    ],
)
def test_a_mask_that_is_not_a_partition_is_an_error(make):
    model = nnx.Linear.init(0)(2, 1)
    message = (
        r"a mask, labels or similar.*are a Partition here.*nnx\.training\.mask\(model, filter\)"
    )
    with pytest.raises(nnx.OptimizerError, match=message) as info:
        nnx.Optimizer(model, make({"kernel": True, "bias": False}))
    assert "Partition" in str(info.value.__cause__)
    nnx.Optimizer(model, make(nnx.training.mask(model, nnx.PathContains("kernel"))))


def test_a_model_of_the_same_structure_is_taken_as_it_comes():
    one, two = nnx.Linear.init(0)(2, 1), nnx.Linear.init(1)(2, 1)
    optimizer, was = nnx.Optimizer(one, optax.sgd(1.0)), two.kernel
    optimizer.update(two, jax.tree.map(jnp.ones_like, two["params"]))
    np.testing.assert_allclose(two.kernel, was - 1.0)


def test_a_typo_in_wrt_is_an_error():
    with pytest.raises(nnx.OptimizerError, match=r"'params'\. There is .*did you mean 'params'\?$"):
        nnx.Optimizer(nnx.Linear.init(0)(2, 1), optax.sgd(1.0), wrt="parms")


class OfNumpy(nnx.Module):
    w: jax.Array = nnx.param()

    def __init__(self):
        self.w = np.ones((2, 1))  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(self, x):
        return x @ self.w


def test_parameters_of_numpy_in_double_precision():
    grads = nnx.grad(lambda m: m(jnp.ones((1, 2))).sum())(OfNumpy())
    model = OfNumpy()
    Optimizer(model, optax.sgd(0.5)).update(model, grads)
    assert model.w.dtype == jnp.float32 and model.w.ravel().tolist() == [0.5, 0.5]
    model = OfNumpy()
    model["params"] = jax.tree.map(lambda a, g: a - 0.5 * g, model["params"], grads)
    assert model.w.ravel().tolist() == [0.5, 0.5]
    with pytest.raises(
        nnx.DtypeError, match=r"dtype float32, .* has float16\. .*astype\('float32'"
    ):
        OfNumpy()["params"] = {"w": jnp.ones((2, 1), jnp.float16)}
    with pytest.raises(nnx.DtypeError, match=r"dtype float32, .* has float64\."):
        model["params"] = {"w": np.ones((2, 1))}
    with pytest.raises(OptimizerError, match=r"dtype float16, not float32"):
        model = OfNumpy()
        Optimizer(model, optax.sgd(0.5)).update(model, {("w",): jnp.ones((2, 1), jnp.float16)})


def test_two_parameters_of_one_dotted_path():
    class Model(nnx.Module):
        def __init__(self):
            self.of = {"b.c": nnx.Ref(1.0, "params"), "b": {"c": nnx.Ref(2.0, "params")}}

    message = r"dotted path 'of\.b\.c', .*: \('of', 'b\.c'\) and \('of', 'b', 'c'\)\. .* rename"
    with pytest.raises(OptimizerError, match=message):
        Optimizer(Model(), optax.adam(0.1))


def by_hand(tx, params, grads, steps):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize(
    "tx",
    [optax.sgd(0.1), optax.adamw(0.1), optax.adam(0.1, mu_dtype=jnp.float32), optax.lion(0.1)],
)
def test_gradients_wider_than_their_parameters(tx):
    model = Dense()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model["params"])
    nnx.update(model, half, strict=False)
    optimizer = Optimizer(model, tx)
    grads = jax.tree.map(lambda x: jnp.full(x.shape, 0.3, jnp.float32), half)
    traces = []

    @nnx.jit
    def step(model, optimizer, grads):
        traces.append(1)
        optimizer.update(model, grads)

    for _ in range(4):
        step(model, optimizer, grads)
    params, state = by_hand(tx, half, grads, 4)
    for path, value in params.items():
        assert model["params"][path].dtype == jnp.bfloat16
        np.testing.assert_array_equal(model["params"][path], value)
    for ours, theirs in zip(*map(jax.tree.leaves, (optimizer.opt_state, state)), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    # The moments get wider once.
    assert len(traces) <= 2


def test_gradients_of_another_kind_are_refused():
    model = Dense()
    optimizer = Optimizer(model, optax.sgd(0.1))
    for dtype in (jnp.int32, jnp.complex64, jnp.float16):
        grads = jax.tree.map(lambda x, dtype=dtype: jnp.ones(x.shape, dtype), model["params"])
        with pytest.raises(OptimizerError, match=f"'w' has dtype {dtype.dtype}, not float32"):
            optimizer.update(model, grads)


def test_gradients_of_each_example():
    model = Dense()
    x = jnp.arange(8.0).reshape(4, 2)
    grads = nnx.vmap(nnx.grad(lambda m, x: (m(x) ** 2).sum()), in_axes=(None, 0))(model, x)
    key = jax.random.key(0)
    private = optax.contrib.differentially_private_aggregate(1.0, 0.5, key=key)
    tx = optax.chain(private, optax.sgd(0.1))
    before, optimizer = model["params"], Optimizer(model, tx)
    nnx.jit(lambda m, o, g: o.update(m, g))(model, optimizer, grads)
    params, _ = by_hand(tx, before, grads, 1)
    for path, value in params.items():
        np.testing.assert_allclose(model["params"][path], value, rtol=1e-5)


@pytest.mark.parametrize(
    "tx",
    [optax.sgd(0.1), optax.adam(0.1), optax.MultiSteps(optax.sgd(0.1), 2), optax.sgd(0.1, 0.9)],
)
def test_gradients_of_each_example_where_nothing_takes_them(tx):
    model = Dense()
    optimizer = Optimizer(model, tx)
    grads = jax.tree.map(lambda x: jnp.ones((3, *x.shape)), model["params"])
    message = r"gradient at 'w' has shape \(3, 2, 2\), not \(2, 2\).*optax.contrib.dpsgd"
    nothing_changed(
        model, optimizer, lambda: optimizer.update(model, grads), OptimizerError, message
    )


def test_an_update_that_does_not_fit():
    model = Dense()
    for change, message in (
        (lambda g: jax.tree.map(lambda x: x[0], g), r"it at 'w' has shape \(2,\), not \(2, 2\)"),
        (lambda g: nnx.Partition({"w": g["w"]}), "its paths lack 'b'"),
        (lambda g: list(g.values()), "it is a list, not a Partition"),
    ):
        tx = optax.GradientTransformation(
            lambda p: (), lambda g, s, p=None, change=change: (change(g), s)
        )
        optimizer = Optimizer(model, tx)
        call = lambda o=optimizer: o.update(model, model["params"])  # noqa: E731
        nothing_changed(model, optimizer, call, OptimizerError, message)


def test_it_prints_its_transformation_and_the_size_of_its_state():
    with nnx.scope(0):
        model = nnx.Linear(2, 3)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    optimizer = nnx.Optimizer(model, tx)
    optimizer.update(model, model["params"])
    jax.block_until_ready(optimizer.step)
    assert repr(optimizer) == (
        "Optimizer(\n"
        "  tx = clip_by_global_norm, scale_by_adam, scale\n"
        "  wrt = 'params'\n"
        "  step = 1\n"
        "  state = 5 arrays for 2 parameters  # opt_state: 20 (80 B)\n"
        ")"
    )
    assert "scale_by_adam" in optimizer._repr_html_()


def test_in_a_module_it_prints_the_same_as_by_itself():
    class Trainer(nnx.Module):
        def __init__(self):
            self.model = nnx.Linear(2, 3)
            self.optimizers = [nnx.Optimizer(self.model, optax.adam(0.1))]
            self.average = nnx.EMA(self.model, 0.99)

    trainer = Trainer.init(0)()
    jax.block_until_ready(trainer.optimizers[0].step)
    alone = repr(trainer.optimizers[0]).splitlines()
    assert "\n".join(["    0: " + alone[0], *("    " + line for line in alone[1:])]) in repr(
        trainer
    )
    assert (
        "  average = EMA(\n"
        "    decay = 0.99\n"
        "    filter = 'params'\n"
        "    step = 0\n"
        "    average = 2 values  # ema: 11 (44 B)\n"
        "  )\n"
    ) in repr(trainer)
    assert "Cells" not in repr(trainer) + trainer._repr_html_() + repr(trainer.average)


def test_a_model_of_plain_arrays_says_how_to_declare_them():
    class Plain(nnx.Module):
        def __init__(self):
            self.w = jnp.ones(3)

    with pytest.raises(
        OptimizerError, match="a Plain has no Refs. Its arrays are plain attr.*nnx.param"
    ):
        nnx.Optimizer(Plain(), optax.sgd(0.1))
