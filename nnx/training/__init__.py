"""Training: optimizers, metrics, moving averages, and a look at what happens inside a model."""

from nnx.training import metrics
from nnx.training._state import HyperparameterError, OptimizerError
from nnx.training.capture import CaptureError, capture, sow
from nnx.training.ema import EMA, EMAError
from nnx.training.metrics import MultiMetric
from nnx.training.optimizer import Optimizer
from nnx.training.optimizer import mask as mask

# `mask` stays here, as `nnx.training.mask`: the name alone would not say of what.
__all__ = [
    "CaptureError",
    "EMA",
    "EMAError",
    "HyperparameterError",
    "MultiMetric",
    "Optimizer",
    "OptimizerError",
    "capture",
    "metrics",
    "sow",
]
