"""What a call looks like without its values, and what a function knows of the calls that it had."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from nnx.transforms.arguments import Form
from refx.dagdef import DagDef
from refx.partition import dotted
from refx.snapshot import Snapshot
from refx.static import NESTED, Static

__all__: list[str] = []

# A bound for caches that ever new objects or types could fill; what is dropped is made again.
_MOST = 512


class Signature(NamedTuple):
    """What a call looks like without its values: all that a program depends on but shapes and dtypes."""

    dagdef: DagDef
    form: Form
    # How many roots are closed over.
    closed: int
    # Array attributes of closed-over modules are read where they are, so they are constants.
    constants: tuple[Any, ...]
    has_scope: bool
    statics: Any
    # What logical axis names stand for where the call is made.
    rules: Any
    # Values that are not arrays, by the number of the Ref (or, below zero, of the plain leaf) that
    # holds it: constants of the program, as a Label each.
    labels: tuple[tuple[int, Label], ...] = ()


class Layout:
    """One signature of the calls of a function, and what was learned of it: the static argument.

    Layouts are made once for each signature of a function and compared by identity.
    """

    __slots__ = (
        *Signature._fields,
        "donated",
        "elsewhere",
        "homes",
        "out_shardings",
        "programs",
        "shardings",
        "signature",
        "traced",
        "written",
    )

    def __init__(self, signature: Signature):
        self.signature = signature
        # Its fields, since they are asked for often.
        self.dagdef, self.form, self.closed, self.constants = signature[:4]
        self.has_scope, self.statics, self.rules, self.labels = signature[4:]
        # Whether a compiled function was traced for this layout, so that its closures are known.
        self.traced = False
        # What the calls looked like for which a program was made; see `explain`.
        self.programs: list[Any] = []
        # What `nnx.jit` learned by that: the Refs whose buffers it takes.
        self.donated: tuple[int, ...] = ()
        self.shardings: Any = None
        # What was said, in `out_shardings`, of the leaves of an output that holds new Refs.
        self.out_shardings: list[Any] = []
        # The numbers of the Refs that the program writes.
        self.written: frozenset[int] = frozenset()
        # Where each value is that several devices share; None in place of it for the others. What is
        # written goes back there. `elsewhere` has, by the placements of the inputs, the layouts of
        # the same call in other places.
        self.homes: tuple[Any, ...] | None = None
        self.elsewhere: list[tuple[list[Any], Layout, tuple[int, ...]]] = []

    def moved(self, homes: tuple[Any, ...]) -> Layout:
        """The layout of the same call with its values in other places."""
        layout = Layout(self.signature)
        layout.homes = homes
        layout.programs = self.programs
        return layout

    def sliced(self, dagdef: DagDef) -> Layout:
        """The layout as a body sees it whose Refs hold slices; `dagdef` speaks of those."""
        if dagdef is self.dagdef:
            return self
        return Layout(self.signature._replace(dagdef=dagdef))

    def divided(self, values: Any) -> tuple[list[Any], Any]:
        """What is donated of the values of a call, and the values without it."""
        refs = list(values.refs)
        donated = [refs[i] for i in self.donated]
        for i in self.donated:
            refs[i] = None
        return donated, values._replace(refs=refs)

    def label_of(self, i: int) -> Label | None:
        """What is constant of the i-th Ref or, below zero, of the plain array with the number -1 - i."""
        return dict(self.labels).get(i)

    def name_of(self, i: int) -> str:
        """How a message calls the i-th Ref."""
        path = self.dagdef.ref_paths[i][1:]
        return f"Ref {dotted(path)!r}" if path else "A Ref"


class Plan(NamedTuple):
    """How the snapshots of several roots make up one list of Refs: by position, each Ref once."""

    layout: Layout
    refs: tuple[int, ...] | None
    leaves: tuple[int, ...] | None


class Plans:
    """What one function knows of the calls that it had.

    `by_call` is found by what a call looks like, and forgets when there were too many calls that
    looked different; it is made again from `layouts`, which know the compiled programs.
    """

    def __init__(self) -> None:
        self.by_call: dict[Any, Plan] = {}
        # The last calls that looked new. One that comes again is worth knowing; a model that is made
        # for each call is not.
        self._seen: deque[Any] = deque(maxlen=8)
        self.layouts: dict[Signature, Layout] = {}
        # Whether there were too many of them once.
        self.forgotten = False

    def layout(self, signature: Signature) -> Layout:
        """The one Layout of a signature."""
        layout = self.layouts.get(signature)
        if layout is None:
            if len(self.layouts) >= _MOST:
                self.forgotten = True
                self.layouts.clear()
                self.by_call.clear()
            # Another thread may be as far.
            layout = self.layouts.setdefault(signature, Layout(signature))
        return layout

    def every(self) -> list[Layout]:
        """All layouts, those in other places too."""
        found = list(self.layouts.values())
        moved = [layout for known in found for _, layout, _ in known.elsewhere]
        return list(dict.fromkeys([*found, *moved]))

    def drop(self, layout: Layout) -> None:
        """Forget a layout that was traced without an input. JAX keeps that trace for it."""
        if layout.homes is not None:
            for known in self.layouts.values():
                known.elsewhere = [pair for pair in known.elsewhere if pair[1] is not layout]
            return
        self.layouts.pop(layout.signature, None)
        self.by_call = {
            key: plan for key, plan in self.by_call.items() if plan.layout is not layout
        }

    def keep(self, key: Any, plan: Plan, *, again: bool = False) -> None:
        """Know the plan from now on; with `again`, only if there was such a call before."""
        if again and key not in self._seen:
            self._seen.append(key)
            return
        if len(self.by_call) >= _MOST:
            self.by_call.clear()
        self.by_call[key] = plan


class _Input:
    def __repr__(self) -> str:
        return "INPUT"


INPUT: Any = _Input()
"""Stands in a Label for what is an input of the program."""


class Label:
    """What is constant of a value, as a part of a Layout: it counts by type and content."""

    __slots__ = ("_key", "_mixed", "value")

    def __init__(self, value: Any):
        self.value = value
        leaves, treedef = jax.tree.flatten(value)
        self._mixed = any(x is INPUT for x in leaves)
        self._key = treedef, tuple([Static(x, NESTED) for x in leaves])

    def example(self) -> Any:
        """A part of it that is constant."""
        return next(x for x in jax.tree.leaves(self.value) if x is not INPUT)

    def put_back(self, inputs: Any) -> Any:
        """The whole value, around its inputs; None where those are not there any more."""
        if not self._mixed:
            return self.value
        if inputs is None:
            return None
        return jax.tree.map(lambda x, given: given if x is INPUT else x, self.value, inputs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Label) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


class _Same:
    """An array as part of a key: equal only to itself."""

    __slots__ = ("array",)

    def __init__(self, array: Any):
        # A tracer must not be kept, and is never the same in a later call. NumPy's arrays may
        # change in place, so of those the content counts.
        self.array: Any = object() if isinstance(array, Tracer) else array
        if isinstance(array, np.ndarray):
            self.array = (array.shape, array.dtype.str, array.tobytes())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same):
            return False
        return other.array is self.array or (
            isinstance(self.array, tuple) and self.array == other.array
        )

    def __hash__(self) -> int:
        return hash(self.array) if isinstance(self.array, tuple) else id(self.array)


def constants_of(snapshots: list[Snapshot]) -> tuple[Any, ...]:
    return tuple(_Same(x) for s in snapshots for x in s.leaves())
