"""Parameters in half precision, with master weights in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnx

TX = {
    "adamw": optax.adamw(1e-4, weight_decay=0.1),
    "chain": optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1e-5, momentum=0.9)),
    "groups": {nnx.PathContains("bias"): optax.sgd(1e-5), ...: optax.adam(1e-4)},
}


def loss_fn(model, x, y):
    return jnp.mean((model(x).astype(jnp.float32) - y) ** 2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["adamw", "chain"])
def test_small_steps_add_up(dtype, name):
    model = nnx.Linear.init(0)(3, 2, param_dtype=dtype, bias_init=nnx.initializers.ones)
    wide = nnx.Linear.init(0)(3, 2)
    nnx.update(wide, jax.tree.map(lambda w: w.astype(jnp.float32), model["params"]))
    alone = nnx.clone(model)
    x, y = jax.random.normal(jax.random.key(1), (8, 3), dtype), jnp.zeros((8, 2))
    optimizer = nnx.Optimizer(model, nnx.training.master_weights(TX[name]))
    expected = nnx.Optimizer(wide, TX[name])
    narrow = nnx.Optimizer(alone, TX[name])
    before = model["params"]

    @nnx.jit
    def step(*models):
        optimizer, expected, narrow = models[3:]
        grads = nnx.grad(loss_fn)(models[0], x, y)
        optimizer.update(models[0], grads)
        expected.update(models[1], jax.tree.map(lambda g: g.astype(jnp.float32), grads))
        narrow.update(models[2], grads)

    for _ in range(40):
        step(model, wide, alone, optimizer, expected, narrow)
    assert model.kernel.dtype == dtype
    for path, value in wide["params"].items():
        master = optimizer.opt_state.master[path]
        np.testing.assert_allclose(master, value, rtol=1e-6, atol=1e-9)
        # The model has the master weights, rounded once.
        np.testing.assert_array_equal(model["params"][path], master.astype(dtype))
    if dtype == jnp.bfloat16:
        # Without it a step of 1e-4 is lost on a bias of 1.
        np.testing.assert_array_equal(alone.bias, before["bias"])
        assert (optimizer.opt_state.master["bias"] != 1).all()


def test_what_is_assigned_in_between_counts():
    model = nnx.Linear.init(0)(2, 2, param_dtype=jnp.bfloat16)
    optimizer = nnx.Optimizer(model, nnx.training.master_weights(optax.sgd(2**-12)))
    ones = jax.tree.map(jnp.ones_like, model["params"])
    optimizer.update(model, ones)
    model.bias = jnp.full(2, 3.0, jnp.bfloat16)
    kernel = optimizer.opt_state.master["kernel"]
    optimizer.update(model, ones)
    np.testing.assert_array_equal(optimizer.opt_state.master["bias"], np.full(2, 3 - 2**-12))
    np.testing.assert_array_equal(optimizer.opt_state.master["kernel"], kernel - 2**-12)


def test_other_dtypes_schedules_and_saving(tmp_path):
    model = nnx.Sequential.init(0)(
        nnx.Linear.init(1)(2, 2, param_dtype=jnp.bfloat16), nnx.Linear.init(2)(2, 1)
    )
    tx = nnx.training.master_weights(optax.inject_hyperparams(optax.adam)(learning_rate=0.1))
    optimizer = nnx.Optimizer(model, tx)
    dtypes = {str(x.dtype) for path, x in optimizer["opt_state"].items() if "kernel" in path}
    assert dtypes == {"float32"} and optimizer.learning_rate == jnp.float32(0.1)
    grads = nnx.grad(lambda m: m(jnp.ones(2)).sum().astype(jnp.float32))(model)
    optimizer.update(model, grads)
    nnx.save(tmp_path / "state.npz", nnx.get_partition(optimizer))
    other = nnx.Optimizer(model, tx)
    nnx.load_state(tmp_path / "state.npz", into=other)
    jax.tree.map(np.testing.assert_array_equal, other.opt_state, optimizer.opt_state)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(grads, tx.init(model["params"]))


def test_groups():
    model = nnx.Linear.init(0)(2, 2, param_dtype=jnp.bfloat16)
    rules = {f: nnx.training.master_weights(tx) for f, tx in TX["groups"].items()}
    optimizer = nnx.Optimizer(model, rules)
    before = model["params"]
    for _ in range(200):
        optimizer.update(model, jax.tree.map(jnp.ones_like, model["params"]))
    for path, value in before.items():
        assert (model["params"][path] < value).all()
