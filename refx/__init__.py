"""refx: shareable mutable cells that you can split into pure pytrees and merge again.

A `Ref` is a cell with an identity. `split` takes a tree of Refs apart into a hashable `DagDef` and
pure `Partition`s of values. JAX sees only the values. `merge` puts the tree together again. Everything
else here follows from these two.
"""

from refx import filters, pickling, pytree  # noqa: F401 — they register trees with pickle and JAX
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

# A plain list, because mypy does not follow the lists of the files. A test compares them.
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
