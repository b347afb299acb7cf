"""refx: shareable mutable cells that are split into pure pytrees and merged again.

A `Ref` is a cell with an identity. `split` takes a tree that holds Refs apart into a hashable
`DagDef` and pure `Partition`s of values, which is what JAX gets to see, and `merge` puts it together
again. Everything else here follows from those two.
"""

from refx import filters, pickling, pytree  # noqa: F401 — they tell pickle and JAX about trees
from refx.dag import clone, frozen, get_partition, merge, refs, split, update
from refx.dagdef import DagDef
from refx.errors import (
    ClosureError,
    DonationError,
    DtypeError,
    EndedTraceError,
    FilterError,
    ForeignTracerError,
    MissingPathError,
    NotMutableError,
    ReadOnlyError,
    RefError,
    ShapeError,
    StructureError,
    TraceLevelError,
    UnhashableStaticError,
    UnknownPathError,
    UnmatchedPathError,
    UnpicklableStaticError,
    UnsetFieldError,
    ValueTypeError,
)
from refx.field import MISSING, RefField, StaticField, get_ref
from refx.filters import (
    All,
    Any,
    Filter,
    InModule,
    Not,
    OfType,
    PathContains,
    PathMatches,
    to_predicate,
)
from refx.mutability import mutable
from refx.node import Node
from refx.partition import Partition
from refx.ref import Ref

# A plain list, since mypy does not follow those of the files. A test compares them.
__all__ = [
    "All",
    "Any",
    "ClosureError",
    "DagDef",
    "DonationError",
    "DtypeError",
    "EndedTraceError",
    "Filter",
    "FilterError",
    "ForeignTracerError",
    "InModule",
    "MISSING",
    "MissingPathError",
    "Node",
    "Not",
    "NotMutableError",
    "OfType",
    "Partition",
    "PathContains",
    "PathMatches",
    "ReadOnlyError",
    "Ref",
    "RefError",
    "RefField",
    "ShapeError",
    "StaticField",
    "StructureError",
    "TraceLevelError",
    "UnhashableStaticError",
    "UnknownPathError",
    "UnmatchedPathError",
    "UnpicklableStaticError",
    "UnsetFieldError",
    "ValueTypeError",
    "clone",
    "filters",
    "frozen",
    "get_partition",
    "get_ref",
    "merge",
    "mutable",
    "refs",
    "split",
    "to_predicate",
    "update",
]
