"""Layers: modules with the arguments, names, shapes and numerics of their flax.nnx namesakes."""

from jax.nn import initializers

from nnx.layers import activations
from nnx.layers.activations import *  # noqa: F403
from nnx.layers.containers import Sequential, Stack
from nnx.layers.conv import Conv
from nnx.layers.linear import Linear
from nnx.layers.normalization import BatchNorm
from nnx.layers.stochastic import Dropout

__all__ = [
    "BatchNorm",
    "Conv",
    "Dropout",
    "Linear",
    "Sequential",
    "Stack",
    "initializers",
]
__all__ += activations.__all__
