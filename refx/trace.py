"""Where we are: the current JAX trace, and the frame of the stateful transformation around it.

A Ref remembers the frame and the JAX trace that it was made in. Reading it in the same frame is
a comparison and a slot; everything else (a closure, a Ref of an ended trace, a plain `jax`
transformation in between) is decided here. This is the one file that knows how JAX represents
traces: `tests/refx/test_trace.py` states what it relies on.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend import core as jex_core

from refx.buffers import dead_error, is_dead
from refx.errors import (
    ClosureError,
    EndedTraceError,
    ForeignTracerError,
    NotMutableError,
    ReadOnlyError,
    TraceLevelError,
)

if TYPE_CHECKING:
    from refx.ref import Ref

__all__: list[str] = []

current_trace: Callable[[Any], Any] = jex_core.find_top_trace
"""`current_trace(())` is JAX's current trace object. Never keep it: keep a weak reference."""


def _root_trace() -> Any:
    # The module may be imported inside a transformation, so the evaluating trace is the last of
    # the chain and not simply the current one.
    trace = current_trace(())
    while (parent := getattr(trace, "parent_trace", None)) is not None:
        trace = parent
    return trace


EVAL = _root_trace()
"""JAX's evaluating trace, a singleton: where code runs outside of every transformation."""


def trace_ref() -> Callable[[], Any]:
    """A weak reference to the current trace; a strong one would be a leak to JAX's checker."""
    return weakref.ref(current_trace(()))


def is_eager() -> bool:
    """Whether code runs outside of every transformation."""
    return local.frame is None and current_trace(()) is EVAL


def without_jit() -> bool:
    """Whether `jax.disable_jit()` asks for code that runs at once, step by step."""
    return jax.config.jax_disable_jit  # pyright: ignore[reportAttributeAccessIssue]


def in_program() -> bool:
    """Whether what runs here becomes part of a program that is compiled and kept."""
    return _program_between(EVAL, current_trace(())) is not None


ALTERNATIVES = {
    "clone": "a refx.clone",
    "frozen": "refx.frozen",
}
"""What messages advise, by what it does. A library on top of this one puts its own names here."""


class _Marker:
    """Stands in for a trace reference in Refs that may not be written at all."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self) -> None:
        # A marker is never a live trace, so the identity test of a write fails.
        return None


READ_ONLY = _Marker("read-only")
CONSTANT = _Marker("constant")
# Of a Ref that JAX rebuilt around what is no array: a bool of a mask, an axis, a shape, a sharding.
# It may be read anywhere, as a constant of the program, and written where no program runs.
LABEL = _Marker("label")
# Of a Ref of a frozen tree: any program may read it as a constant, and nobody may write it.
FROZEN = _Marker("frozen")


_uids = itertools.count()


def fresh(value: Any) -> Any:
    """The value, with lists and dicts in it copied: two Refs must not share what is mutable."""
    return value if isinstance(value, jax.Array) else jax.tree.map(lambda x: x, value)


class Kept:
    """A value as it was, to tell whether it was replaced or, a list or a dict, changed in place."""

    __slots__ = ("_content", "_value")

    def __init__(self, value: Any):
        self._value = value
        self._content = jax.tree.flatten(value)

    def changed(self, now: Any) -> bool:
        """Whether `now` is another value, or holds others."""
        if now is not self._value:
            return True
        (leaves, treedef), (was, was_def) = jax.tree.flatten(now), self._content
        return treedef != was_def or not all(a is b for a, b in zip(leaves, was, strict=True))


class Frame:
    """One running body of a stateful transformation, from its entry to its exit.

    Invariants: `shadow` maps a Ref of an enclosing level to the one Ref that stands for it in this
    body, so that a closed-over Ref and the same Ref as an argument are one cell; every stand-in
    that the caller did not pass in is in `found`, in order of discovery, with the module it was
    read through; a closed frame answers every use of its Refs with an error.
    """

    __slots__ = (
        "assigned",
        "baked",
        "constants",
        "describe",
        "entered",
        "entry",
        "found",
        "lifts",
        "name",
        "open",
        "parent",
        "repeats",
        "shadow",
        "trace",
        "uid",
    )

    def __init__(
        self,
        name: str,
        *,
        lifts: bool = False,
        constants: bool = False,
        entry: Callable[[], Any] | None = None,
        repeats: int = 1,
    ):
        self.name = name
        # How often the body runs for each time that it is traced.
        self.repeats = repeats
        # The trace that called the transformation, where its body reads closed-over Refs itself:
        # a plain jax program may lie between that and the level of the Refs.
        self.entry = entry
        # Never used again, so that it may stand for the frame where holding it would be a leak.
        self.uid = next(_uids)
        self.parent = local.frame
        self.trace = trace_ref()
        self.shadow: dict[Ref[Any], Ref[Any]] = {}
        self.found: dict[Ref[Any], Any] = {}
        # What a stand-in in `found` had as its value when it was made.
        self.entered: dict[Ref[Any], Kept] = {}
        # The Refs of this body that were given a value in it, the same or another.
        self.assigned: set[Ref[Any]] = set()
        # Refs that a plain jax program in this body has read by closure.
        self.baked: set[Ref[Any]] = set()
        # Whether the body runs again with what it found as an input.
        self.lifts = lifts
        # Whether what it closes over may not be written.
        self.constants = constants
        self.describe: Callable[[Ref[Any]], str | None] | None = None
        self.open = True

    def __enter__(self) -> Frame:
        local.frame = self
        return self

    def __exit__(self, *exc: object) -> None:
        local.frame = self.parent
        self.open = False

    def close(self) -> None:
        """Drop everything that could keep a tracer alive."""
        for ref in self.found:
            self.shadow[ref]._value = None
        self.shadow.clear()
        self.found.clear()
        self.entered.clear()
        self.assigned.clear()
        self.baked.clear()
        self.describe = None

    def stand_in(self, ref: Ref[Any], owner: Any) -> Ref[Any]:
        """The Ref that stands in this body for `ref`, a Ref of an enclosing level."""
        inner = self.shadow.get(ref)
        if inner is None:
            value = fresh(_alive(ref, seen_from(self.parent, ref, owner), owner))
            entry = self.entry() if self.entry is not None else None
            if entry is not None:
                parent = self.parent
                here = ref if ref._frame is parent else parent.shadow[ref]  # pyright: ignore
                _check_not_baked(here, owner, parent, entry)
            from refx.ref import make as _make_ref  # ref.py is built on this file

            trace = CONSTANT if self.constants else self.trace
            inner = _make_ref(value, ref._collection, ref._metadata, self, trace)
            self.shadow[ref] = inner
            # A path instead of an owner is for messages only.
            self.found[ref] = None if type(owner) is str else owner
            self.entered[ref] = Kept(value)
        return inner


class _Local(threading.local):
    frame: Frame | None
    # Set by `mutable`: says whether a Ref may be written. None allows everything.
    allowed: Callable[[Ref[Any]], bool] | None
    # Set by `mutable` where nothing may change: whether the attributes of a Node are fixed; and the
    # collections that take note of Nodes made since then.
    fixed: Callable[[Any], bool] | None
    made: tuple[Any, ...]
    # nnx keeps its ambient streams and flags here, so that a boundary crosses one thread-local.
    scope: Any
    # And here the names of the flags that were asked for, in a call that was given some.
    asked: set[Any] | None
    # The call that a compiled function is being traced for.
    call: Any
    # Whether a walk looks at what a pytree class makes of a module: no Ref counts as read.
    peeking: bool
    # What watches the calls of modules; transformations are called by it where there is one.
    probe: Any

    def __init__(self) -> None:
        # Runs in each thread. As attributes of the instance they are found faster.
        self.frame = None
        self.allowed = None
        self.fixed = None
        self.made = ()
        self.scope = None
        self.asked = None
        self.call = None
        self.peeking = False
        self.probe = None


local = _Local()

# Outside of stateful transformations, what `Frame.baked` is in one: Refs that were made in a plain
# jax transformation.
_baked: weakref.WeakSet[Ref[Any]] = weakref.WeakSet()


def seen_from(frame: Frame | None, ref: Ref[Any], owner: Any = None) -> Any:
    """The value of `ref` at the level of `frame`, an ancestor of the current one or itself."""
    if ref._frame is frame:
        return ref._value
    if ref._trace is FROZEN:
        # As an input, where the program around has it as one: as a constant it may be large.
        return (ref if frame is None else frame.shadow.get(ref, ref))._value
    if frame is None:
        raise _misplaced(ref, owner)
    return frame.stand_in(ref, owner)._value


def read(ref: Ref[Any], owner: Any = None) -> Any:
    """The value of `ref` here, for every case: the callers have the common one inlined."""
    frame = local.frame
    if local.peeking:
        return ref._value
    if ref._trace is FROZEN:
        return _alive(ref, seen_from(frame, ref), owner)
    if ref._frame is not frame:
        if _outlives_its_body(ref):
            return _alive(ref, ref._value, owner)
        _check_reachable(ref, owner)
        value = seen_from(frame, ref, owner)
        if frame is not None and current_trace(()) is not frame.trace():
            _check_not_baked(frame.shadow.get(ref, ref), owner, frame, current_trace(()))
        return _alive(ref, value, owner)
    if current_trace(()) is not (EVAL if frame is None else frame.trace()):
        _check_not_baked(ref, owner, frame, current_trace(()))
    return _alive(ref, ref._value, owner)


def peek(ref: Ref[Any]) -> Any:
    """The value of `ref` as it is seen here, its buffer gone or not: to compare, or to replace."""
    return seen_from(local.frame, ref)


def _alive(ref: Ref[Any], value: Any, owner: Any) -> Any:
    if is_dead(value):
        raise dead_error(f"{describe(ref, owner)} was read, but its buffer")
    return value


def write(ref: Ref[Any], value: Any, owner: Any = None) -> None:
    """Give `ref` a new value, if that is allowed here; otherwise raise and change nothing."""
    check_value(ref, value, owner)
    put(writable(ref, owner), value)


def put(target: Ref[Any], value: Any) -> None:
    """Give a Ref that may be written its new value."""
    target._value = value
    if target._trace is LABEL and holds_array(value):
        target._trace = trace_ref()


def holds_array(value: Any) -> bool:
    """Whether an array or a tracer is in a value; the shape of one is none."""
    return any([isinstance(x, jax.Array | np.ndarray) for x in jax.tree.leaves(value)])


def is_label(value: Any) -> bool:
    """Whether a value has something in it, but neither arrays nor numbers that might be arrays."""
    leaves = jax.tree.leaves(value)
    return bool(leaves) and not any([isinstance(x, _VALUES) for x in leaves])


def label(refs: Iterable[Ref[Any]]) -> None:
    """Make labels of those Refs that hold no array."""
    for ref in refs:
        known = isinstance(ref._value, jax.Array) or ref._trace is FROZEN
        if not known and not holds_array(ref._value):
            ref._trace = LABEL


def writable(ref: Ref[Any], owner: Any = None) -> Ref[Any]:
    """The Ref to write when `ref` is written here: itself or its stand-in. Raises if none may be."""
    frame = local.frame
    if ref._trace is FROZEN:
        raise ReadOnlyError(_frozen_message(describe(ref, owner)))
    if ref._frame is not frame:
        _check_reachable(ref, owner)
        assert frame is not None
        target = frame.stand_in(ref, owner)
    else:
        target = ref
    home = target._trace()
    if target._trace is LABEL:
        home = EVAL if frame is None else frame.trace()
    if home is not current_trace(()):
        raise _not_writable(target, ref, owner)
    if target in (_baked if frame is None else frame.baked):
        raise ClosureError(
            f"{describe(ref, owner)} is written after it was read by closure inside a plain jax "
            f"transformation that keeps its program (jax.jit, lax.scan, jax.checkpoint, ...): "
            f"another call of that function would go on with the old value. Pass the module to it "
            f"as an argument, or use the nnx transformation of the same name."
        )
    if local.allowed is not None and not local.allowed(ref):
        raise NotMutableError(
            f"{describe(ref, owner)} was written, but the surrounding `mutable` does not allow it. "
            f"Add {ref._collection!r} to its filter, a tuple of all that may be written, or move "
            f"the write out of it."
        )
    if frame is not None:
        frame.assigned.add(target)
    return target


def check_value(ref: Ref[Any] | None, value: Any, owner: Any = None) -> None:
    """Raise if `value` holds a tracer that is not of the current trace or one around it."""
    if isinstance(value, jax.Array):
        if not isinstance(value, Tracer):
            if is_dead(value):
                raise dead_error(f"{_what(ref, owner)} was given an array whose buffer")
            return
        tracers = [value]
    else:
        tracers = [x for x in jax.tree.leaves(value) if isinstance(x, Tracer)]
        if not tracers and is_dead(value):
            raise dead_error(f"{_what(ref, owner)} was given a value whose buffer")
    for tracer in tracers:
        trace = current_trace(())
        while trace is not None and trace is not tracer._trace:
            trace = getattr(trace, "parent_trace", None)
        if trace is None:
            raise ForeignTracerError(
                f"{_what(ref, owner)} was given a value that holds a tracer of another JAX transformation: "
                f"{_aval(tracer)}. That transformation has ended or is not the one that runs here, "
                f"so the value would leak out of it. Return the value from the transformation and "
                f"assign it outside, or use the nnx transformation in its place (nnx.jit, "
                f"nnx.grad, nnx.vmap, ...), which writes Refs back for you."
            )


def _what(ref: Ref[Any] | None, owner: Any) -> str:
    return "A new Ref" if ref is None else describe(ref, owner)


def check_structure(node: Any, what: str) -> None:
    """Raise if the structure of `node`, a Node, may not be changed here."""
    name = type(node).__name__
    if local.fixed is not None and local.fixed(node):
        raise NotMutableError(
            f"{what} of a {name} was changed, but the surrounding `mutable` lets nothing be changed. "
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
            f"ended. Return the module from the transformation instead of keeping it by other means."
        )
    raise TraceLevelError(
        f"{what} of a {name} was set inside {transformation()}, but the {name} was made outside of "
        f"it, so the change would happen once, while tracing, and not when the compiled program "
        f"runs. Pass the module to the transformation as an argument of an nnx transformation "
        f"(its changes propagate back), or set it outside."
    )


def _outlives_its_body(ref: Ref[Any]) -> bool:
    """Whether a Ref of a body that has ended still has a value: nobody can write it, and each tracer
    in it is of a trace that runs.

    The backward rule of a library reads such Refs. It runs after the body of nnx.grad, where the
    library split a module into the leaves to differentiate and the others.
    """
    if ref._frame is None or ref._frame.open or (ref._trace not in (READ_ONLY, LABEL)):
        return False
    return all([_runs(x._trace) for x in jax.tree.leaves(ref._value) if isinstance(x, Tracer)])


def _check_reachable(ref: Ref[Any], owner: Any) -> None:
    home = ref._frame
    if home is None:
        return
    if not home.open:
        raise _misplaced(ref, owner)
    frame = local.frame
    while frame is not None and frame is not home:
        frame = frame.parent
    if frame is None:
        raise _misplaced(ref, owner)


def _misplaced(ref: Ref[Any], owner: Any) -> Exception:
    home = ref._frame
    assert home is not None
    if home.open:
        return TraceLevelError(
            f"{describe(ref, owner)} belongs to {home.name}, which is running, but it was used "
            f"outside of that body (in another thread, or in a callback). Read its value inside "
            f"and pass the value."
        )
    return EndedTraceError(
        f"{describe(ref, owner)} was made inside {home.name}, which has ended; its value was a "
        f"tracer and means nothing any more. Return the Ref, its module or its value from the "
        f"function instead of keeping it in a global, a default argument or a closure. To a callback, "
        f"which runs later, pass the value: jax.debug.callback(fn, model.kernel)."
    )


def _check_not_baked(ref: Ref[Any], owner: Any, frame: Frame | None, trace: Any) -> None:
    # vmap and grad run their function anew at every call, so a closed-over value is always fresh.
    # jit, scan, checkpoint and the like keep a program in a cache: a concrete value read by closure
    # becomes a constant of that program, and later writes of the Ref would not reach it.
    home = ref._trace()
    if home is None:
        home = EVAL if frame is None else frame.trace()
    program = None if ref._trace is READ_ONLY else _program_between(home, trace)
    if program is None:
        return
    of_body = home is not EVAL and not _stands_in(ref, frame)
    leaves = jax.tree.leaves(ref._value)
    constant = ref._trace is LABEL or not any([isinstance(x, _VALUES) for x in leaves])
    if of_body or constant or any([isinstance(x, Tracer) for x in leaves]):
        # A Ref of a body that runs once is closed over by functions of that body, and JAX lifts a
        # tracer; but the program is kept for the next call of the same function. What holds no
        # array is a constant, as a shape is, as long as nobody writes it.
        (_baked if frame is None else frame.baked).add(ref)
        return
    abstract = _only_looked_at(trace)
    if abstract is None:
        kind, fate = kind_of(program), "become a constant of the compiled program"
    else:
        kind, fate = f"a plain {abstract}", "be a constant of what JAX keeps for the next call"
    raise ClosureError(
        f"{describe(ref, owner)} was read by closure inside {kind}. Its value would {fate}, and "
        f"later updates would never reach it. Pass the module as an argument, as in "
        f"jax.jit(lambda m, x: m(x))(model, x), or use the nnx transformation of the same name "
        f"({f'nnx.{abstract[4:]}' if abstract else 'nnx.jit, nnx.scan, nnx.remat, ...'}). What closes over "
        f"its arguments (checkify, numpyro, blackjax) takes {ALTERNATIVES['frozen']}(model), a constant."
    )


_ABSTRACT = {"eval_shape": "jax.eval_shape", "make_jaxpr_f": "jax.make_jaxpr"}


def _only_looked_at(trace: Any) -> str | None:
    """The name of what traces here and compiles nothing; for a message, so it may take its time."""
    if type(trace).__name__ != "DynamicJaxprTrace":
        return None
    frame = sys._getframe()
    while frame is not None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module.startswith("jax."):
            if name in _ABSTRACT and local.frame is None:
                return _ABSTRACT[name]
            if name in ("cache_miss", "scan", "cond", "while_loop", "checkpoint"):
                return None
        frame = frame.f_back
    return None


_VALUES = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)


def _stands_in(ref: Ref[Any], frame: Frame | None) -> bool:
    """Whether `ref` stands in this body for one that it closes over."""
    return frame is not None and any(frame.shadow[outer] is ref for outer in frame.found)


def _runs(home: Any) -> bool:
    """Whether `home` is the current trace or one around it."""
    trace = current_trace(())
    while trace is not None and trace is not home:
        trace = getattr(trace, "parent_trace", None)
    return trace is not None


def _program_between(home: Any, trace: Any) -> Any:
    """The trace between `trace` and `home` that becomes a program, and is kept; None without one."""
    while trace is not None and trace is not home:
        if type(trace).__name__ == "DynamicJaxprTrace":
            return trace
        trace = getattr(trace, "parent_trace", None)
    return None


def _not_writable(target: Ref[Any], ref: Ref[Any], owner: Any) -> Exception:
    what = describe(ref, owner)
    if target._trace is READ_ONLY:
        return ReadOnlyError(_read_only_message(what, transformation()))
    if not isinstance(target._trace, _Marker) and not _runs(target._trace()):
        return EndedTraceError(
            f"{what} was made inside a jax transformation that has ended; its value was a tracer "
            f"and means nothing any more. Return its value from the function instead."
        )
    if target._trace is CONSTANT:
        frame = target._frame
        return TraceLevelError(
            f"{what} was written inside {frame.name if frame else 'a transformation'}, which "
            f"closes over it: a closed-over Ref is a constant there. Pass its module to the "
            f"function as an argument; updates of arguments propagate to the caller."
        )
    return TraceLevelError(
        f"{what} was written inside {transformation()}, but it was made outside of it. The write "
        f"would happen once, while tracing, and would leak a tracer. Use the nnx transformation of "
        f"the same name (nnx.jit, nnx.vmap, nnx.scan, ...), whose updates propagate to the caller, "
        f"or return the new value and assign it outside."
    )


def _read_only_message(what: str, where: str) -> str:
    return (
        f"{what} was written inside {where}, on a copy: JAX rebuilt the module around tracers, "
        f"and a plain jax transformation cannot write back, so the update would be lost. Use "
        f"nnx.jit (updates propagate to the caller), nnx.jit_filter (modules in, modules out), or "
        f"change an nnx.clone of the module and return that."
    )


def _frozen_message(what: str) -> str:
    return (
        f"{what} was written, but it is frozen, so that any program may take it as a constant. "
        f"Write {ALTERNATIVES['clone']} of it instead."
    )


def is_batched(value: Any) -> bool:
    """Whether `value` differs between the lanes of the `vmap` that is the current trace."""
    trace = current_trace(())
    return any(
        isinstance(x, Tracer) and x._trace is trace and getattr(x, "batch_dim", None) is not None
        for x in jax.tree.leaves(value)
    )


def transformation() -> str:
    """The innermost transformation that runs here, as a person would name it."""
    frame, trace = local.frame, current_trace(())
    if frame is not None and frame.trace() is trace:
        return frame.name
    if trace is EVAL:
        return "code outside of every transformation"
    return kind_of(trace)


def kind_of(trace: Any) -> str:
    """A trace of plain jax, as a person would name it."""
    kinds = {
        "DynamicJaxprTrace": "a plain jax transformation that compiles (jax.jit, lax.scan, ...)",
        "BatchTrace": "a plain jax.vmap",
        "LinearizeTrace": "a plain jax.grad (or vjp, linearize)",
        "JVPTrace": "a plain jax.grad or jax.jvp",
    }
    return kinds.get(type(trace).__name__, "a plain jax transformation")


def describe(ref: Ref[Any], owner: Any = None) -> str:
    """Name a Ref for a message: by path where a frame knows it, else by its owner.

    The owner is the module that it was reached through, or a path where only that is known.
    """
    frame = local.frame
    while frame is not None:
        known = frame.describe(ref) if frame.describe is not None else None
        if known is not None:
            return f"Ref {known} ({summary(ref)})"
        frame = frame.parent
    if type(owner) is str:
        return f"Ref {owner!r} ({summary(ref)})"
    if owner is not None:
        for name, value in owner._dict.items():
            if value is ref:
                return f"Ref {type(owner).__name__}.{name} ({summary(ref)})"
    return f"A Ref ({summary(ref)})"


def summary(ref: Ref[Any]) -> str:
    """The collection and the shapes of a Ref, without touching its arrays."""
    if ref._value is None and ref._frame is not None and not ref._frame.open:
        return f"collection {ref._collection!r}"
    return f"collection {ref._collection!r}, {_aval(ref._value)}"


def _aval(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    leaves = jax.tree.leaves(value)
    if len(leaves) == 1 and leaves[0] is value:
        return repr(value)
    return f"{type(value).__name__} of {len(leaves)} leaves"
