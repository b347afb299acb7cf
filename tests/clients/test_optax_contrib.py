"""optax.contrib: each transformation takes the same steps on a module as on a dict of arrays."""

import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from optax import contrib

import nnx

X = jax.random.normal(jax.random.key(0), (8, 3))
Y = X @ jnp.array([[1.0, 0.0], [-2.0, 1.0], [0.5, 3.0]]) + 1.0


def of(params):
    """The loss of a linear map, as a function of its arrays."""
    return ((X @ params["kernel"] + params["bias"] - Y) ** 2).mean()


def loss(model):
    return ((model(X) - Y) ** 2).mean()


TRANSFORMATIONS = {
    "acprop": lambda: contrib.acprop(0.05),
    "ademamix": lambda: contrib.ademamix(0.05),
    "cocob": lambda: contrib.cocob(),
    "dadapt_adamw": lambda: contrib.dadapt_adamw(1.0),
    "mechanize": lambda: contrib.mechanize(optax.sgd(0.1)),
    "momo": lambda: contrib.momo(0.1),
    "muon": lambda: contrib.muon(0.05),
    "prodigy": lambda: contrib.prodigy(1.0),
    "reduce_on_plateau": lambda: optax.chain(optax.sgd(0.1), contrib.reduce_on_plateau(patience=2)),
    "sam": lambda: contrib.sam(optax.sgd(0.1), optax.sgd(0.01), sync_period=2),
    "schedule_free": lambda: contrib.schedule_free(optax.sgd(0.1), 0.1),
    "schedule_free_adamw": lambda: contrib.schedule_free_adamw(0.1),
    "sophia": lambda: contrib.sophia(0.05),
}
# The arguments that their updates need besides the gradient.
NEED_THE_LOSS = {"momo", "reduce_on_plateau"}


def extra(name, value, fn, key):
    if name in NEED_THE_LOSS:
        return {"value": value}
    return {"obj_fn": fn, "key": key} if name == "sophia" else {}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_steps_are_those_of_optax_by_hand(name):
    model = nnx.Linear.init(1)(3, 2)
    optimizer = nnx.Optimizer(model, TRANSFORMATIONS[name]())
    params = {"kernel": model.kernel, "bias": model.bias}
    tx = TRANSFORMATIONS[name]()
    state = tx.init(params)
    key = jax.random.key(2)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads, **extra(name, value, of, key))
        return value

    @jax.jit
    def by_hand(params, state):
        value, grads = jax.value_and_grad(of)(params)
        updates, state = tx.update(grads, state, params, **extra(name, value, of, key))
        return optax.apply_updates(params, updates), state, value

    values = []
    for _ in range(6):
        value = step(model, optimizer)
        params, state, expected = by_hand(params, state)
        assert jnp.allclose(value, expected, rtol=1e-4)
        values.append(value)
    assert values[-1] < values[0]
    assert jnp.allclose(model.kernel, params["kernel"], rtol=1e-4, atol=1e-5)


def test_weights_to_evaluate_with():
    model = nnx.Linear.init(1)(3, 2)
    optimizer = nnx.Optimizer(model, contrib.schedule_free_sgd(0.1))
    params = dict(model["params"])
    tx = contrib.schedule_free_sgd(0.1)
    state = tx.init(params)
    for _ in range(5):
        grads = nnx.grad(loss)(model)
        optimizer.update(model, grads)
        updates, state = tx.update(dict(grads), state, params)
        params = optax.apply_updates(params, updates)
    expected = contrib.schedule_free_eval_params(state, params)
    found = contrib.schedule_free_eval_params(optimizer.opt_state, model["params"])
    assert all(jnp.allclose(found[path], x, atol=1e-5) for path, x in expected.items())


def test_gradients_of_each_example_for_private_training():
    model = nnx.Linear.init(1)(3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning that it will be called key
        tx = contrib.dpsgd(0.1, l2_norm_clip=0.5, noise_multiplier=0.0, seed=0)
    optimizer = nnx.Optimizer(model, tx)

    @nnx.jit
    def step(model, optimizer):
        example = lambda model, x, y: ((model(x) - y) ** 2).mean()
        grads = nnx.vmap(nnx.grad(example), in_axes=(None, 0, 0))(model, X, Y)
        optimizer.update(model, grads)

    before = dict(model["params"])
    one = lambda p, x, y: ((x @ p["kernel"] + p["bias"] - y) ** 2).mean()
    each = jax.vmap(jax.grad(one), in_axes=(None, 0, 0))(
        {"kernel": model.kernel, "bias": model.bias}, X, Y
    )
    norms = jnp.sqrt(sum((g**2).sum(range(1, g.ndim)) for g in each.values()))
    factor = jnp.minimum(1.0, 0.5 / norms)
    step(model, optimizer)
    for name, g in each.items():
        clipped = (g * factor.reshape(-1, *[1] * (g.ndim - 1))).mean(0)
        assert jnp.allclose(model["params"][name], before[(name,)] - 0.1 * clipped, atol=1e-5)


def test_sharpness_with_a_gradient_in_the_update():
    # The opaque mode takes both steps itself, with the function of the gradient.
    model = nnx.Linear.init(1)(3, 2)
    tx = lambda: contrib.sam(optax.sgd(0.1), optax.sgd(0.01), opaque_mode=True, sync_period=2)
    optimizer = nnx.Optimizer(model, tx())
    params = dict(model["params"])
    state = tx().init(params)
    dagdef, values = nnx.split(model)

    def grad_fn(params, _):
        return jax.grad(lambda p: loss(nnx.merge(dagdef, p)))(params)

    optimizer.update(model, nnx.grad(loss)(model), grad_fn=grad_fn)
    by_dict = lambda p, i: dict(grad_fn(nnx.Partition(p), i))
    updates, _ = tx().update(by_dict(params, 0), state, params, grad_fn=by_dict)
    expected = optax.apply_updates(params, updates)
    assert all(jnp.allclose(model["params"][p], x, atol=1e-6) for p, x in expected.items())
