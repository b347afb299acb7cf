"""A model whose buffers were donated either works, or raises one error that names the Ref."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnx


class Net(nnx.Module):
    kernel: jax.Array = nnx.param()

    def __init__(self):
        self.kernel = jnp.eye(2)
        self.mean = nnx.Ref({"a": jnp.zeros(2)}, "batch_stats")
        self.table = jnp.ones(2)

    def __call__(self, x):
        return x @ self.kernel * self.table + self.mean.value["a"]


@nnx.jit(donate=True)
def donating_step(model):
    model.kernel = model.kernel + 1
    model.mean.value = {"a": model.mean.value["a"] + 1}


@pytest.fixture
def models():
    """A live model, and a clone whose buffers it donated."""
    live = Net()
    dead = nnx.clone(live)
    donating_step(live)
    assert nnx.refs(dead)["kernel",]._value.is_deleted()
    return live, dead


x = jnp.ones((1, 2))
USES = {
    "read": lambda live, dead: dead.kernel,
    "read of a Ref": lambda live, dead: dead.mean.value,
    "call": lambda live, dead: dead(x),
    "partition": lambda live, dead: dead["params"],
    "get_partition": lambda live, dead: nnx.get_partition(dead),
    "split": lambda live, dead: nnx.split(dead),
    "split by filter": lambda live, dead: nnx.split(dead, "batch_stats", ...),
    "clone": lambda live, dead: nnx.clone(dead),
    "clone with its arrays": lambda live, dead: nnx.clone(dead, copy=True),
    "deepcopy": lambda live, dead: copy.deepcopy(dead),
    "pickle": lambda live, dead: pickle.dumps(dead),
    "jit": lambda live, dead: nnx.jit(lambda m: m(x))(dead),
    "jit by closure": lambda live, dead: nnx.jit(lambda: dead(x))(),
    "jit that donates": lambda live, dead: donating_step(dead),
    "jit_filter": lambda live, dead: nnx.jit_filter(lambda m: m(x))(dead),
    "jit_filter that returns it": lambda live, dead: nnx.jit_filter(lambda m: m)(dead),
    "grad": lambda live, dead: nnx.grad(lambda m: m(x).sum())(dead),
    "grad by closure": lambda live, dead: nnx.grad(lambda m: (m(x) * dead(x)).sum())(live),
    "grad_filter": lambda live, dead: nnx.grad_filter(lambda m: m(x).sum())(dead),
    "vjp": lambda live, dead: nnx.vjp(lambda m: m(x), dead),
    "vmap": lambda live, dead: nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))(dead, x),
    "scan": lambda live, dead: nnx.scan(lambda c, x: (c, dead(x)), None, x[None]),
    "remat": lambda live, dead: nnx.remat(lambda m: m(x))(dead),
    "cond": lambda live, dead: nnx.cond(x.sum() > 0, lambda m: m(x), lambda m: m(x), dead),
    "capture": lambda live, dead: nnx.capture(dead)(x),
    "Optimizer": lambda live, dead: nnx.Optimizer(dead, optax.sgd(0.1)),
    "EMA": lambda live, dead: nnx.EMA(dead, 0.9),
}
SAVES = {
    "save": lambda live, dead, path: nnx.save(path, dead),
    "save as safetensors": lambda live, dead, path: nnx.save(
        path.with_suffix(".safetensors"), dead
    ),
}


def refused(call):
    with pytest.raises(nnx.DonationError, match="buffer is gone.*donated") as error:
        call()
    text = str(error.value)
    assert any(name in text for name in ("kernel", "mean", "batch_stats", "'params'")), text
    assert len(text.splitlines()) <= 4 and "clone(model, copy=True)" in text


@pytest.mark.parametrize("use", USES)
def test_a_use_of_a_dead_array_names_it(use, models):
    before = dict(nnx.split(models[0])[1])
    refused(lambda: USES[use](*models))
    after = nnx.split(models[0])[1]
    assert all(after[path] is before[path] for path in before)


@pytest.mark.parametrize("save", SAVES)
def test_saving_leaves_no_file(save, models, tmp_path):
    with pytest.raises(nnx.SaveError, match="'kernel' is a deleted array"):
        SAVES[save](*models, tmp_path / "model.npz")
    assert not list(tmp_path.iterdir())


def test_what_shows_a_model_works(models):
    dead = models[1]
    assert "kernel = float32[2,2]" in repr(dead) and "float32[2,2]" in repr(
        nnx.get_ref(dead, "kernel")
    )
    assert nnx.graph(dead) is not None
    assert nnx.eval_shape(lambda m: m(x), dead).shape == (1, 2)
    assert nnx.jit(lambda m: m.table * 2)(dead).shape == (2,)


def test_updates_and_optimizers_take_nothing_dead(models):
    live, dead = models
    other = Net()
    optimizer, ema = nnx.Optimizer(other, optax.adam(0.1)), nnx.EMA(other, 0.9)
    grads, dagdef = other["params"], nnx.split(other)[0]
    gone = nnx.Partition({path: cell._value for path, cell in nnx.refs(dead).items()})
    gone |= {"table": dead.table}
    params = nnx.Partition({("kernel",): gone._items["kernel",]})
    before = {**nnx.split(live)[1], **nnx.split((optimizer, ema))[1]}
    for call in (
        lambda: nnx.update(live, params),
        lambda: live.__setitem__("params", params),
        lambda: setattr(live, "kernel", gone._items["kernel",]),
        lambda: setattr(live.mean, "value", gone._items["mean",]),
        lambda: nnx.Ref(gone._items["mean",], "batch_stats"),
        lambda: nnx.Ref(gone._items["kernel",], "params"),
        lambda: nnx.merge(dagdef, gone),
        lambda: gone["kernel"],
        lambda: list(gone.values()),
        lambda: optimizer.update(live, params),
        lambda: optimizer.update(dead, grads),
        lambda: ema.update(dead),
        lambda: nnx.jit(lambda o, m, g: o.update(m, g))(optimizer, dead, grads),
    ):
        with pytest.raises(nnx.DonationError, match="buffer is gone"):
            call()
    after = {**nnx.split(live)[1], **nnx.split((optimizer, ema))[1]}
    assert all(after[path] is before[path] for path in before)


def test_a_dead_model_can_be_given_values_again(models, tmp_path):
    live, dead = models
    nnx.update(dead, live["params"], live["batch_stats"])
    np.testing.assert_array_equal(dead(x), live(x))

    live, dead = Net(), Net()
    nnx.save(tmp_path / "model.npz", live)
    donated = nnx.clone(dead)
    donating_step(donated)
    nnx.load_state(tmp_path / "model.npz", into=dead)
    np.testing.assert_array_equal(dead(x), live(x))

    dead = Net()
    donating_step(nnx.clone(dead))
    dead.kernel = jnp.ones((2, 2))
    dead.mean.value = {"a": jnp.ones(2)}
    np.testing.assert_array_equal(dead(x), np.full((1, 2), 3.0))


def test_a_target_network_with_arrays_of_its_own():
    model = Net()
    target = nnx.clone(model, copy=True)
    for i in range(3):
        donating_step(model)
        np.testing.assert_array_equal(target.kernel, np.eye(2))
        np.testing.assert_array_equal(model.kernel, np.eye(2) + 1 + i)
    nnx.update(target, jax.tree.map(jnp.copy, model["params"]))
    donating_step(model)
    np.testing.assert_array_equal(target.kernel, np.eye(2) + 3)


def test_a_clone_with_its_arrays():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    shared = nnx.Ref(jax.device_put(jnp.arange(4.0), rows), "params", tag=1)
    host = np.arange(3)
    tree = {
        "a": shared,
        "b": [shared, nnx.Ref(shared.value, "params")],
        "key": nnx.Ref(jax.random.key(0), "rngs"),
        "host": host,
        "n": nnx.Ref(3, "counters"),
        "shape": nnx.Ref(jax.ShapeDtypeStruct((2,), jnp.float32), "params"),
    }
    new = nnx.clone(tree, copy=True)
    assert new["a"] is new["b"][0] is not shared and new["b"][1] is not new["a"]
    assert new["a"].metadata == {"tag": 1} and new["a"].value.sharding == rows
    pointers = {
        ref.value.addressable_data(0).unsafe_buffer_pointer()
        for ref in (shared, new["a"], new["b"][1])
    }
    assert len(pointers) == 3
    assert new["host"] is not host and (new["host"] == host).all()
    assert new["n"].value == 3 and new["shape"].value == tree["shape"].value
    assert jnp.array_equal(
        jax.random.key_data(new["key"].value), jax.random.key_data(jax.random.key(0))
    )
    assert nnx.clone(tree)["a"].value is shared.value

    @nnx.jit
    def inside(m):
        other = nnx.clone(m, copy=True)
        other.kernel = other.kernel + 1
        return other.kernel

    np.testing.assert_array_equal(inside(Net()), np.eye(2) + 1)
