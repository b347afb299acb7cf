"""orbax and grain: modules and Partitions in checkpoints, batches from data sets."""

import warnings

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import nnx


def make(seed=0):
    with nnx.scope(seed):
        return nnx.Sequential(nnx.Linear(2, 4), nnx.BatchNorm(4))


def test_orbax_saves_partitions_and_modules(tmp_path):
    model, other = make(), make(1)
    nnx.jit(model)(jnp.ones((3, 2)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "values", nnx.get_partition(model))
        checkpointer.save(tmp_path / "module", model)
        checkpointer.wait_until_finished()
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.get_partition(model))
        nnx.update(other, checkpointer.restore(tmp_path / "values", target))
        shapes = nnx.eval_shape(make)
        whole = checkpointer.restore(tmp_path / "module", shapes)
    for tree in (other, whole):
        assert isinstance(tree, nnx.Sequential)
        assert all(map(jnp.array_equal, jax.tree.leaves(tree), jax.tree.leaves(model)))
    whole.layers[0].bias = whole.layers[0].bias + 1


def test_orbax_restores_plain_dicts_that_update_takes(tmp_path):
    model, other = make(), make(1)
    values = nnx.get_partition(model)
    with ocp.PyTreeCheckpointer() as checkpointer, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning that there is no sharding
        checkpointer.save(tmp_path / "flat", values)
        checkpointer.save(tmp_path / "nested", values.nested())
        flat = checkpointer.restore(tmp_path / "flat")
        nested = checkpointer.restore(tmp_path / "nested")
    assert type(flat) is dict and sorted(nested["layers"]["0"]) == ["bias", "kernel"]
    for restored in (flat, nnx.Partition.from_nested(nested)):
        other = make(1)
        nnx.update(other, restored)
        assert jnp.array_equal(other.layers[0].kernel, model.layers[0].kernel)


def test_orbax_keeps_the_last_steps_with_the_optimizer(tmp_path):
    model = make()
    optimizer = nnx.Optimizer(model, optax.adam(0.1))
    optimizer.update(model, model["params"])
    tree = (model, optimizer)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(3, args=ocp.args.StandardSave(nnx.get_partition(tree)))
        manager.wait_until_finished()
        other = make(1)
        again = (other, nnx.Optimizer(other, optax.adam(0.1)))
        like = ocp.args.StandardRestore(nnx.get_partition(again))
        nnx.update(again, manager.restore(manager.latest_step(), args=like))
    assert all(map(jnp.array_equal, jax.tree.leaves(again), jax.tree.leaves(tree)))


def test_grain_feeds_a_step_and_calls_a_module():
    model = nnx.Linear.init(0)(2, 1)
    rows = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32)
    data = grain.MapDataset.source(rows).shuffle(seed=0).map(lambda x: {"x": x, "y": x.sum()})
    optimizer = nnx.Optimizer(model, optax.sgd(0.3))

    @nnx.jit
    def step(model, optimizer, batch):
        error = lambda model: ((model(batch["x"])[:, 0] - batch["y"]) ** 2).mean()
        loss, grads = nnx.value_and_grad(error)(model)
        optimizer.update(model, grads)
        return loss

    for batch in data.repeat(20).batch(4).to_iter_dataset():
        loss = step(model, optimizer, batch)
    assert loss < 1e-3
    predicted = grain.MapDataset.source(rows).map(lambda x: np.asarray(model(x)))
    assert np.allclose(np.stack(list(predicted))[:, 0], rows.sum(1), atol=0.1)
