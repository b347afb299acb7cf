"""Train the GPT of char_gpt.py in several processes with FSDP, save it, and continue in a different number.

Each process has two virtual CPU devices, and talks to the others over the loopback device, as the
hosts of a cluster do over their network. The large arrays of the model and of the optimizer are divided
over all devices. Halfway, the run is saved to a directory in the background; each process writes its own
shards. Then a different number of processes continues from there. Their losses should equal those of the
uninterrupted run, within 1e-3.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

DEVICES = 2  # in each process


def launch(count: int, arguments: argparse.Namespace, *more: str) -> list[float]:
    """Run this file in `count` processes, and return the losses that the first one reports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--worker", address, "--processes", str(count), *more]
    command += ["--steps", str(arguments.steps), "--out", str(arguments.out)]
    command += ["--quick"] * arguments.quick
    programs = [
        subprocess.Popen([*command, "--process", str(i)], env=environment, stdout=subprocess.PIPE)
        for i in range(count)
    ]
    reports = [program.communicate()[0].decode() for program in programs]
    if any(program.returncode for program in programs):
        raise SystemExit(f"a process failed: {[program.returncode for program in programs]}")
    return json.loads(reports[0].splitlines()[-1])


def work(arguments: argparse.Namespace) -> None:
    """The work of one process: train, save halfway and train on; or continue from the save."""
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if arguments.processes > 1:
        jax.distributed.initialize(arguments.worker, arguments.processes, arguments.process)

    import numpy as np
    import optax
    from char_gpt import GPT, read_text, train_step

    import nnx

    text, _ = read_text()
    codes = {character: code for code, character in enumerate(sorted(set(text)))}
    data = np.array([codes[character] for character in text], np.int32)
    batch_size, context = (4, 32) if arguments.quick else (8, 96)
    sizes = (16, 2, 2) if arguments.quick else (64, 4, 2)

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
    fsdp = nnx.fsdp("data", min_size=2**8)

    def make_run():
        model = GPT.init(jax.random.key(0))(len(codes), *sizes)
        return model, nnx.Optimizer(model, optax.adam(3e-3))

    def train(model, optimizer, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            starts = np.random.default_rng(step).integers(len(data) - context, size=(batch_size, 1))
            windows = data[starts + np.arange(context + 1)]
            # Here every process has the whole batch, and puts its rows on its devices.
            batch = jax.make_array_from_callback(windows.shape, rows, lambda i, w=windows: w[i])
            losses.append(float(train_step(model, optimizer, batch)))
        return losses

    path, half = arguments.out.with_suffix(".checkpoint"), arguments.steps // 2
    path = f"{path}/"  # a slash: a directory
    if arguments.resume:
        run = nnx.shard(nnx.eval_shape(make_run), fsdp, mesh=mesh)  # shapes, without values
        nnx.load_state(path, into=run)
        losses = train(*run, half, arguments.steps)
    else:
        run = nnx.shard(make_run(), fsdp, mesh=mesh)
        losses = train(*run, 0, half)
        saving = nnx.save(path, nnx.get_partition(run), wait=False)
        losses += train(*run, half, arguments.steps)
        saving.wait()
    if arguments.process == 0:
        kernel = run[0].embed.embedding
        part = kernel.addressable_shards[0].data.shape
        print(f"each device has {part} of the table {kernel.shape}", file=sys.stderr)
        print(json.dumps(losses))


def main(arguments: argparse.Namespace) -> float:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    other = 1 if arguments.processes > 1 else 2
    whole = launch(arguments.processes, arguments)
    resumed = launch(other, arguments, "--resume")
    half = arguments.steps // 2
    difference = max(abs(a - b) for a, b in zip(whole[half:], resumed, strict=True))

    figure, axis = plt.subplots(figsize=(6, 3.8), constrained_layout=True)
    axis.plot(whole, lw=3, alpha=0.5, label=f"{arguments.processes} processes, uninterrupted")
    axis.plot(range(half, arguments.steps), resumed, "k--", label=f"continued in {other}")
    axis.set(xlabel="step", ylabel="loss")
    axis.legend()
    figure.savefig(arguments.out, dpi=120)
    print(
        f"loss {whole[0]:.3f} to {whole[-1]:.3f} in {arguments.processes} process(es); {other} continued "
        f"with the same losses within {difference:.0e} (should be below 1e-3); plot in {arguments.out}"
    )
    assert difference < 1e-3
    return difference


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("out/multihost_gpt.png"))
    parser.add_argument("--worker", metavar="ADDRESS", help="be one process; others are at ADDRESS")
    parser.add_argument("--process", type=int, default=0, help="which process a worker is")
    parser.add_argument("--resume", action="store_true", help="let a worker continue from a save")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps = 6
    work(arguments) if arguments.worker else main(arguments)
