"""Checkpoints as directories: contents, other meshes, parts, background saves, crashes."""

import json
import os
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nnx
from tests.models import Dense, Net


def mesh_of(*sizes, kind=AxisType.Auto):
    return jax.make_mesh(sizes, ("data", "model")[: len(sizes)], axis_types=(kind,) * len(sizes))


def same(a, b):
    """Assert that two trees have the same values, to the bit, at the same paths."""
    a, b = nnx.get_partition(a), nnx.get_partition(b)
    assert list(a) == list(b)
    for path in a:
        x_leaves, y_leaves = jax.tree.leaves(a[path]), jax.tree.leaves(b[path])
        for x, y in zip(x_leaves, y_leaves, strict=True):
            if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                assert x.dtype == y.dtype
                x, y = jax.random.key_data(x), jax.random.key_data(y)
            assert type(x) is type(y), path
            x, y = np.asarray(x), np.asarray(y)
            assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), path


DTYPES = [
    *("float32", "bfloat16", "float16", "int8", "uint32", "bool", "complex64", "int4", "uint4"),
    *("int2", "uint2", "float8_e4m3fn", "float8_e5m2", "float8_e4m3", "float4_e2m1fn"),
]


class Everything(nnx.Module):
    """One of everything that a file can hold; without `host`, of what a device can hold."""

    def __init__(self, seed, host=True, dtypes=("bfloat16", "int4", "uint4", "float8_e4m3")):
        draw = jax.random.normal(jax.random.key(seed), (8, 4)) * 3
        self.by_dtype = {
            dtype: nnx.Ref(jnp.abs(draw).astype(jnp.dtype(dtype)), "values") for dtype in dtypes
        }
        self.first = Dense(4, 8, seed=seed)
        self.tied = self.first
        self.again = nnx.Ref(draw, "params", sharding=("data", None))
        self.also = self.again
        self.stream = nnx.RngStream(jax.random.key(seed))
        self.keys = nnx.Ref(jax.random.split(jax.random.key(seed, impl="rbg"), 4), "rngs")
        self.tree = nnx.Ref({"a": jnp.ones(3), "b": (jnp.zeros(2), 1.5, 7)}, "values")
        self.plain = [draw * 2]
        self.scalar = nnx.Ref(jnp.float32(seed))
        self.empty = nnx.Ref(jnp.zeros((0, 4), jnp.bfloat16))
        self.texts = np.array(["a", "bcd"])
        if host:
            self.wide = np.arange(3.0)
        self.foreign = np.arange(3, dtype=">i2")
        self.nothing = np.zeros((0, 2), "U3")
        self.rate = 0.5
        self.function = nnx.relu


def test_everything_comes_back_as_from_one_file(tmp_path):
    model = Everything(1, dtypes=DTYPES)
    nnx.save(tmp_path / "run", model)
    assert sorted(os.listdir(tmp_path)) == ["run"]
    again = nnx.load(tmp_path / "run")
    same(again, model)
    assert again.tied is again.first and again.also is again.again
    assert again.again.metadata["sharding"] == ("data", None) and again.function is nnx.relu
    for name in ("texts", "wide", "foreign", "nothing"):
        x, y = getattr(model, name), getattr(again, name)
        assert type(y) is np.ndarray and y.dtype == x.dtype and np.array_equal(x, y)
    nnx.save(tmp_path / "one.npz", model)
    same(nnx.load(tmp_path / "one.npz"), again)
    # The loaded arrays are not committed, so they may be used on any mesh.
    assert not again.first.w.committed


def test_a_path_without_a_suffix_or_with_a_slash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("run", "run/", b"other", str(tmp_path / "v1.5") + "/", tmp_path / "deep"):
        nnx.save(path, Dense())
        same(nnx.load(path), Dense())
    assert sorted(os.listdir()) == ["deep", "other", "run", "v1.5"]
    nnx.save("v1.5", Dense(seed=2))  # it is a directory by now
    same(nnx.load("v1.5"), Dense(seed=2))
    (tmp_path / "empty").mkdir()
    nnx.save("empty", Dense())
    os.symlink("run", "link")
    nnx.save("link", Dense(seed=3))
    same(nnx.load("run"), Dense(seed=3))
    assert os.path.islink("link")
    # It has the same permissions as any other directory of this user.
    os.mkdir("plain")
    assert os.stat("deep").st_mode == os.stat("plain").st_mode


def test_a_save_replaces_the_one_before_and_leaves_nothing_behind(tmp_path):
    for seed in range(3):
        nnx.save(tmp_path / "run", Dense(seed=seed))
        same(nnx.load(tmp_path / "run"), Dense(seed=seed))
    found = sorted(os.listdir(tmp_path / "run"))
    assert len(found) == 2 and found[1] == "nnx.json" and found[0].startswith("arrays-")
    structure = json.loads((tmp_path / "run" / "nnx.json").read_text())["structure"]
    assert structure["format"] == "nnx" and structure["arrays"] == found[0]


def test_orbax_reads_the_arrays_by_name(tmp_path):
    import orbax.checkpoint as ocp

    nnx.save(tmp_path / "run", Net())
    (folder,) = (tmp_path / "run").glob("arrays-*")
    args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in ["blocks.0.w"]}
    found = ocp.PyTreeCheckpointHandler().restore(
        folder,
        args=ocp.args.PyTreeRestore(
            dict.fromkeys(args, 0), restore_args=args, partial_restore=True
        ),
    )
    assert np.array_equal(found["blocks.0.w"], Net().blocks[0].w)


# ---- onto meshes


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_from_one_mesh_onto_another(tmp_path, kind):
    model = Everything(2, host=False)
    nnx.shard(model, {nnx.PathContains("w"): P("data", "model")}, mesh=mesh_of(2, 2, kind=kind))
    assert model.again.value.sharding.spec[0] == "data"
    nnx.save(tmp_path / "run", model)
    for mesh in (mesh_of(4, kind=kind), mesh_of(1, 2, kind=kind)):
        loaded = nnx.load(tmp_path / "run", specs={"params": P("data")}, mesh=mesh)
        same(loaded, model)
        assert loaded.first.w.sharding == NamedSharding(mesh, P("data"))
        assert loaded.again.value.sharding.spec == P("data")
        assert loaded.stream.key.value.sharding.is_fully_replicated
        assert loaded.by_dtype["int4"].value.sharding == NamedSharding(mesh, P())
        assert type(loaded.texts) is np.ndarray


def test_each_device_holds_its_own_part_only(tmp_path):
    mesh = mesh_of(4)
    nnx.save(tmp_path / "run", Dense(8, 4))
    before = {id(x) for x in jax.live_arrays()}
    model = nnx.load(tmp_path / "run", specs=nnx.fsdp("data", min_size=8), mesh=mesh)
    assert [s.data.shape for s in model.w.addressable_shards] == [(2, 4)] * 4
    whole = [x for x in jax.live_arrays() if id(x) not in before and x.shape == (8, 4)]
    assert all(x.sharding.spec == P("data") for x in whole)


def test_the_metadata_the_rules_and_the_ambient_mesh_say_where(tmp_path):
    layer = nnx.Linear.init(0)(8, 4, kernel_metadata={"sharding": ("embed", "mlp")})
    mesh = mesh_of(2, 2)
    for path in (tmp_path / "run", tmp_path / "one.npz"):
        nnx.save(path, layer)
        loaded = nnx.load(path, axes={"embed": "data", "mlp": "model"}, mesh=mesh)
        assert loaded.kernel.sharding == NamedSharding(mesh, P("data", "model"))
        with jax.set_mesh(mesh), nnx.axis_rules({"mlp": "data"}):
            loaded = nnx.load(path)
        assert loaded.kernel.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "data")), 2)
        assert loaded.bias.sharding.is_equivalent_to(NamedSharding(mesh, P()), 1)
        same(loaded, layer)
        with pytest.raises(nnx.ShardingError, match="Ref 'bias'"):
            nnx.load(path, specs={...: P(None, "data")}, mesh=mesh)


def test_onto_nothing(tmp_path):
    mesh = jax.sharding.AbstractMesh((64,), ("data",))
    model = Everything(3)
    nnx.save(tmp_path / "run", model)
    shapes = nnx.load(tmp_path / "run", only=None)
    for x in jax.tree.leaves(nnx.get_partition(shapes)):
        assert isinstance(x, jax.ShapeDtypeStruct | np.ndarray | int | float)
    assert shapes.keys.value.dtype == model.keys.value.dtype
    nnx.save(tmp_path / "large", nnx.Linear.init(0)(128, 64))
    planned = nnx.load(tmp_path / "large", only=None, specs=nnx.fsdp("data"), mesh=mesh)
    assert planned.kernel.sharding == NamedSharding(mesh, P())
    planned = nnx.load(tmp_path / "large", only=None, specs=nnx.fsdp("data", 8), mesh=mesh)
    assert planned.kernel.sharding == NamedSharding(mesh, P("data"))
    with pytest.raises(nnx.LoadError, match="the mesh is abstract.*Pass only=None"):
        nnx.load(tmp_path / "large", mesh=mesh)


def test_a_part_by_filter(tmp_path):
    model = Everything(4)
    for path in (tmp_path / "run", tmp_path / "one.npz"):
        nnx.save(path, model)
        part = nnx.load(path, only=("params", nnx.PathContains("tree")))
        assert jnp.array_equal(part.first.w, model.first.w)
        assert jnp.array_equal(part.tree.value["a"], jnp.ones(3))
        assert isinstance(part.scalar.value, jax.ShapeDtypeStruct)
        with pytest.raises(nnx.FilterError, match="parms"):
            nnx.load(path, only="parms")


def test_a_partition_and_a_ref_alone(tmp_path):
    model = Net()
    nnx.save(tmp_path / "part", model["params"])
    part = nnx.load(tmp_path / "part")
    assert isinstance(part, nnx.Partition)
    same_values = jax.tree.map(lambda x, y: bool((x == y).all()), part, model["params"])
    assert all(jax.tree.leaves(same_values))
    mesh = mesh_of(2)
    part = nnx.load(tmp_path / "part", specs={nnx.PathContains("w"): P("data")}, mesh=mesh)
    assert part["blocks.0.w"].sharding == NamedSharding(mesh, P("data"))
    nnx.save(tmp_path / "ref", nnx.Ref(jnp.ones(4), "params"))
    assert nnx.load(tmp_path / "ref", specs={...: P("data")}, mesh=mesh).value.sharding.mesh == mesh


# ---- into a model that is there


def test_load_state_into_shards_and_shapes(tmp_path):
    mesh, other = mesh_of(2, 2), mesh_of(4)
    model = Everything(5, host=False)
    nnx.shard(model, {"params": P("data")}, mesh=mesh)
    nnx.save(tmp_path / "run", model)
    target = Everything(6, host=False)
    nnx.shard(target, {nnx.PathContains("again"): P("data")}, mesh=other)
    report = nnx.load_state(tmp_path / "run", into=target)
    assert not (report.missing or report.unexpected or report.mismatched)
    same(target, model)
    assert target.again.value.sharding == NamedSharding(other, P("data"))
    shapes = nnx.shard(nnx.eval_shape(lambda: Dense(8, 4)), {"params": P("data")}, mesh=other)
    nnx.save(tmp_path / "dense", Dense(8, 4, seed=7))
    nnx.load_state(tmp_path / "dense", into=shapes)
    same(shapes, Dense(8, 4, seed=7))
    assert shapes.w.sharding == NamedSharding(other, P("data"))


def test_load_state_of_a_part(tmp_path):
    model, target = Dense(seed=1), Dense(seed=2)
    model.calls = jnp.array(7)
    for path in (tmp_path / "run", tmp_path / "one.npz"):
        nnx.save(path, model)
        target.calls, target.w = jnp.array(1), jnp.zeros((2, 2))
        report = nnx.load_state(path, into=target, only="params")
        assert report.loaded == (("w",), ("b",)) and not report.missing
        assert jnp.array_equal(target.w, model.w) and target.calls == 1
        # Values that the filter excludes do not matter, but missing values that it selects do.
        nnx.save(path, model["params"])
        nnx.load_state(path, into=target, only="params")
        with pytest.raises(nnx.LoadError, match="missing in the file: 'calls'"):
            nnx.load_state(path, into=target, only=("params", "counters"))
        with pytest.raises(nnx.FilterError):
            nnx.load_state(path, into=target, only="counter")


def test_load_state_that_does_not_fit_changes_nothing(tmp_path):
    nnx.save(tmp_path / "run", Dense(2, 3))
    target = Dense()
    with pytest.raises(
        nnx.LoadError, match=r"'w' is float32\[2,3\] in the file and float32\[2,2\]"
    ):
        nnx.load_state(tmp_path / "run", into=target)
    same(target, Dense())
    report = nnx.load_state(tmp_path / "run", into=target, strict=False)
    assert set(report.mismatched) == {("w",), ("b",)} and report.loaded == (("calls",),)


def test_layers_one_by_one_into_a_stack(tmp_path):
    with nnx.scope(0):
        layers = [nnx.Linear(4, 4) for _ in range(2)]
        stack = nnx.Stack(lambda: nnx.Linear(4, 4), 2)
    nnx.save(tmp_path / "run", {"layers": nnx.Sequential(*layers)})
    target = {"layers": stack}
    nnx.shard(target, {"params": P(None, "data")}, mesh=mesh_of(2))
    report = nnx.load_state(tmp_path / "run", into=target, strict=False)
    assert len(report.loaded) == 2
    for i, layer in enumerate(layers):
        np.testing.assert_array_equal(stack[i].kernel, layer.kernel)
    params = nnx.get_partition(target, "params")
    assert all(x.sharding.spec == P(None, "data") for x in params.values())


@nnx.jit
def step(model, optimizer, x):
    loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1.0) ** 2))(model)
    optimizer.update(model, grads)
    return loss


def test_a_training_run_goes_on_with_the_same_losses(tmp_path):
    def make_run():
        with nnx.scope(0):
            model = nnx.Sequential(nnx.Linear(8, 16), nnx.Dropout(0.5), nnx.Linear(16, 8))
        model.train()
        return model, nnx.Optimizer(model, optax.adamw(1e-2)), nnx.RngStream(jax.random.key(1))

    def train(run, steps):
        model, optimizer, stream = run
        losses = []
        with nnx.scope(stream):
            for _ in range(steps):
                losses.append(step(model, optimizer, jax.random.normal(nnx.make_rng("x"), (4, 8))))
        return np.array(losses)

    run = nnx.shard(make_run(), nnx.fsdp("data", min_size=8), mesh=mesh_of(4))
    train(run, 3)
    nnx.save(tmp_path / "run", nnx.get_partition(run))
    expected = train(run, 3)
    again = nnx.shard(nnx.eval_shape(make_run), nnx.fsdp("data", min_size=8), mesh=mesh_of(2))
    nnx.load_state(tmp_path / "run", into=again)
    assert again[1].step == 3
    assert np.allclose(train(again, 3), expected, rtol=1e-5)


@pytest.mark.parametrize("tx", [optax.adam(1e-2), optax.adafactor(1e-2, min_dim_size_to_factor=8)])
def test_a_run_on_eight_devices_goes_on_on_meshes_of_other_shapes(tmp_path, tx):
    def make_run():
        model = nnx.MLP.init(0)(8, [16], 8)
        return model, nnx.Optimizer(model, tx)

    def rule(path, ref):
        where = dict(zip(("data", "model"), mesh.axis_sizes, strict=False))
        divides = zip(ref.value.shape, where, strict=False)
        return P(*(axis if size % where[axis] == 0 else None for size, axis in divides))

    x = jnp.arange(32.0).reshape(4, 8) / 32
    mesh = mesh_of(2, 4)
    run = nnx.shard(make_run(), rule, mesh=mesh)
    step(*run, x)
    nnx.save(tmp_path / "run", nnx.get_partition(run))
    expected = [float(step(*run, x)) for _ in range(2)]
    for sizes in [(4, 2), (8,), (1, 2)]:
        mesh = mesh_of(*sizes)
        shapes = nnx.shard(nnx.eval_shape(make_run), rule, mesh=mesh)
        again = nnx.shard(make_run(), rule, mesh=mesh)
        for into in (shapes, again):
            nnx.load_state(tmp_path / "run", into=into)
            places = nnx.shardings(into, rule, mesh=mesh)
            for path, value in nnx.get_partition(into).items():
                assert value.sharding.is_equivalent_to(places[path], value.ndim), path
            losses = [float(step(*into, x)) for _ in range(2)]
            np.testing.assert_allclose(losses, expected, rtol=1e-5)


# ---- in the background


def test_training_goes_on_while_a_save_is_written(tmp_path):
    model = [nnx.Ref(jnp.full(1 << 18, float(i)), "params") for i in range(4)]
    host = np.arange(10)

    @nnx.jit(donate=True)
    def step(model):
        for ref in model:
            ref.value = ref.value * 0 - 7

    step([nnx.Ref(jnp.ones(1 << 18), "params") for _ in range(4)])
    saving = nnx.save(tmp_path / "run", {"model": model, "host": host}, wait=False)
    step(model)
    host[:] = -1
    saving.wait()
    assert saving.done() and "done" in repr(saving)
    loaded = nnx.load(tmp_path / "run")
    assert [float(ref.value.max()) for ref in loaded["model"]] == [0, 1, 2, 3]
    assert loaded["host"].tolist() == list(range(10))
    assert nnx.save(tmp_path / "run", model) is None


def test_a_load_and_the_next_save_wait(tmp_path):
    for seed in range(3):
        nnx.save(tmp_path / "run", Dense(seed=seed), wait=False)
    same(nnx.load(tmp_path / "run"), Dense(seed=2))
    nnx.save(tmp_path / "run", Dense(seed=3), wait=False)
    target = Dense()
    nnx.load_state(tmp_path / "run", into=target)
    same(target, Dense(seed=3))


def test_a_failure_in_the_background_is_raised_once(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    nnx.save(tmp_path / "run", Dense())
    for tell in ("wait", "next save", "load"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            saving = nnx.save(tmp_path / "run", Dense(seed=1), wait=False)
            while not saving.done():
                pass
        assert "failed" in repr(saving)
        with pytest.raises(nnx.SaveError, match="run cannot be saved: No space left") as error:
            if tell == "wait":
                saving.wait()
            elif tell == "load":
                nnx.load(tmp_path / "run")
            else:
                nnx.save(tmp_path / "run", Dense(seed=2))
        assert isinstance(error.value, OSError) and error.value.errno == 28
        same(nnx.load(tmp_path / "run"), Dense())
    assert os.listdir(tmp_path) == ["run"]
    nnx.save(tmp_path / "run", Dense(seed=2))


def test_saves_from_several_threads(tmp_path):
    threads = [
        threading.Thread(target=nnx.save, args=(tmp_path / "run", Dense(seed=i))) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    model = nnx.load(tmp_path / "run")
    assert any(jnp.array_equal(model.w, Dense(seed=i).w) for i in range(4))
    assert len(os.listdir(tmp_path / "run")) == 2


def test_one_file_is_not_written_in_the_background(tmp_path):
    with pytest.raises(nnx.SaveError, match="wait=False is for directories.*without a suffix"):
        nnx.save(tmp_path / "m.npz", Dense(), wait=False)


# ---- other programs

PROGRAM = """
import os, signal, sys
import jax.numpy as jnp
import nnx
from nnx.serialize import folders
from tests.models import Dense
path, how = sys.argv[1:]
nnx.save(path, Dense(seed=1))
print("saved", flush=True)
if how == "end":
    nnx.save(path, Dense(seed=2), wait=False)  # and the program ends
else:
    real = folders.os.replace if how == "replace" else folders.os.rename
    def kill(*args):
        if how == "after":
            real(*args)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(folders.os, "replace" if how == "replace" else "rename", kill)
    nnx.save(path, Dense(seed=2))
"""


def test_a_program_that_ends_or_is_killed_while_it_saves(tmp_path):
    hows = {"end": 2, "replace": 1, "rename": 1, "after": 1}
    programs = {
        how: subprocess.Popen([sys.executable, "-c", PROGRAM, tmp_path / how / "run", how])
        for how in hows
        if (tmp_path / how).mkdir() is None
    }
    for how, program in programs.items():
        assert program.wait() == (0 if how == "end" else -signal.SIGKILL)
        same(nnx.load(tmp_path / how / "run"), Dense(seed=hows[how]))
        # The next save removes the remains of the killed one, beside and inside.
        nnx.save(tmp_path / how / "run", Dense(seed=3))
        same(nnx.load(tmp_path / how / "run"), Dense(seed=3))
        assert os.listdir(tmp_path / how) == ["run"]
        assert len(os.listdir(tmp_path / how / "run")) == 2
