"""The frame: one running body of a stateful transformation, with its stand-ins for outer Refs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from refx.trace import EVAL, current_trace, trace_ref

if TYPE_CHECKING:
    from refx.mutability import Limit
    from refx.ref import Ref

__all__: list[str] = []


def copy_containers(value: Any) -> Any:
    """Copy the lists and dicts inside a value, so that no two Refs share a mutable container."""
    return value if isinstance(value, jax.Array) else jax.tree.map(lambda x: x, value)


class Original:
    """A value before the body ran, to detect whether it was replaced or changed in place."""

    __slots__ = ("_content", "_value")

    def __init__(self, value: Any):
        self._value = value
        self._content = jax.tree.flatten(value)

    def changed(self, now: Any) -> bool:
        """Whether `now` is a different value, or holds different leaves."""
        if now is not self._value:
            return True
        (leaves, treedef), (was, was_def) = jax.tree.flatten(now), self._content
        return treedef != was_def or not all(a is b for a, b in zip(leaves, was, strict=True))


class StandIn(NamedTuple):
    """The stand-in, inside a body, of a Ref of an enclosing level.

    `ref` is the Ref outside, and `inner` its only cell inside. For a Ref that the body met by closure,
    `before` is its value at that time, and `owner` the module through which it was read. For a Ref that
    came in as an input, both are None.
    """

    ref: Ref[Any]
    inner: Ref[Any]
    owner: Any = None
    before: Original | None = None

    def was_written(self, frame: Frame) -> bool:
        """Whether the body wrote this closed-over Ref, or changed its value in place."""
        assert self.before is not None
        return self.inner in frame.assigned or self.before.changed(self.inner._value)


_uids = itertools.count()


class Frame:
    """One running body of a stateful transformation, from entry to exit.

    Invariants: a Ref of an enclosing level has only one stand-in, so a closed-over Ref and the same Ref
    as an argument are one cell. After the frame is closed, every use of its Refs raises an error.
    """

    __slots__ = (
        "assigned",
        "captured_as_constant",
        "constants",
        "describe",
        "entry",
        "lifts",
        "name",
        "open",
        "parent",
        "placed",
        "repeats",
        "roots",
        "stand_ins",
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
        """Begin a body.

        Args:
          name: the transformation and the function, for messages.
          lifts: whether the body runs again with the Refs that it met by closure as inputs.
          constants: whether closed-over Refs are constants, which must not be written.
          entry: the trace that called the transformation, if its body reads closed-over Refs directly.
            There may be a plain jax program between that trace and the level of the Refs.
          repeats: how often the body runs for each time that it is traced.
        """
        self.name = name
        self.lifts = lifts
        self.constants = constants
        self.entry = entry
        self.repeats = repeats
        # A number that is never reused. Caches key on it, because keeping the frame would leak tracers.
        self.uid = next(_uids)
        self.parent = local.frame
        self.trace = trace_ref()
        # By the Ref outside, in order of discovery.
        self.stand_ins: dict[Ref[Any], StandIn] = {}
        # The Refs of this body that it has written, even with the same value.
        self.assigned: set[Ref[Any]] = set()
        # Those of them whose values were placed on devices on purpose.
        self.placed: set[Ref[Any]] = set()
        # The Refs that a plain jax program in this body has read by closure.
        self.captured_as_constant: set[Ref[Any]] = set()
        self.describe: Callable[[Ref[Any]], str | None] | None = None
        # For a library on top of this one: what it knows about the inputs of the body.
        self.roots: Any = None
        self.open = True

    def __enter__(self) -> Frame:
        local.frame = self
        return self

    def __exit__(self, *exc: object) -> None:
        local.frame = self.parent
        self.open = False

    def met(self) -> Iterator[StandIn]:
        """The Refs that the body met by closure and that were not passed in, in order."""
        return (s for s in self.stand_ins.values() if s.before is not None)

    def inner(self, ref: Ref[Any]) -> Ref[Any]:
        """The stand-in of `ref`, or `ref` itself if it has none."""
        known = self.stand_ins.get(ref)
        return ref if known is None else known.inner

    def close(self) -> None:
        """Drop everything that could keep a tracer alive."""
        for stand_in in self.met():
            stand_in.inner._value = None
        self.stand_ins.clear()
        self.assigned.clear()
        self.placed.clear()
        self.captured_as_constant.clear()
        self.describe = None
        self.roots = None


class _Local(threading.local):
    frame: Frame | None
    # What the surrounding `mutable` allows; None allows everything.
    limit: Limit | None
    # Whether a walk is flattening a pytree object just to inspect it, so that no Ref counts as read.
    peeking: bool

    def __init__(self) -> None:
        # Runs once in each thread. Lookup is faster for attributes of the instance.
        self.frame = None
        self.limit = None
        self.peeking = False


local = _Local()


def note_made(*made: Any) -> None:
    """Note new Refs and Nodes, if a `mutable` is active: it may allow changes only to new ones."""
    if local.limit is not None:
        local.limit.note_made(made)


def trace_of(frame: Frame | None) -> Any:
    """The trace of a body. For None, it is the trace of code outside of all transformations."""
    return EVAL if frame is None else frame.trace()


def is_eager() -> bool:
    """Whether code runs outside of all transformations."""
    return local.frame is None and current_trace(()) is EVAL
