"""The rules for reading and writing a Ref.

A Ref remembers the frame and the JAX trace in which it was made. Reading it in the same frame takes
one comparison. This file handles all other cases: a closure, a Ref of an ended trace, a plain `jax`
transformation in between.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.core import Tracer

from refx.buffers import dead_error, is_dead
from refx.describe import describe, transformation
from refx.errors import (
    ClosureError,
    EndedTraceError,
    ForeignTracerError,
    NotMutableError,
    ReadOnlyError,
    TraceLevelError,
    ValueTypeError,
)
from refx.frame import Frame, Original, StandIn, copy_containers, local, trace_of
from refx.static import WITH_IDENTITY
from refx.text import ADVICE, ALTERNATIVES, array_text, is_arraylike, ours
from refx.trace import (
    CONSTANT,
    EVAL,
    FROZEN,
    LABEL,
    READ_ONLY,
    Marker,
    current_trace,
    kind_of,
    only_looked_at,
    program_between,
    runs,
    trace_ref,
)

if TYPE_CHECKING:
    from refx.ref import Ref

__all__: list[str] = []

# Like `Frame.captured_as_constant`, but outside of stateful transformations: for Refs that were made
# in a plain jax transformation.
_captured: weakref.WeakSet[Ref[Any]] = weakref.WeakSet()


def _stand_in(frame: Frame | None, ref: Ref[Any], owner: Any) -> Ref[Any]:
    """The stand-in of `ref`, a Ref of an enclosing level, in the body of `frame`."""
    if frame is None:
        raise _misplaced(ref, owner)
    known = frame.stand_ins.get(ref)
    if known is not None:
        return known.inner
    value = copy_containers(_alive(ref, seen_from(frame.parent, ref, owner), owner))
    entry = frame.entry() if frame.entry is not None else None
    if entry is not None:
        here = ref if frame.parent is None else frame.parent.inner(ref)
        _check_not_captured(here, owner, frame.parent, entry)
    # Use the class of `ref` without importing it, because ref.py imports this file.
    inner = object.__new__(type(ref))
    inner._value, inner._collection, inner._metadata = value, ref._collection, ref._metadata
    inner._frame, inner._trace = frame, CONSTANT if frame.constants else frame.trace
    # If the owner is a path, it is only for messages.
    owner = None if type(owner) is str else owner
    frame.stand_ins[ref] = StandIn(ref, inner, owner, Original(value))
    return inner


def seen_from(frame: Frame | None, ref: Ref[Any], owner: Any = None) -> Any:
    """The value of `ref` at the level of `frame`, the current frame or one around it."""
    if ref._frame is frame or _outlives_its_body(ref):
        return ref._value
    if ref._trace is FROZEN:
        # A large constant is costly, so prefer the input if the surrounding program has it as one.
        return (ref if frame is None else frame.inner(ref))._value
    return _stand_in(frame, ref, owner)._value


def read(ref: Ref[Any], owner: Any = None) -> Any:
    """The value of `ref` here. Callers inline the common case; this handles them all."""
    if local.peeking:
        return ref._value
    frame, trace = local.frame, current_trace(())
    value = seen_from(frame, ref, owner)
    if trace is not trace_of(frame):
        _check_not_captured(ref if frame is None else frame.inner(ref), owner, frame, trace)
    return _alive(ref, value, owner)


def peek(ref: Ref[Any]) -> Any:
    """The value of `ref` as seen here, even if its buffer is gone: to compare or replace it."""
    return seen_from(local.frame, ref)


def _alive(ref: Ref[Any], value: Any, owner: Any) -> Any:
    if is_dead(value):
        raise dead_error(f"{describe(ref, owner)} was read, but its buffer")
    return value


def write(ref: Ref[Any], value: Any, owner: Any = None) -> None:
    """Give `ref` a new value. If that is not allowed here, raise and change nothing."""
    check_value(ref, value, owner)
    put(writable(ref, owner), value)


def put(target: Ref[Any], value: Any) -> None:
    """Set the value of a Ref for which `writable` has been asked."""
    target._value = value
    if target._trace is LABEL and holds_array(value):
        target._trace = trace_ref()


def holds_array(value: Any) -> bool:
    """Whether a value holds an array or a tracer. A shape is not one."""
    return any([isinstance(x, jax.Array | np.ndarray) for x in jax.tree.leaves(value)])


def is_label(value: Any) -> bool:
    """Whether a value holds something, but neither arrays nor numbers."""
    leaves = jax.tree.leaves(value)
    return bool(leaves) and not any([isinstance(x, VALUES) for x in leaves])


def label(refs: Iterable[Ref[Any]]) -> None:
    """Turn the Refs that do not hold an array into labels."""
    for ref in refs:
        known = isinstance(ref._value, jax.Array) or ref._trace is FROZEN
        if not known and not holds_array(ref._value):
            ref._trace = LABEL


def writable(ref: Ref[Any], owner: Any = None) -> Ref[Any]:
    """The Ref to write for `ref` here: itself or its stand-in. Raises if the write is not allowed."""
    frame = local.frame
    if ref._trace is FROZEN:
        raise ReadOnlyError(_frozen_message(describe(ref, owner)))
    target = ref if ref._frame is frame else _stand_in(frame, ref, owner)
    home = trace_of(frame) if target._trace is LABEL else target._trace()
    if home is not current_trace(()):
        raise _not_writable(target, ref, owner)
    if target in (_captured if frame is None else frame.captured_as_constant):
        raise ClosureError(
            f"{describe(ref, owner)} is written after it was read by closure inside a plain jax "
            f"transformation that keeps its program (jax.jit, lax.scan, jax.checkpoint, ...). "
            f"The next call of that function would still use the old value. Pass the module to it "
            f"as an argument, or use {ALTERNATIVES['same name']}."
        )
    if local.limit is not None and not local.limit.lets_write(ref):
        raise NotMutableError(
            f"{describe(ref, owner)} was written, but the surrounding `mutable` does not allow it. "
            f"Add {ref._collection!r} to its filter (a tuple lists several), or move the write out "
            f"of it."
        )
    if frame is not None:
        frame.assigned.add(target)
    return target


def check_value(ref: Ref[Any] | None, value: Any, owner: Any = None) -> None:
    """Raise if a Ref cannot hold `value`.

    A value holds arrays and scalars, but not Refs or modules. Its tracers must belong to the current
    trace or one around it.
    """
    if isinstance(value, jax.Array):
        if not isinstance(value, Tracer):
            if is_dead(value):
                raise dead_error(f"{_what(ref, owner)} was given an array whose buffer")
            return
        tracers = [value]
    else:
        leaves = leaves_of(value)
        if not (ref is not None and ref._trace is LABEL) and not all(map(_is_value, leaves)):
            found = next(x for x in leaves if not _is_value(x))
            raise ValueTypeError(
                f"{_what(ref, owner)} was given a value that holds a {type(found).__name__}: "
                f"{found!r:.60}. The value of a Ref must be a pytree of arrays and scalars. Keep "
                f"settings and functions in ordinary attributes, and arrays in Refs."
            )
        tracers = [x for x in leaves if isinstance(x, Tracer)]
        if not tracers and is_dead(value):
            raise dead_error(f"{_what(ref, owner)} was given a value whose buffer")
    for tracer in tracers:
        if not runs(tracer._trace):
            raise ForeignTracerError(
                f"{_what(ref, owner)} was given a value that holds a tracer of another JAX transformation: "
                f"{array_text(tracer)}. That transformation has ended or does not run here, so the value "
                f"would leak out of it. Return the value from the transformation and assign it outside, "
                f"or use {ALTERNATIVES['in its place']}."
            )


def is_identity(x: Any) -> bool:
    """Whether `x` is a Ref or a Node: an object with an identity, which a pytree walk must not enter."""
    return type(x) in WITH_IDENTITY


def leaves_of(value: Any) -> list[Any]:
    """The leaves of the value of a Ref. Raises if one is a Ref or a module."""
    leaves = jax.tree.leaves(value, is_leaf=is_identity)
    for x in leaves:
        if is_identity(x):
            raise ValueTypeError(
                f"The value of a Ref must be a pytree of arrays and scalars, but it holds a "
                f"{type(x).__name__}. Put that in an attribute, a list or a dict of the module. To tie "
                f"two fields, assign the Ref itself: decoder.w = {ours('get_ref')}(encoder, 'w')."
            )
    return leaves


def _what(ref: Ref[Any] | None, owner: Any) -> str:
    if ref is None:
        return f"Ref {owner}" if type(owner) is str else "A new Ref"
    return describe(ref, owner)


def check_structure(node: Any, what: str) -> None:
    """Raise if code may not change the structure of `node`, a Node, here."""
    name = type(node).__name__
    if local.limit is not None and not local.limit.lets_change(node):
        raise NotMutableError(
            f"{what} of a {name} was changed, but the surrounding `mutable` allows no changes. "
            f"Move the change out of it, or change a clone."
        )
    if node._frame is local.frame and node._trace() is current_trace(()):
        return
    if node._trace is FROZEN:
        raise ReadOnlyError(_frozen_message(f"{what} of a {name}"))
    if node._trace is READ_ONLY:
        raise ReadOnlyError(_read_only_message(f"{what} of a {name}", transformation()))
    if node._frame is not None and not node._frame.open:
        raise EndedTraceError(
            f"{what} of a {name} was set after {node._frame.name}, where the module was made, had "
            f"ended. Return the module from the transformation instead of storing it elsewhere."
        )
    raise TraceLevelError(
        f"{what} of a {name} was set inside {transformation()}, but the {name} was made outside of "
        f"it, so the change would happen once, while tracing, and not when the compiled program "
        f"runs. Pass the module as an argument to {ALTERNATIVES['a transformation']} (its changes "
        f"propagate back), or set it outside."
    )


def _outlives_its_body(ref: Ref[Any]) -> bool:
    """Whether a Ref of a body that has ended may still be read.

    It cannot be written, and each tracer in it belongs to a running trace. Some libraries split a module
    into a differentiated part and the rest, and read such Refs: their backward rule runs after the body
    of the gradient.
    """
    if ref._frame is None or ref._frame.open or (ref._trace not in (READ_ONLY, LABEL)):
        return False
    return all([runs(x._trace) for x in jax.tree.leaves(ref._value) if isinstance(x, Tracer)])


def _misplaced(ref: Ref[Any], owner: Any) -> Exception:
    home = ref._frame
    assert home is not None
    if home.open:
        return TraceLevelError(
            f"{describe(ref, owner)} belongs to {home.name}, which is still running, but it was used "
            f"outside of that body (in another thread, or in a callback). Read its value inside, "
            f"and pass the value on."
        )
    return EndedTraceError(
        f"{describe(ref, owner)} was made inside {home.name}, which has ended; its value was a "
        f"tracer and means nothing any more. Return the Ref, its module or its value from the "
        f"function instead of keeping it in a global, a default argument or a closure. A callback "
        f"runs later, so pass it the value: jax.debug.callback(fn, model.kernel)."
    )


def _check_not_captured(ref: Ref[Any], owner: Any, frame: Frame | None, trace: Any) -> None:
    # vmap and grad run their function in every call, so a closed-over value is always current. jit,
    # scan, checkpoint and the like keep a program. A concrete value that it reads by closure becomes a
    # constant, and later writes of the Ref would not reach it.
    if ref._trace is READ_ONLY or ref._trace is FROZEN:
        return
    home = ref._trace()
    if home is None:
        home = trace_of(frame)
    program = program_between(home, trace)
    if program is None:
        return
    of_body = home is not EVAL and not _stands_in(ref, frame)
    leaves = jax.tree.leaves(ref._value)
    constant = ref._trace is LABEL or not any([isinstance(x, VALUES) for x in leaves])
    if of_body or constant or any([isinstance(x, Tracer) for x in leaves]):
        # Functions in a body that runs once may close over its Refs, and JAX makes a tracer an input.
        # But JAX keeps the program for the next call of the same function. A value without arrays is
        # a constant, like a shape. Both are fine unless the Ref is written later.
        (_captured if frame is None else frame.captured_as_constant).add(ref)
        return
    abstract = only_looked_at(trace) if local.frame is None else None
    if abstract is None:
        kind, fate = kind_of(program), "become a constant of the compiled program"
        which = ALTERNATIVES["compiles"]
    else:
        kind, fate = f"a plain {abstract}", "become a constant that JAX keeps for the next call"
        which = ALTERNATIVES["looks"].format(abstract.removeprefix("jax."))
    raise ClosureError(
        f"{describe(ref, owner)} was read by closure inside {kind}. Its value would {fate}, and "
        f"later updates would never reach it. Pass the module as an argument, as in "
        f"jax.jit(lambda m, x: m(x))(model, x), or use {ALTERNATIVES['same name']}{which}. For a library "
        f"that needs closures (checkify, numpyro, blackjax), use {ALTERNATIVES['frozen']}(model), a constant."
    )


VALUES = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)
"""The classes of arrays and numbers, of which values consist."""


def _is_value(x: Any) -> bool:
    """Whether `x` is an array, a number, or a stand-in for an array."""
    return is_input(x) or (is_arraylike(x) and not isinstance(x, np.ndarray | np.generic))


def is_input(x: Any) -> bool:
    """Whether JAX accepts `x` as an input of a program."""
    if isinstance(x, np.ndarray | np.generic):
        return x.dtype.kind not in "OSU"
    return isinstance(x, VALUES) or hasattr(type(x), "__jax_array__")


def _stands_in(ref: Ref[Any], frame: Frame | None) -> bool:
    """Whether `ref` is the stand-in of a Ref that this body closes over."""
    return frame is not None and any(s.inner is ref for s in frame.met())


def _not_writable(target: Ref[Any], ref: Ref[Any], owner: Any) -> Exception:
    what, advice = describe(ref, owner), ADVICE.get(ref._collection)
    more = f" Or {advice}." if advice else ""
    if target._trace is READ_ONLY:
        return ReadOnlyError(_read_only_message(what, transformation()) + more)
    if not isinstance(target._trace, Marker) and not runs(target._trace()):
        return EndedTraceError(
            f"{what} was made inside a jax transformation that has ended; its value was a tracer "
            f"and means nothing any more. Return its value from the function instead."
        )
    if target._trace is CONSTANT:
        frame = target._frame
        return TraceLevelError(
            f"{what} was written inside {frame.name if frame else 'a transformation'}, which "
            f"closes over it: a closed-over Ref is a constant there. Pass its module to the "
            f"function as an argument; updates of arguments propagate to the caller.{more}"
        )
    return TraceLevelError(
        f"{what} was written inside {transformation()}, but it was made outside of it. The write "
        f"would happen once, while tracing, and would leak a tracer. Use "
        f"{ALTERNATIVES['same name']}{ALTERNATIVES['writes back']}, whose updates propagate to the caller, "
        f"or {advice or 'return the new value and assign it outside'}."
    )


def _read_only_message(what: str, where: str) -> str:
    return (
        f"{what} was written inside {where}, on a copy: JAX rebuilt the module around tracers, "
        f"and a plain jax transformation cannot write back, so the update would be lost. "
        f"{ALTERNATIVES['not on a copy']}"
    )


def _frozen_message(what: str) -> str:
    return (
        f"{what} was written, but it is frozen, so that any program may use it as a constant. "
        f"Write to {ALTERNATIVES['clone']} of it instead."
    )
