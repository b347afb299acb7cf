"""The surroundings of the running code, per thread: the scope, the call, the probe."""

from __future__ import annotations

import threading
from typing import Any

__all__: list[str] = []


class _Ambient(threading.local):
    # The random streams and flags; see `nnx.scope`.
    scope: Any
    # The call for which a compiled function is being traced.
    call: Any
    # Watches the calls of modules. While a probe is active, it runs the transformations.
    probe: Any
    # The names of the flags that were read during a call that was given flags.
    asked: set[Any] | None
    # The mesh axes that logical axis names stand for; see `nnx.axis_rules`.
    rules: Any

    def __init__(self) -> None:
        # Runs once in each thread. Lookup is faster for attributes of the instance.
        self.scope = None
        self.call = None
        self.probe = None
        self.asked = None
        self.rules = None


ambient = _Ambient()
