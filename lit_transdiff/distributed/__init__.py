"""Strategies of distributed training, by name."""

from lit_transdiff.distributed.strategies import (
    STRATEGIES,
    StrategyKind,
    check_distributed,
    strategy_name,
    trainer_settings,
)
from lit_transdiff.distributed.world import (
    accumulation,
    build_fabric,
    compute_dtype,
    default_device,
    micro_batch_size,
    num_nodes,
    precision_of,
    world_size,
)

__all__ = [
    "STRATEGIES",
    "StrategyKind",
    "accumulation",
    "build_fabric",
    "check_distributed",
    "compute_dtype",
    "default_device",
    "micro_batch_size",
    "num_nodes",
    "precision_of",
    "strategy_name",
    "trainer_settings",
    "world_size",
]
