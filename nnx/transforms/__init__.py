"""The stateful transformations: `jax` transformations that read and write Refs."""

from nnx.transforms.axes import AxisError
from nnx.transforms.branches import BranchError, cond, switch
from nnx.transforms.donation import DonationError
from nnx.transforms.grad import DifferentiationError, grad, value_and_grad
from nnx.transforms.jit import jit
from nnx.transforms.loops import CARRY, CarryError, fori_loop, map, scan, while_loop
from nnx.transforms.sharded import shard_map
from nnx.transforms.vmap import vmap
from nnx.transforms.whole import checkify, eval_shape, make_jaxpr, remat

__all__ = [
    "CARRY",
    "AxisError",
    "BranchError",
    "CarryError",
    "DifferentiationError",
    "DonationError",
    "checkify",
    "cond",
    "eval_shape",
    "fori_loop",
    "grad",
    "jit",
    "make_jaxpr",
    "map",
    "remat",
    "scan",
    "shard_map",
    "switch",
    "value_and_grad",
    "vmap",
    "while_loop",
]
