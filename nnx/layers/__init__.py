"""Layers: modules with the arguments, names, shapes and numerics of the flax.nnx layers of the same name."""

from jax.nn import (
    celu,
    elu,
    gelu,
    glu,
    hard_sigmoid,
    hard_silu,
    hard_swish,
    hard_tanh,
    identity,
    initializers,
    leaky_relu,
    log_sigmoid,
    log_softmax,
    mish,
    one_hot,
    relu,
    relu6,
    selu,
    sigmoid,
    silu,
    soft_sign,
    softmax,
    softplus,
    sparse_plus,
    sparse_sigmoid,
    squareplus,
    standardize,
    swish,
)
from jax.numpy import tanh

from nnx.layers._cell import RNNCellBase
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
from nnx.layers.masks import (
    combine_masks,
    make_attention_mask,
    make_causal_mask,
    make_padding_mask,
    make_window_mask,
)
from nnx.layers.mlp import MLP
from nnx.layers.normalization import BatchNorm
from nnx.layers.pooling import (
    avg_pool,
    max_pool,
    min_pool,
    pool,
)
from nnx.layers.positions import (
    RotaryEmbedding,
    apply_rotary,
    sinusoidal_positions,
)
from nnx.layers.prelu import PReLU
from nnx.layers.quantized import QuantizedLinear
from nnx.layers.recurrent import (
    GRUCell,
    LSTMCell,
    OptimizedLSTMCell,
    SimpleCell,
)
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
    "GRUCell",
    "Grad",
    "GroupNorm",
    "Identity",
    "InstanceNorm",
    "Jit",
    "LSTMCell",
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
    "OptimizedLSTMCell",
    "PReLU",
    "Partial",
    "QuantizedLinear",
    "RMSNorm",
    "RNN",
    "RNNCellBase",
    "Remat",
    "RotaryEmbedding",
    "Sequential",
    "SimpleCell",
    "SpectralNorm",
    "Stack",
    "VMap",
    "WeightNorm",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "apply_lora",
    "apply_rotary",
    "avg_pool",
    "celu",
    "combine_masks",
    "dot_product_attention",
    "dot_product_attention_weights",
    "elu",
    "flip_sequences",
    "gelu",
    "glu",
    "hard_sigmoid",
    "hard_silu",
    "hard_swish",
    "hard_tanh",
    "identity",
    "initializers",
    "leaky_relu",
    "log_sigmoid",
    "log_softmax",
    "make_attention_mask",
    "make_causal_mask",
    "make_padding_mask",
    "make_window_mask",
    "max_pool",
    "merge_lora",
    "min_pool",
    "mish",
    "one_hot",
    "pool",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "sinusoidal_positions",
    "soft_sign",
    "softmax",
    "softplus",
    "sparse_plus",
    "sparse_sigmoid",
    "squareplus",
    "standardize",
    "swish",
    "tanh",
]
