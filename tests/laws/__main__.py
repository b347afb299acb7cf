"""Run any number of random programs: `python -m tests.laws --programs 100000 --seed 1`."""

from __future__ import annotations

import os

os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=4"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import collections
import gc
import sys
import time

from tests.laws.machine import LAWS, SHARES, run_one
from tests.laws.program import forget


def main() -> int:
    """Run, print how many ran, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.laws", description=__doc__)
    parser.add_argument("--programs", type=int, default=1000, help="how many in all")
    parser.add_argument(
        "--seed", type=int, default=0, help="the number of the first program of each law"
    )
    parser.add_argument("--law", type=int, choices=LAWS, help="only programs of this law")
    parser.add_argument("--failures", type=int, default=10, help="stop after so many failures")
    parser.add_argument("--shrink", type=float, default=30.0, help="seconds to make each smaller")
    options = parser.parse_args()
    laws = [options.law] if options.law else [law for law in LAWS for _ in range(SHARES[law])]
    counts: dict[int, collections.Counter[str]] = {law: collections.Counter() for law in laws}
    failures = 0
    forget()
    gc.freeze()
    start = time.monotonic()
    try:
        for i in range(options.programs):
            law = laws[i % len(laws)]
            seed = options.seed + sum(counts[law].values())
            found = run_one(law, seed, seconds=options.shrink)
            counts[law][found.kind] += 1
            if found.wrong:
                failures += 1
                print(
                    f"=== law {law}, seed {seed}: {found.kind}\n{found.program}\n--- {found.detail}\n"
                )
                sys.stdout.flush()
                if failures >= options.failures:
                    break
            if i % 200 == 199:
                forget()
            if i % 1000 == 999:
                seconds = time.monotonic() - start
                print(f"... {i + 1} programs in {seconds:.0f} s", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("stopped")
    seconds = time.monotonic() - start
    for law, count in counts.items():
        parts = ", ".join(f"{n} {kind}" for kind, n in count.most_common())
        print(f"law {law}: {sum(count.values())} programs ({parts})")
    total = sum(sum(c.values()) for c in counts.values())
    print(f"{total} programs in {seconds:.0f} s, {total / seconds:.1f} a second; {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
