"""Processes of one program that save together: who does what, and how long they wait for each other."""

from __future__ import annotations

import math
import re
import time
import zlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from nnx.serialize.errors import SaveError

__all__: list[str] = []

# How long a message from the first process to the others may be.
_MESSAGE = 4096


def is_first() -> bool:
    """Whether this process writes the parts that only one process writes."""
    return jax.process_index() == 0


def meet(key: str, path: str, timeout: float, orbax: Any) -> None:
    """Wait until every process of the program has arrived here.

    Args:
      key: names the barrier; it must be the same in every process.
      path: the path of the save, for messages.
      timeout: how many seconds to wait.
      orbax: the module `orbax.checkpoint`, whose barrier has a time limit.

    Raises:
      SaveError: some process did not come in time.
    """
    if jax.process_count() == 1:
        return
    barrier = orbax.multihost.get_barrier_sync_fn()
    end = time.monotonic() + timeout
    while True:
        left = max(0.001, end - time.monotonic())
        try:
            return barrier(key=f"nnx:{key}", timeout_ms=math.ceil(1000 * left))
        except jax.errors.JaxRuntimeError as error:
            # JAX counts how often each process has come here. If a process missed an earlier
            # barrier, it gets an error at once. It tries again, and then the counts agree.
            if time.monotonic() >= end or "arrier" not in str(error):
                raise SaveError(_not_here(str(error), path, timeout)) from error
        time.sleep(0.02)


def _not_here(text: str, path: str, timeout: float) -> str:
    here, count = jax.process_index(), jax.process_count()
    named = re.search(r"timed out task names:\s*([\d\s,]+)", text)
    absent = [n for n in re.findall(r"\d+", named[1]) if int(n) != here][:8] if named else []
    if absent:
        who = f"process {', '.join(absent)} did not call it within {timeout:g} s"
    elif "DEADLINE_EXCEEDED" in text:
        who = f"not every process called it within {timeout:g} s"
    else:
        who = f"the processes did not call it together ({' '.join(text.split())[:150]})"
    return (
        f"{path} cannot be saved: {who}. Every process of the program must call nnx.save with the "
        "same path and the same tree; do not put the call under `if jax.process_index() == 0`. "
        f"This is process {here} of {count}. What was at the path is unchanged."
    )


def from_first(text: str) -> str:
    """Send a text from the first process to all. Every process must have come here already."""
    if jax.process_count() == 1:
        return text
    data = text.encode()[:_MESSAGE]
    padded = np.frombuffer(data.ljust(_MESSAGE, b"\0"), np.uint8)
    return (
        bytes(multihost_utils.broadcast_one_to_all(padded)).rstrip(b"\0").decode(errors="replace")
    )


def key_of(path: str, text: str) -> str:
    """A name for a save that is the same in all processes."""
    return f"{zlib.crc32(path.encode()):08x}.{zlib.crc32(text.encode()):08x}"
