"""Layers: modules with the arguments, names, shapes and numerics of their flax.nnx namesakes."""

from jax.nn import initializers

from nnx.layers import activations, masks, pooling, positions, recurrent
from nnx.layers.activations import *  # noqa: F403
from nnx.layers.adaptive_pooling import adaptive_avg_pool, adaptive_max_pool
from nnx.layers.attention import MultiHeadAttention
from nnx.layers.attention_functions import dot_product_attention, dot_product_attention_weights
from nnx.layers.containers import Identity, Sequential, Stack
from nnx.layers.conv import Conv
from nnx.layers.conv_transpose import ConvTranspose
from nnx.layers.embedding import Embed
from nnx.layers.layer_norm import GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from nnx.layers.linear import Linear
from nnx.layers.linear_general import Einsum, LinearGeneral
from nnx.layers.lora import LoRA, LoRALinear, LoRALinearGeneral
from nnx.layers.lora_layers import LoRAConv, LoRAEinsum, LoRAEmbed
from nnx.layers.lora_surgery import apply_lora, merge_lora
from nnx.layers.masks import *  # noqa: F403
from nnx.layers.mlp import MLP
from nnx.layers.normalization import BatchNorm
from nnx.layers.pooling import *  # noqa: F403
from nnx.layers.positions import *  # noqa: F403
from nnx.layers.prelu import PReLU
from nnx.layers.quantized import QuantizedLinear
from nnx.layers.recurrent import *  # noqa: F403
from nnx.layers.rnn import RNN, Bidirectional, flip_sequences
from nnx.layers.stochastic import Dropout
from nnx.layers.transformed import Grad, Jit, Partial, Remat, VMap
from nnx.layers.weight_norm import SpectralNorm, WeightNorm

__all__ = [
    "BatchNorm",
    "Bidirectional",
    "Conv",
    "ConvTranspose",
    "Dropout",
    "Einsum",
    "Embed",
    "Grad",
    "GroupNorm",
    "Identity",
    "InstanceNorm",
    "Jit",
    "LayerNorm",
    "Linear",
    "LinearGeneral",
    "LoRA",
    "LoRAConv",
    "LoRAEinsum",
    "LoRAEmbed",
    "LoRALinear",
    "LoRALinearGeneral",
    "MLP",
    "MultiHeadAttention",
    "PReLU",
    "Partial",
    "QuantizedLinear",
    "RMSNorm",
    "RNN",
    "Remat",
    "Sequential",
    "SpectralNorm",
    "Stack",
    "VMap",
    "WeightNorm",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "apply_lora",
    "dot_product_attention",
    "dot_product_attention_weights",
    "flip_sequences",
    "initializers",
    "merge_lora",
]
__all__ += activations.__all__
__all__ += masks.__all__
__all__ += pooling.__all__
__all__ += positions.__all__
__all__ += recurrent.__all__
