"""The signature of a call, and a function's records of its past calls."""

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

# New objects or types could fill these caches without end. A dropped entry is rebuilt.
_MOST = 512


class Signature(NamedTuple):
    """A call without its values: everything on which the program depends, except shapes and dtypes."""

    dagdef: DagDef
    form: Form
    # The number of closed-over roots.
    closed: int
    # Array attributes of closed-over modules. Code may read them directly, so they are constants.
    constants: tuple[Any, ...]
    has_scope: bool
    statics: Any
    # The ambient rules for logical axis names.
    rules: Any
    # Values that are not arrays are constants of the program. Each is a Label, with the number of the
    # Ref (or, below zero, of the plain array) that holds it.
    labels: tuple[tuple[int, Label], ...] = ()


class Layout:
    """A signature, and what was learned about its calls. It is the static argument of the program.

    There is one Layout for each signature of a function. Layouts are compared by identity.
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
        # Copy its fields, which are read often.
        self.dagdef, self.form, self.closed, self.constants = signature[:4]
        self.has_scope, self.statics, self.rules, self.labels = signature[4:]
        # Whether a compiled function was traced for this layout, so that its closures are known.
        self.traced = False
        # A record of each call for which a program was made; see `explain`.
        self.programs: list[Any] = []
        # The numbers of the Refs whose buffers `nnx.jit` donates.
        self.donated: tuple[int, ...] = ()
        self.shardings: Any = None
        # The `out_shardings` of the leaves of an output that holds new Refs.
        self.out_shardings: list[Any] = []
        # The numbers of the Refs that the program writes.
        self.written: frozenset[int] = frozenset()
        # The sharding of each value that is on several devices, or None. A written value goes back
        # there. `elsewhere` has the layouts of the same call for other placements of the inputs.
        self.homes: tuple[Any, ...] | None = None
        self.elsewhere: list[tuple[list[Any], Layout, tuple[int, ...]]] = []

    def moved(self, homes: tuple[Any, ...]) -> Layout:
        """The layout of the same call with its values on other devices."""
        layout = Layout(self.signature)
        layout.homes = homes
        layout.programs = self.programs
        return layout

    def sliced(self, dagdef: DagDef) -> Layout:
        """The layout for a body whose Refs hold slices. `dagdef` is the structure of the slices."""
        if dagdef is self.dagdef:
            return self
        return Layout(self.signature._replace(dagdef=dagdef))

    def divided(self, values: Any) -> tuple[list[Any], Any]:
        """The donated values of a call, and the values without them."""
        refs = list(values.refs)
        donated = [refs[i] for i in self.donated]
        for i in self.donated:
            refs[i] = None
        return donated, values._replace(refs=refs)

    def label_of(self, i: int) -> Label | None:
        """The constants in the i-th Ref or, if i < 0, in the plain array with the number -1 - i."""
        return dict(self.labels).get(i)

    def name_of(self, i: int) -> str:
        """The name of the i-th Ref in messages."""
        path = self.dagdef.ref_paths[i][1:]
        return f"Ref {dotted(path)!r}" if path else "A Ref"


class Plan(NamedTuple):
    """How to combine the snapshots of several roots: the positions to take, so that each Ref comes once."""

    layout: Layout
    refs: tuple[int, ...] | None
    leaves: tuple[int, ...] | None


class Plans:
    """One function's records of its past calls.

    `by_call` has the Plan of each kind of call. It is cleared when there are too many kinds, and is then
    filled again from `layouts`, which know the compiled programs.
    """

    def __init__(self) -> None:
        self.by_call: dict[Any, Plan] = {}
        # The last new kinds of calls. A kind is kept if it comes again. If every call has a new model,
        # it does not.
        self._seen: deque[Any] = deque(maxlen=8)
        self.layouts: dict[Signature, Layout] = {}
        # Whether there have ever been too many of them.
        self.forgotten = False

    def layout(self, signature: Signature) -> Layout:
        """The one Layout of a signature."""
        layout = self.layouts.get(signature)
        if layout is None:
            if len(self.layouts) >= _MOST:
                self.forgotten = True
                self.layouts.clear()
                self.by_call.clear()
            # Another thread may add it at the same time.
            layout = self.layouts.setdefault(signature, Layout(signature))
        return layout

    def every(self) -> list[Layout]:
        """All layouts, including those for other placements."""
        found = list(self.layouts.values())
        moved = [layout for known in found for _, layout, _ in known.elsewhere]
        return list(dict.fromkeys([*found, *moved]))

    def drop(self, layout: Layout) -> None:
        """Forget a layout that was traced while an input was missing: JAX keeps that trace for it."""
        if layout.homes is not None:
            for known in self.layouts.values():
                known.elsewhere = [pair for pair in known.elsewhere if pair[1] is not layout]
            return
        self.layouts.pop(layout.signature, None)
        self.by_call = {
            key: plan for key, plan in self.by_call.items() if plan.layout is not layout
        }

    def keep(self, key: Any, plan: Plan, *, again: bool = False) -> None:
        """Keep a plan. With `again`, keep it only if there was such a call before."""
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
"""Stands in a Label for an input of the program."""


class Label:
    """The constants in a value, as a part of a Layout. They are compared by type and content."""

    __slots__ = ("_key", "_mixed", "value")

    def __init__(self, value: Any):
        self.value = value
        leaves, treedef = jax.tree.flatten(value)
        self._mixed = any(x is INPUT for x in leaves)
        self._key = treedef, tuple([Static(x, NESTED) for x in leaves])

    def example(self) -> Any:
        """One of the constants."""
        return next(x for x in jax.tree.leaves(self.value) if x is not INPUT)

    def put_back(self, inputs: Any) -> Any:
        """Rebuild the whole value around its inputs; None if the inputs are gone."""
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
        # A tracer must not be kept, and never appears in a later call. NumPy arrays may change in
        # place, so compare their content.
        self.array: Any = object() if isinstance(array, Tracer) else array
        if isinstance(array, np.ndarray):
            self.array = (array.shape, array.dtype.str, array.tobytes())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same):
            return False
        if isinstance(self.array, tuple) and isinstance(other.array, tuple):
            return self.array == other.array
        return other.array is self.array

    def __hash__(self) -> int:
        return hash(self.array) if isinstance(self.array, tuple) else id(self.array)


def constants_of(snapshots: list[Snapshot]) -> tuple[Any, ...]:
    return tuple(_Same(x) for s in snapshots for x in s.leaves())
