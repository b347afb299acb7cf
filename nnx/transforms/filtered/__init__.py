"""Transformations with value semantics that choose leaf by leaf: `jit_filter`, `grad_filter`."""

from nnx.transforms.filtered.grad import grad_filter, value_and_grad_filter
from nnx.transforms.filtered.jit import jit_filter
from nnx.transforms.filtered.leaves import is_array, is_inexact_array

__all__ = ["grad_filter", "is_array", "is_inexact_array", "jit_filter", "value_and_grad_filter"]
