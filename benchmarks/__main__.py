"""`python -m benchmarks`: run all benchmarks, print one page, and write it to `benchmarks/results/`."""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path
from typing import Any

import equinox
import flax
import jax
import jax.numpy as jnp

from benchmarks import (
    check,
    checkpoint,
    compiling,
    eager,
    epoch,
    growth,
    imports,
    layers,
    llama,
    loops,
    memory,
    purify,
    report,
    sharded,
    steps,
    transformer,
)

KINDS = {
    "SGD step": steps.sgd_contenders,
    "Adam step": steps.adam_contenders,
    "evaluation step": steps.eval_contenders,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = ["steps", "eager", "compile", "epoch", "transformer", "pytrees", "memory", "growth"]
    names += ["layers", "llama", "checkpoint", "purify", "loops", "import", "sharded"]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--quick", action="store_true", help="few rounds, small sizes")
    parser.add_argument(
        "--check", action="store_true", help="fail if a ratio is worse than the committed one"
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (5 if arguments.quick else 21)
    sizes = arguments.sizes or ([10, 100] if arguments.quick else [10, 100, 500, 2000])
    only = arguments.only
    pages: dict[str, dict[str, Any]] = {}

    def page(name: str, text: str, data: Any) -> None:
        print(text, flush=True)
        pages[name] = {"text": text, "data": data}

    if "steps" in only:
        by_kind = {}
        for title, kind in KINDS.items():
            by_kind[title] = steps.measure(kind, sizes, rounds)
            page(title, report.by_size(title, by_kind[title]), by_kind[title])
        if not arguments.check:
            arguments.out.mkdir(parents=True, exist_ok=True)
            report.plot(by_kind, arguments.out / "steps.png")
    if "eager" in only:
        forward = eager.forward(rounds)
        page("forward", report.by_name("Eager forward, 50 layers", forward, "x @ w + b"), forward)
        built = eager.construction(rounds)
        page("construction", report.by_name("Construction, 50 layers", built, "by hand"), built)
    if "compile" in only:
        few = 2 if arguments.quick else 9
        stages = compiling.stages(10 if arguments.quick else 50, few)
        page("compile", report.table("Trace, lower, compile: ratios to jax.jit", stages), stages)
        depth = {"seconds": compiling.depth(1 if arguments.quick else 3)}
        page("depth", report.table("Trace + compile by depth", depth), depth)
    if "epoch" in only:
        for size in [s for s in sizes if s <= 500]:
            ratios = epoch.epoch(size, max(3, rounds // 3))
            title = f"An epoch of 100 steps as one program, {size} arrays"
            page(title, report.by_name(title, ratios, "100 jax.jit dispatches"), ratios)
    if "transformer" in only:
        real = transformer.measure(3 if arguments.quick else 7)
        page("transformer", report.by_name("Transformer step", real, "jax.jit"), real)
    if "pytrees" in only:
        rows = eager.pytrees(rounds, 25 if arguments.quick else 250)
        title = "Whole-model operations, 500 arrays: ratios to Equinox's"
        page("pytrees", report.by_row(title, rows, "equinox"), rows)
    if "loops" in only:
        rows = loops.measure(max(5, rounds // 3))
        title = (
            "Loops and branches outside compiled code, second and later calls: ratios to jax.lax"
        )
        page("loops", report.by_row(title, rows, "jax.lax"), rows)
    if "import" in only:
        rows = imports.measure(2 if arguments.quick else 7)
        title = "Imports beyond `import jax, optax`: ratios to it, with bytecode"
        page("import", report.table(title, rows), rows)
    if "sharded" in only:
        for kind, results in sharded.measure([s for s in sizes if s <= 500], rounds).items():
            title = f"{kind} of arrays that are sharded over {sharded.DEVICES} devices"
            page(title, report.by_size(title, results), results)
    if "memory" in only:
        used = memory.measure()
        page("memory", report.table("Memory of a large step, MiB", used, 1), used)
    if "growth" in only:
        grown = growth.measure((50, 100, 200) if arguments.quick else (100, 500, 1000, 2000, 4000))
        rows = {
            n: {"slope, ns": g["slope in ns"], "worst misfit": g["worst misfit"]}
            for n, g in grown.items()
        }
        page("growth", report.table("Growth of a call, per unit", rows), grown)
    if "layers" in only:
        for dtype in (jnp.float32, jnp.bfloat16):
            title = f"Layers, value and gradient in {dtype.__name__}: ratios to flax"
            page(f"layers, {dtype.__name__}", *layers.page(title, rounds, dtype))
    if "llama" in only:
        for name, rows in (
            ("training", llama.training(3 if arguments.quick else 7)),
            ("decoding", llama.decoding(3 if arguments.quick else 7)),
        ):
            page(f"llama, {name}", report.table(f"examples/llama.py, {name}", rows), rows)
    if "checkpoint" in only:
        files = checkpoint.measure(64 if arguments.quick else 1024)
        page("checkpoint", report.table("Saving and loading", files), files)
    if "purify" in only:
        rows = purify.measure(rounds)
        base = {"by hand": "1"} | dict.fromkeys(("nnx.purify", "jaxpurify"), "-")
        flat = {name: base | {k: str(r) for k, r in row.items()} for name, row in rows.items()}
        title = "purify: ratios to the hand-written function, and of shapes() to jaxpurify"
        page("purify", report.table(title, flat), rows)
    if arguments.check:
        worse = check.worse(report.read(arguments.out), pages)
        print(
            "\n".join(worse) or "No ratio is worse than the committed one by more than its spread."
        )
        sys.exit(bool(worse))
    report.write(arguments.out, _header(rounds), pages)


def _header(rounds: int) -> str:
    return (
        "# Results\n\n"
        f"JAX {jax.__version__}, flax {flax.__version__}, equinox {equinox.__version__}, Python "
        f"{platform.python_version()}, CPU. Ratios of times within a round, contenders in shuffled "
        f"order, {rounds} rounds: median (10th–90th percentile).\n"
    )


if __name__ == "__main__":
    main()
