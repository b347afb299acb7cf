"""Processes of one program that save together: who does what, and for how long one waits for another."""

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

# How long a message of the first process to the others may be.
_MESSAGE = 4096


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def meet(key: str, path: str, timeout: float, orbax: Any) -> None:
    """Wait until every process of the program is here.

    Args:
      key: says where; the same in every process.
      path: what is saved, for messages.
      timeout: how many seconds to wait.
      orbax: the module `orbax.checkpoint`, which has a barrier with a time limit.

    Raises:
      SaveError: some process is not here in time.
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
            # JAX counts how often each process has come here. One that did not come to an earlier meeting
            # is told so at once, or what became of that one: it comes again, and then the counts agree.
            if time.monotonic() >= end or "arrier" not in str(error):
                raise SaveError(_not_here(str(error), path, timeout)) from error
        time.sleep(0.02)


def _not_here(text: str, path: str, timeout: float) -> str:
    here, count = jax.process_index(), jax.process_count()
    named = re.search(r"timed out task names:\s*([\d\s,]+)", text)
    absent = [n for n in re.findall(r"\d+", named[1]) if int(n) != here][:8] if named else []
    if absent:
        who = f"process {', '.join(absent)} did not come to it within {timeout:g} s"
    elif "DEADLINE_EXCEEDED" in text:
        who = f"not every process came to it within {timeout:g} s"
    else:
        who = f"the processes did not come to it together ({' '.join(text.split())[:150]})"
    return (
        f"{path} cannot be saved: {who}. Every process of the program has to call nnx.save with the same "
        f"path and the same tree; do not put it under `if jax.process_index() == 0`. This is process "
        f"{here} of {count}; what was at the path is as it was."
    )


def from_first(text: str) -> str:
    """What the first process says, in every process. All of them have to be here already."""
    if jax.process_count() == 1:
        return text
    data = text.encode()[:_MESSAGE]
    padded = np.frombuffer(data.ljust(_MESSAGE, b"\0"), np.uint8)
    return (
        bytes(multihost_utils.broadcast_one_to_all(padded)).rstrip(b"\0").decode(errors="replace")
    )


def key_of(path: str, text: str) -> str:
    """A name for a save that two processes give to the same one."""
    return f"{zlib.crc32(path.encode()):08x}.{zlib.crc32(text.encode()):08x}"
