"""Short tracebacks: the lines of the user, and one line for each transformation around them.

JAX takes its own frames out of a traceback, and this does the same for ours, unless the user asked JAX
for all of them (`JAX_TRACEBACK_FILTERING=off`).
"""

from __future__ import annotations

import inspect
import re
import types
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.extend import source_info_util

from refx import Node
from refx.partition import dotted

__all__: list[str] = []

E = TypeVar("E", bound=BaseException)

_ROOT = Path(__file__).parents[2]
# And those of JAX, which it takes out only where an error leaves one of its own transformations.
_HIDDEN = (
    *(str(_ROOT / part) for part in ("refx", "nnx/transforms", "nnx/module.py", "nnx/scope.py")),
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
    if isinstance(error, jax.errors.ConcretizationTypeError):
        note = _traced_function(str(error), error.__traceback__)
        if note is not None and note not in getattr(error, "__notes__", ()):
            error.add_note(note)
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


_TRACED = re.compile(r"tracing the function (\S+) at (.+?):\d+ for")
_INPUT = re.compile(r"\b(donated|values|leaves|others)\[(\d+)\]")


def _traced_function(text: str, tb: types.TracebackType | None) -> str | None:
    """What a message of JAX means that speaks of one of our functions and of the inputs of that."""
    found = _TRACED.search(text)
    if found is None or not found[2].startswith(_HIDDEN):
        return None
    inner: dict[str, Any] | None = None
    name = None
    while tb is not None:
        code = tb.tb_frame.f_code
        if (code.co_name, code.co_filename) == found.groups():
            inner, name = tb.tb_frame.f_locals, None
        elif inner is not None and name is None and code.co_name == "run":
            # What calls the user's function has been told its name.
            name = tb.tb_frame.f_locals.get("name")
        tb = tb.tb_next
    if inner is None or name is None:
        return None
    said = dict.fromkeys(_INPUT.findall(text))
    inputs = [
        f"{kind}[{i}] is {_input(inner, kind, int(i))}" for kind, i in said if "call" in inner
    ]
    return f"nnx: the function is {name}{', where ' if inputs else ''}{', '.join(inputs)}."


def _input(inner: dict[str, Any], kind: str, i: int) -> str:
    """One input of the pure function of an `nnx.jit`, by the user's name for it."""
    jitted, layout, call = inner["self"], inner["layout"], inner["call"]
    form = layout.form
    if kind == "others":
        rest = [n for n in range(form.treedef.num_leaves) if n not in form.where]
        return _argument(jitted, layout, rest[i])
    if kind == "donated":
        i = layout.donated[i]
    root, *path = (layout.dagdef.leaf_paths if kind == "leaves" else layout.dagdef.ref_paths)[i]
    owner = call.roots[int(root)]
    below = f".{dotted(path)}" if isinstance(owner, Node) else ".value"
    if int(root) < len(form.where):
        return f"{_argument(jitted, layout, form.where[int(root)])}{below}"
    # What follows the arguments.
    if int(root) < len(form.where) + layout.closed:
        return f"{below[1:]} of a {type(owner).__name__} that it closes over"
    return f"{dotted(path)!r} of the scope"


def _argument(jitted: Any, layout: Any, number: int) -> str:
    """The name of an argument, given the number of a leaf of the arguments."""
    numbers = layout.form.treedef.unflatten(range(layout.form.treedef.num_leaves))
    paths = jax.tree_util.tree_flatten_with_path(numbers)[0]
    (kind, key, *rest), _ = paths[number]
    where = jax.tree_util.keystr(tuple(rest))
    if kind.idx == 1:
        return f"{key.key}{where}"
    count, fixed, _ = layout.statics or (0, (), ())
    positions = [n for n in range(count) if n not in dict(fixed)]
    position = positions[key.idx] if positions else key.idx
    try:
        names = list(inspect.signature(jitted._fn).parameters)
    except (TypeError, ValueError):
        names = []
    return f"{names[position] if position < len(names) else f'argument {position}'}{where}"
