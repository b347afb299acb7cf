"""The stateful transformations: `jax` transformations that read and write Refs."""

from nnx.transforms.grad import DifferentiationError, grad, value_and_grad
from nnx.transforms.jit import jit

__all__ = ["DifferentiationError", "grad", "jit", "value_and_grad"]
