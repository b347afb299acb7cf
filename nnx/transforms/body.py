"""One run of a user's function inside a transformation."""

from __future__ import annotations

from typing import Any, NamedTuple

from nnx.transforms.call import Call
from nnx.transforms.layout import Layout
from refx import Ref
from refx.frame import Frame, Original

__all__: list[str] = []


class Body(NamedTuple):
    """One run of a user's function: what it was given, and the frame that it runs in.

    `objects` are what was built for it, by their numbers in `layout.dagdef`, and `outer` what they stand
    for. `leaves` are its plain arrays, and `before` what its Refs held. `mode` says what reading a
    closed-over Ref means, and `assigned` whether a Ref counts as written whatever it was given.
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
        """The numbers of the Refs that it wrote."""
        pairs = enumerate(zip(self.refs, self.before, strict=True))
        assigned = self.frame.assigned if self.assigned else ()
        return tuple(i for i, (r, was) in pairs if was.changed(r._value) or r in assigned)

    def note_found(self) -> None:
        """Note the closed-over Refs that it met and that have to be roots."""
        if self.mode == "constant":
            return
        for met in self.frame.met():
            if self.mode == "lift" or met.was_written(self.frame):
                # A module that was made in the body may hold the Ref, but cannot be a root outside.
                inside = met.owner is None or met.owner._frame is self.frame
                self.call.found.append((met.ref, met.ref if inside else met.owner))
