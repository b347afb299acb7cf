"""One run of a user's function inside a transformation."""

from __future__ import annotations

from typing import Any, NamedTuple

from nnx.transforms.call import Call
from nnx.transforms.layout import Layout
from refx import Ref
from refx.frame import Frame, Original

__all__: list[str] = []


class Body(NamedTuple):
    """One run of a user's function: its inputs, and the frame in which it runs.

    `objects` were built for this run, by number in `layout.dagdef`; `outer` are the caller's objects for
    which they stand. `leaves` are its plain arrays, and `before` the original values of its Refs. `mode`
    is the rule for reading closed-over Refs. With `assigned`, a Ref counts as written even if it was
    assigned the value that it had.
    """

    frame: Frame
    call: Call
    layout: Layout
    roots: tuple[Any, ...]
    objects: list[Any]
    outer: list[Any]
    leaves: list[Any]
    before: list[Original]
    mode: str
    assigned: bool

    @property
    def refs(self) -> list[Ref[Any]]:
        """Its Refs, in the order of the call."""
        return [x for x in self.objects if type(x) is Ref]

    def written(self) -> tuple[int, ...]:
        """The numbers of the Refs that the body wrote."""
        pairs = enumerate(zip(self.refs, self.before, strict=True))
        assigned = self.frame.assigned if self.assigned else ()
        return tuple(i for i, (r, was) in pairs if was.changed(r._value) or r in assigned)

    def note_found(self) -> None:
        """Note in the call the closed-over Refs that the body met and that must become roots."""
        if self.mode == "constant":
            return
        for met in self.frame.met():
            if self.mode == "lift" or met.was_written(self.frame):
                # If a module made in the body holds the Ref, that module cannot be a root outside.
                inside = met.owner is None or met.owner._frame is self.frame
                self.call.found.append((met.ref, met.ref if inside else met.owner))
