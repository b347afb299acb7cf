"""Short tracebacks: the lines of the user, and one line for each transformation around them.

JAX takes its own frames out of a traceback, and this does the same for ours, unless the user asked JAX
for all of them (`JAX_TRACEBACK_FILTERING=off`).
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
# And those of JAX, which it takes out only where an error leaves one of its own transformations.
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
# In profiles and in the compiler's messages, too, an operation comes from a line of the user's.
for _path in _HIDDEN[:-1]:
    source_info_util.register_exclusion(_path)


_KEPT = (
    "nnx: this comes about when a function of plain jax that is kept between calls (jax.jit, lax.scan, "
    "jax.checkpoint, ...) closes over a module or a Ref: JAX keeps its program, with the tracer of the "
    "first call in it. Pass the module to it as an argument, or use the nnx transformation of the same "
    "name. Or a value was kept in a global while tracing, or in a list or a dict that a function closes over."
)


def shortened(error: E) -> E:
    """The error, to be raised again, without the frames of this package and of JAX in its traceback."""
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
