"""The nnx equivalents of names that people know from other libraries."""

from __future__ import annotations

import sys

__all__: list[str] = []

_NAMES = {
    "Param Parameter": "nnx.param, a field of the class: `w: jax.Array = nnx.param()`",
    "Variable VariableState": "nnx.Ref",
    "BatchStat Cache Intermediate Buffer": 'nnx.ref, a field: `mean: jax.Array = nnx.ref("batch_stats")`',
    "Rngs": "nnx.scope, or Net.init(jax.random.key(0))(...) and model.apply(rngs=key)(x)",
    "state variables": 'nnx.get_partition, or model["params"]',
    "State": "nnx.Partition",
    "GraphDef graphdef": "nnx.DagDef",
    "iter_graph": "nnx.refs, which gives the Refs by path",
    "iter_modules named_modules": "nnx.modules, which gives the modules by path",
    "List ModuleList Dict ModuleDict Tuple": "a plain list, dict or tuple",
    "Pytree": "nnx.Module",
    "StateAxes": "nnx.vmap with a dict from filter to axis: in_axes=({'params': 0, ...: None}, 0)",
    "DiffState": "nnx.grad with wrt=filter",
    "split_rngs fork_rngs": "nnx.vmap or nnx.scan, which give each lane or step its own keys",
    "cached_partial": "nnx.jit, which keeps the structure by itself",
    "pop": "nnx.capture for intermediates, or `del model.name`",
    "capture_intermediates": "nnx.capture",
    "perturb": "nnx.output_grad, which works on any model as it is",
    "register_forward_hook": "nnx.capture to see an output, nnx.patch to change it",
    "Flatten": "a function in nnx.Sequential: lambda x: x.reshape(len(x), -1)",
    "get_partition_spec get_named_sharding": "nnx.shardings",
    "with_partitioning with_metadata": "metadata of a field, nnx.param(sharding=...), or nnx.Ref",
    "compact setup": "nnx.Module: make submodules in __init__",
    "pure": "nnx.split and nnx.merge",
    "partition": "nnx.split",
    "combine": "nnx.merge",
    "tree_at": "an assignment, as in model.head = ..., or nnx.replace for all of a kind",
    "filter_jit": "nnx.jit or nnx.jit_filter",
    "filter_grad": "nnx.grad or nnx.grad_filter",
    "filter_vmap": "nnx.vmap",
    "Conv1d Conv2d Conv3d": "nnx.Conv",
    "ConvTranspose1d ConvTranspose2d ConvTranspose3d": "nnx.ConvTranspose",
    "BatchNorm1d BatchNorm2d BatchNorm3d": "nnx.BatchNorm",
    "Embedding": "nnx.Embed",
    "Dense": "nnx.Linear",
    "LSTM GRU": "nnx.RNN with an nnx.LSTMCell or an nnx.GRUCell",
    "MultiheadAttention": "nnx.MultiHeadAttention",
    "MaxPool2d AvgPool2d": "nnx.max_pool or nnx.avg_pool",
    "ReLU GELU Tanh Sigmoid SiLU Softmax": "the function of that name: nnx.relu, nnx.gelu, ...",
    "ModelAndOptimizer TrainState": "nnx.Optimizer",
    "no_grad": "jax.lax.stop_gradient, or nnx.grad with another wrt",
}

HINTS = {name: hint for names, hint in _NAMES.items() for name in names.split()}


def missing(name: str) -> AttributeError:
    """The error for a name that nnx does not have."""
    hint = f"; use {HINTS[name]}" if name in HINTS else ""
    text = f"module 'nnx' has no attribute {name!r}{hint}"
    # Given the module, Python suggests a similar name.
    return AttributeError(text, name=name, obj=sys.modules["nnx"])
