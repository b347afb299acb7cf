"""Short tracebacks: the user's lines, and one line for each transformation around them.

JAX removes its own frames from tracebacks. We remove ours too, unless the user asked JAX for all of them
(`JAX_TRACEBACK_FILTERING=off`).
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import TypeVar

import jax
from jax.extend import source_info_util

__all__: list[str] = []

E = TypeVar("E", bound=BaseException)

_ROOT = Path(__file__).parents[2]
# JAX's frames are here too: JAX removes them only from an error that leaves one of its transformations.
_HIDDEN = (
    *(
        str(_ROOT / part)
        for part in (
            "refx",
            "nnx/transforms",
            "nnx/module.py",
            "nnx/scope.py",
            "nnx/_layer_names.py",
        )
    ),
    str(Path(jax.__file__).parent),
)
# So that profiles and compiler messages, too, attribute an operation to the user's line.
for _path in _HIDDEN[:-1]:
    source_info_util.register_exclusion(_path)


_KEPT = (
    "nnx: this happens when a function under a plain jax transformation (jax.jit, lax.scan, "
    "jax.checkpoint, ...) closes over a module or a Ref: JAX keeps its program, with a tracer of the "
    "first call inside. Pass the module as an argument, or use the nnx transformation of the same name. "
    "Or code under tracing put a value into a global, or into a list or a dict outside the function."
)


def shortened(error: E) -> E:
    """Remove the frames of this package and of JAX from the traceback of an error, to raise it again."""
    if isinstance(error, jax.errors.UnexpectedTracerError):
        if _KEPT not in getattr(error, "__notes__", ()):
            error.add_note(_KEPT)
    if jax.config.jax_traceback_filtering == "off":  # pyright: ignore[reportAttributeAccessIssue]
        return error
    frames = []
    tb = error.__traceback__
    while tb is not None:
        if not tb.tb_frame.f_code.co_filename.startswith(_HIDDEN):
            frames.append(tb)
        tb = tb.tb_next
    short: types.TracebackType | None = None
    for tb in reversed(frames):
        short = types.TracebackType(short, tb.tb_frame, tb.tb_lasti, tb.tb_lineno)
    return error.with_traceback(short)
