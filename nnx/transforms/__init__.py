"""The stateful transformations: `jax` transformations that read and write Refs."""

from nnx.transforms.arguments import ArgumentError
from nnx.transforms.axes import AxisError
from nnx.transforms.branches import BranchError, cond, switch
from nnx.transforms.carry import CARRY, CarryError
from nnx.transforms.custom import CustomRuleError, custom_jvp, custom_vjp
from nnx.transforms.derivatives import hessian, jacfwd, jacrev, jvp, linearize, vjp
from nnx.transforms.filtered import (
    grad_filter,
    is_array,
    is_inexact_array,
    jit_filter,
    value_and_grad_filter,
)
from nnx.transforms.functional import functional
from nnx.transforms.grad import grad, value_and_grad
from nnx.transforms.jit import jit
from nnx.transforms.loops import fori_loop, map, scan, while_loop
from nnx.transforms.sharded import shard_map
from nnx.transforms.simple import checkify, eval_shape, make_jaxpr, remat
from nnx.transforms.targets import DifferentiationError
from nnx.transforms.vmap import vmap

__all__ = [
    "CARRY",
    "ArgumentError",
    "AxisError",
    "BranchError",
    "CarryError",
    "CustomRuleError",
    "DifferentiationError",
    "checkify",
    "cond",
    "custom_jvp",
    "custom_vjp",
    "eval_shape",
    "fori_loop",
    "functional",
    "grad",
    "grad_filter",
    "hessian",
    "is_array",
    "is_inexact_array",
    "jacfwd",
    "jacrev",
    "jit",
    "jit_filter",
    "jvp",
    "linearize",
    "make_jaxpr",
    "map",
    "remat",
    "scan",
    "shard_map",
    "switch",
    "value_and_grad",
    "value_and_grad_filter",
    "vjp",
    "vmap",
    "while_loop",
]
