"""Placement on devices: you say it once, beside a parameter or by rule, and it holds from construction
to checkpoint.
"""

from nnx.sharding.placing import constrain, fsdp, shard, shardings
from nnx.sharding.rules import ShardingError, axis_rules

__all__ = ["ShardingError", "axis_rules", "constrain", "fsdp", "shard", "shardings"]
