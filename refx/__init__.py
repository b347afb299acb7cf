"""refx: shareable mutable cells that are split into pure pytrees and merged again.

A `Ref` is a cell with an identity. `split` takes a tree that holds Refs apart into a hashable
`DagDef` and pure `Partition`s of values, which is what JAX gets to see, and `merge` puts it together
again. Everything else here follows from those two.
"""

from refx import (  # noqa: F401 — they tell pickle and JAX about trees
    dag,
    dagdef,
    errors,
    field,
    filters,
    mutability,
    node,
    partition,
    pickling,
    pytree,
    ref,
)
from refx.dag import *  # noqa: F403
from refx.dagdef import *  # noqa: F403
from refx.errors import *  # noqa: F403
from refx.field import *  # noqa: F403
from refx.filters import *  # noqa: F403
from refx.mutability import *  # noqa: F403
from refx.node import *  # noqa: F403
from refx.partition import *  # noqa: F403
from refx.ref import *  # noqa: F403

__all__ = ["filters"]
__all__ += dag.__all__
__all__ += dagdef.__all__
__all__ += errors.__all__
__all__ += field.__all__
__all__ += filters.__all__
__all__ += mutability.__all__
__all__ += node.__all__
__all__ += partition.__all__
__all__ += ref.__all__
