"""A profile of a training step of `examples/char_gpt.py`, by layer: `python -m benchmarks.profile_layers`.

It runs the step under `jax.profiler`, finds each operation's layer path in the compiled program, and draws
the time by layer, forward and backward.
"""

import collections
import glob
import gzip
import json
import re
import sys
import tempfile
from pathlib import Path

import jax
import matplotlib
import numpy as np
import optax

import nnx

ROOT = Path(__file__).parents[1]


def by_layer(compiled: str, events: list[dict]) -> dict[str, list[float]]:
    """Microseconds forward and backward, by the path of the layer."""
    names = dict(re.findall(r'%?([\w.\-]+) = [^\n]*?op_name="([^"]*)"', compiled))
    found: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for event in events:
        name = names.get(event["args"]["hlo_op"], "")
        backward = "transpose(" in name
        parts = [
            part
            for part in name.replace("transpose(", "")
            .replace("jvp(", "")
            .replace(")", "")
            .split("/")
            if re.match(r"[a-z_]+(\.\w+)*$", part)
        ]
        path = [p for p in parts[:-1] if p not in _NO_LAYERS]
        if not event["args"]["hlo_op"].startswith(("while", "call", "conditional")):
            found["/".join(path[:4]) or "the step itself"][backward] += event["dur"]
    return found


# The names that JAX adds for loops and recomputation.
_NO_LAYERS = {"while", "body", "cond", "closed_call", "checkpoint", "rematted_computation"}


def main(path: Path, steps: int = 5) -> None:
    """Profile, draw, and print the table."""
    sys.path.insert(0, str(ROOT / "examples"))
    import char_gpt

    model = char_gpt.GPT.init(jax.random.key(0))(64, 128, 4, 2)
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3))
    windows = np.random.default_rng(0).integers(0, 64, (32, 65)).astype(np.int32)
    arguments = (model, optimizer, windows)
    compiled = char_gpt.train_step.lower(*arguments).compile().as_text()
    char_gpt.train_step(*arguments).block_until_ready()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                char_gpt.train_step(*arguments).block_until_ready()
        (file,) = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
        with gzip.open(file) as opened:
            trace = json.load(opened)
    events = [e for e in trace["traceEvents"] if "hlo_op" in e.get("args", {})]
    found = by_layer(compiled, events)
    rows = sorted(found.items(), key=lambda row: -sum(row[1]))[:14]
    whole = sum(map(sum, found.values())) / 100
    for name, (forward, backward) in rows:
        print(f"| `{name}` | {forward / whole:.1f} | {backward / whole:.1f} |")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 0.28 * len(rows) + 0.8), layout="constrained")
    labels = [name for name, _ in rows][::-1]
    forward, backward = (np.array([row[k] for _, row in rows][::-1]) / whole for k in (0, 1))
    axes.barh(labels, forward, color="#4477aa", label="forward")
    axes.barh(labels, backward, left=forward, color="#ee6677", label="backward")
    axes.set_xlabel("% of the time of a step")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(ROOT / "docs/images/profile.png")
