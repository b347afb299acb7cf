"""Weights from and to other libraries: flax, PyTorch state dicts, safetensors files."""

from nnx.bridge._move import BridgeError
from nnx.bridge.flax import from_flax, to_flax
from nnx.bridge.state_dict import to_state_dict
from nnx.bridge.torch import from_state_dict

__all__ = ["BridgeError", "from_flax", "from_state_dict", "to_flax", "to_state_dict"]
