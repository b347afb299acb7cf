"""The nnx equivalents of names that people know from other libraries."""

from __future__ import annotations

import sys
from typing import Any

__all__: list[str] = []

_OF_NNX = {
    "Param Parameter": "nnx.param, a field of the class: `w: jax.Array = nnx.param()`",
    "Variable VariableState": "nnx.Ref",
    "BatchStat Cache Intermediate Buffer": 'nnx.ref, a field: `mean: jax.Array = nnx.ref("batch_stats")`',
    "Rngs": "nnx.scope, or Net.init(jax.random.key(0))(...) and model.apply(rngs=key)(x)",
    "state variables": 'nnx.get_partition, or model["params"]',
    "State": "nnx.Partition",
    "GraphDef graphdef": "nnx.DagDef",
    "iter_graph": "nnx.refs, which returns the Refs by path",
    "iter_modules named_modules": "nnx.modules, which returns the modules by path",
    "List ModuleList Dict ModuleDict Tuple": "a plain list, dict or tuple",
    "Pytree": "nnx.Module",
    "StateAxes": "nnx.vmap with a dict from filter to axis: in_axes=({'params': 0, ...: None}, 0)",
    "DiffState": "nnx.grad with wrt=filter",
    "split_rngs fork_rngs": "nnx.vmap or nnx.scan, which give each lane or step its own keys",
    "cached_partial": "nnx.jit, which already caches the structure",
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
    "tree_at": "an assignment, as in model.head = ..., or nnx.replace for all modules of a kind",
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

_OF_MODULES = {
    "parameters named_parameters": "the values are model['params'], a Partition by path",
    "buffers variables": "the values are model[...], or those of a collection, model['batch_stats']",
    "state_dict": (
        "nnx.save(path, model) writes a file, model[...] gives the values by path, and "
        "nnx.bridge.to_state_dict(model) a state dict for PyTorch"
    ),
    "load_state_dict": (
        "nnx.load_state(path, into=model) reads a file, nnx.update(model, partition) writes values"
    ),
    "named_modules children named_children iter_modules": "nnx.modules(model) gives them by path",
    "zero_grad backward": "gradients are a value: grads = nnx.grad(loss)(model)",
    "requires_grad_ freeze": "select what to train with a filter: nnx.grad(loss, wrt='params')",
    "to cuda cpu": "jax.device_put(model[...], device), then nnx.update; arrays know where they are",
    "half bfloat16 float double": "layers take dtype= and param_dtype=",
    "register_forward_hook": "nnx.capture(model, where)(x) gives outputs, nnx.patch changes them",
    "register_buffer": "declare a field in the class, mean: jax.Array = nnx.ref('batch_stats')",
    "register_parameter add_module": "assign it: self.name = ...",
    "sow perturb": "nnx.capture(model, where)(x) gives outputs, nnx.output_grad their gradients",
    "variable param": "declare a field in the class: w: jax.Array = nnx.param()",
    "tabulate": "nnx.tabulate(model, x)",
    "forward": "call the module itself, model(x)",
    "split": "nnx.split(model, ...)",
    "state": "the values are model[...], a Partition by path",
}


def _one_by_one(table: dict[str, str]) -> dict[str, str]:
    return {name: hint for names, hint in table.items() for name in names.split()}


NNX, MODULE = _one_by_one(_OF_NNX), _one_by_one(_OF_MODULES)
"""What to write for a name that nnx, or that a module, does not have."""


def no_name(name: str) -> AttributeError:
    """The error for a name that nnx does not have."""
    hint = f"; use {NNX[name]}" if name in NNX else ""
    return _error(f"module 'nnx' has no attribute {name!r}{hint}", name, sys.modules["nnx"])


def no_attribute(module: Any, name: str) -> AttributeError:
    """The error for an attribute that a module does not have."""
    hint = f": {MODULE[name]}." if name in MODULE else ""
    text = f"{type(module).__name__!r} object has no attribute {name!r}{hint}"
    return _error(text, name, module)


def _error(text: str, name: str, obj: Any) -> AttributeError:
    # Given the object, Python suggests a similar name that it has.
    return AttributeError(text, name=name, obj=obj)
