"""What is around the code that runs, in each thread: the scope, the call, the probe."""

from __future__ import annotations

import threading
from typing import Any

__all__: list[str] = []


class _Ambient(threading.local):
    # The random streams and flags; see `nnx.scope`.
    scope: Any
    # The call that a compiled function is being traced for.
    call: Any
    # What watches the calls of modules; transformations are called by it where there is one.
    probe: Any
    # The names of the flags that were asked for, in a call that was given some.
    asked: set[Any] | None
    # What logical axis names stand for; see `nnx.axis_rules`.
    rules: Any

    def __init__(self) -> None:
        # Runs in each thread. As attributes of the instance they are found faster.
        self.scope = None
        self.call = None
        self.probe = None
        self.asked = None
        self.rules = None


ambient = _Ambient()
