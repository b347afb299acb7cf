"""nnx: modules for JAX that read like PyTorch and train in plain JAX, on refx.

A module holds its values in Refs. The nnx transformations (`nnx.jit`, `nnx.grad`, ...) split it into
pure values for JAX and write the updates back, so a training step returns nothing. To plain
`jax.*` a module is a pytree of its values.
"""

from typing import TYPE_CHECKING

import refx
from nnx import bridge, debug, layers, serialize, training, transforms
from nnx._elsewhere import missing as _missing
from nnx.layers import *  # noqa: F403
from nnx.module import Module, dataclass, param, ref, static
from nnx.probe import ProbeError, capture, output_grad, patch, sow
from nnx.purify import purify
from nnx.rng import RngStream
from nnx.scope import MissingFlagError, MissingStreamError, get_flag, make_rng, scope
from nnx.serialize import *  # noqa: F403
from nnx.show.graph import graph
from nnx.show.html import display
from nnx.show.tabulate import tabulate
from nnx.surgery import modules, replace
from nnx.training import *  # noqa: F403
from nnx.transforms import *  # noqa: F403
from refx import *  # noqa: F403

__all__ = [
    "MissingFlagError",
    "MissingStreamError",
    "Module",
    "ProbeError",
    "RngStream",
    "bridge",
    "capture",
    "dataclass",
    "debug",
    "display",
    "get_flag",
    "graph",
    "make_rng",
    "modules",
    "output_grad",
    "param",
    "patch",
    "purify",
    "ref",
    "replace",
    "scope",
    "sow",
    "static",
    "tabulate",
]
__all__ += layers.__all__
__all__ += transforms.__all__
__all__ += serialize.__all__
__all__ += training.__all__
__all__ += refx.__all__

# A type checker would take every name for one of nnx.
if not TYPE_CHECKING:

    def __getattr__(name):
        raise _missing(name)
