# ruff: noqa: E402
"""One of several processes for test_processes.py. It writes its results to standard output, one JSON object per line."""

import json
import os
import sys
import time

process, count, port, folder, task = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6]
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax

jax.config.update("jax_cpu_collectives_implementation", "gloo")
if count > 1:
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        count,
        process,
        heartbeat_timeout_seconds=10,
        shutdown_timeout_seconds=20,
    )

import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import nnx
from tests.models import Dense

mesh = jax.make_mesh((2 * count,), ("data",), axis_types=(AxisType.Auto,))
fsdp = nnx.fsdp("data", min_size=8)
run_path = os.path.join(folder, "run")


def say(**facts):
    print(json.dumps(facts), flush=True)


def error_of(call):
    start = time.monotonic()
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error), time.monotonic() - start]
    return None


def make_run():
    with nnx.scope(0):
        model = nnx.Sequential(nnx.Linear(8, 16), nnx.Dropout(0.5), nnx.Linear(16, 8))
    model.train()
    return model, nnx.Optimizer(model, optax.adam(1e-2)), nnx.RngStream(jax.random.key(1))


@nnx.jit
def step(model, optimizer, x):
    loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1.0) ** 2))(model)
    optimizer.update(model, grads)
    return loss


def train(run, steps):
    model, optimizer, stream = run
    losses = []
    with nnx.scope(stream):
        for _ in range(steps):
            x = np.sin(np.arange(192, dtype=np.float32).reshape(24, 8) + float(optimizer.step))
            losses.append(float(step(model, optimizer, nnx.constrain(x, "data", None, mesh=mesh))))
    return losses


def begin():
    """Train, save in the background, and continue."""
    run = nnx.shard(make_run(), fsdp, mesh=mesh)
    first = train(run, 2)
    nnx.save(run_path, nnx.get_partition(run), wait=False)
    say(first=first, then=train(run, 2))


def go_on():
    """Load what `begin` has saved, in this number of processes."""
    run = nnx.shard(nnx.eval_shape(make_run), fsdp, mesh=mesh)
    nnx.load_state(run_path, into=run)
    say(then=train(run, 2), step=int(run[1].step))
    return run


def check():
    """Check what works, and what is an error, with arrays of several processes."""
    begin()
    replicated = nnx.shard(Dense(8, 4), mesh=mesh)
    sharded = nnx.shard(Dense(8, 4), fsdp, mesh=mesh)
    stream = nnx.shard(nnx.RngStream(jax.random.key(3)), mesh=mesh)
    say(spread=[not x.is_fully_addressable for x in (replicated.w, sharded.w, stream.key.value)])
    one = os.path.join(folder, "one.npz")
    nnx.save(one, (replicated, stream))
    multihost_utils.sync_global_devices("one file")
    dense, again = nnx.load(one)
    same = np.array_equal(dense.w, Dense(8, 4).w)
    onto = nnx.load(one, specs={"params": P("data")}, mesh=mesh)[0]
    nnx.load_state(one, into=(sharded, stream))
    say(
        files=sorted(os.listdir(folder)),
        one=bool(same and onto.w.sharding.spec == P("data")),
        keys=bool(
            (
                jax.random.key_data(
                    again.make_key() if hasattr(again, "make_key") else again.key.value
                )
            ).any()
        ),
        sharded_in_one=error_of(lambda: nnx.save(os.path.join(folder, "two.npz"), sharded)),
    )
    pair = os.path.join(folder, "pair")
    nnx.save(pair, (sharded, stream))
    loaded, drawn = nnx.load(pair, specs=fsdp, mesh=mesh)
    shards = [np.asarray(s.data) for s in loaded.w.addressable_shards]
    rows = [s.index[0] for s in loaded.w.addressable_shards]
    right = all(np.array_equal(a, Dense(8, 4).w[i]) for a, i in zip(shards, rows, strict=True))
    local = nnx.load(pair)[0]
    with nnx.scope(drawn):
        key = np.asarray(jax.random.key_data(nnx.make_rng("x"))).tolist()
    with nnx.scope(nnx.RngStream(jax.random.key(3))):
        expected = np.asarray(jax.random.key_data(nnx.make_rng("x"))).tolist()
    say(
        right=right,
        parts=[a.shape for a in shards],
        local=local.w.is_fully_addressable,
        key=key == expected,
    )
    x = nnx.constrain(jnp.ones((4, 8)), None, None, mesh=mesh)
    shown = (
        repr(sharded),
        repr(nnx.get_partition(sharded)),
        str(nnx.tabulate(sharded, x)),
        str(nnx.graph(sharded)),
        repr(stream),
    )
    nnx.display(sharded)
    copied = nnx.clone(sharded, copy=True)
    say(shown=[bool(text) for text in shown], copied=copied.w.sharding == sharded.w.sharding)
    # One saves and the other does not; then they get in step again.
    alone = error_of(lambda: nnx.save(pair, sharded, timeout=1)) if process == 0 else time.sleep(2)
    other = error_of(lambda: nnx.save(pair, sharded if process else (sharded,), timeout=1))
    nowhere = error_of(lambda: nnx.save(os.path.join(folder, "no", "run"), sharded))
    nnx.save(pair, (sharded, stream))
    say(alone=alone, other=other, nowhere=nowhere, whole=bool(nnx.load(pair)[0].w.any()))


def killed():
    """Continue; process 1 is killed in the middle of a step or of a save."""
    run = go_on()
    multihost_utils.sync_global_devices("ready")
    say(ready=True)
    how = sys.argv[6]
    if process == 1:
        if how == "save":
            from nnx.serialize import hosts

            meet = hosts.meet

            def die_when_written(key, *rest):
                if "written" in key:
                    os.kill(os.getpid(), 9)
                meet(key, *rest)

            hosts.meet = die_when_written
            nnx.save(run_path, nnx.get_partition(run))
        os.kill(os.getpid(), 9)
    start = time.monotonic()
    failed = error_of(
        (lambda: nnx.save(run_path, nnx.get_partition(run), timeout=5))
        if how == "save"
        else lambda: train(run, 100)
    )
    say(failed=failed, after=time.monotonic() - start)
    os._exit(3)


{"check": check, "go_on": go_on, "killed": killed, "begin": begin}[task]()
