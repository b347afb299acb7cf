"""The cost of an import beyond `import jax, optax`, and whether it starts a JAX backend."""

from __future__ import annotations

import random
import subprocess
import sys

from benchmarks.timing import Ratio, ratio

_STATEMENTS = {
    "import nnx": "import nnx",
    "import nnx; nnx.Linear": "import nnx; nnx.Linear",
    "import nnx; nnx.jit": "import nnx; nnx.jit",
    "import equinox": "import equinox",
    "import flax.nnx": "import flax.nnx",
}

_PROGRAM = """
import time
start = time.perf_counter()
import jax, optax
middle = time.perf_counter()
{statement}
end = time.perf_counter()
print(middle - start, end - middle)
# JAX refuses this once a backend has started.
try:
    jax.config.update("jax_num_cpu_devices", 3)
    print("no")
except RuntimeError:
    print("yes")
"""


def _once(statement: str) -> tuple[float, float, str]:
    program = _PROGRAM.format(statement=statement)
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    base, own, started = out.stdout.split()
    return float(base), float(own), started


def measure(rounds: int) -> dict[str, dict[str, Ratio | str]]:
    """Seconds beyond `import jax, optax`, as a ratio to the seconds of these, each in a separate process."""
    rng, order = random.Random(0), list(_STATEMENTS)
    times: dict[str, list[tuple[float, float, str]]] = {name: [] for name in order}
    for i in range(rounds + 1):
        rng.shuffle(order)
        for name in order:
            taken = _once(_STATEMENTS[name])
            # The first round writes the bytecode.
            if i:
                times[name].append(taken)
    rows: dict[str, dict[str, Ratio | str]] = {}
    for name, taken in times.items():
        beside = ratio([own for _, own, _ in taken], [base for base, _, _ in taken])
        seconds = f"{beside.microseconds / 1e6:.3f}"
        rows[name] = {"ratio": beside, "seconds": seconds, "starts a backend": taken[0][2]}
    return rows
