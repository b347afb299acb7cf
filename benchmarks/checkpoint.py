"""Memory and time of saving and loading a gigabyte, each in a separate process."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

_PROGRAM = """
import re, sys, time
import jax, jax.numpy as jnp
import nnx

what, path, mib, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
# Do not use getrusage: its figure starts with that of the parent process.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
small = {"w": nnx.Ref(jnp.ones(8), "params")}
nnx.save(path + ".small.npz", small)
nnx.load(path + ".small.npz")
if what == "save":
    each = (mib << 18) // count
    model = {f"w{i}": nnx.Ref(jnp.full(each, i, jnp.float32), "params") for i in range(count)}
    jax.block_until_ready([r.value for r in model.values()])
before, start = peak(), time.perf_counter()
if what == "save":
    nnx.save(path, model)
else:
    model = nnx.load(path)
    jax.block_until_ready([r.value for r in model.values()])
print((peak() - before) / mib, time.perf_counter() - start)
"""


def measure(mib: int) -> dict[str, dict[str, float]]:
    """The additional peak memory, divided by the size of the arrays, and seconds.

    When saving, the model is in memory before. When loading, nothing is, so 1 is the model itself.
    """
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("npz", "safetensors"):
            for count in (1, 16):
                path = str(Path(folder) / f"model.{kind}")
                for what in ("save", "load"):
                    command = [sys.executable, "-c", _PROGRAM, what, path, str(mib), str(count)]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    ratio, seconds = map(float, done.stdout.split())
                    name = f"{what} {mib} MiB in {count} arrays, .{kind}"
                    rows[name] = {"peak ÷ size": ratio, "seconds": seconds}
    return rows
