"""Training: optimizers, metrics, moving averages."""

from nnx.training import metrics
from nnx.training._metric import Metric
from nnx.training._state import HyperparameterError, OptimizerError
from nnx.training.ema import EMA, EMAError
from nnx.training.masks import mask as mask
from nnx.training.metrics import MultiMetric
from nnx.training.optimizer import Optimizer
from nnx.training.precision import master_weights as master_weights

# `mask` and `master_weights` stay here, as `nnx.training.mask`: the names alone would not say of what.
__all__ = [
    "EMA",
    "EMAError",
    "HyperparameterError",
    "Metric",
    "MultiMetric",
    "Optimizer",
    "OptimizerError",
    "metrics",
]
