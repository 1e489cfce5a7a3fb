"""Where a run is tracked, and on what it is spread."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional

from lit_transdiff.config.checks import require


@dataclass(frozen=True)
class TrackingConfig:
    """Weights & Biases. Online, offline or disabled is decided by W&B's own environment variables."""

    wandb: bool = True
    project: str = "lit-transdiff"
    group: Optional[str] = None
    tags: list[str] = field(default_factory=list)
    upload_models: bool = True  # the trained weights, as artifacts; false: only where they lie


@dataclass(frozen=True)
class DistributedConfig:
    """On what the run is spread."""

    strategy: str = "auto"  # a name in distributed.STRATEGIES, or auto: single on one device, ddp on several
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: Optional[int] = None  # a node; nothing: as many as torchrun started, or one
    num_nodes: int = 1

    def __post_init__(self) -> None:
        require(self.devices is None or self.devices >= 1, "distributed.devices", self.devices, "nothing, or 1 and more")
        require(self.num_nodes >= 1, "distributed.num_nodes", self.num_nodes, "1 or more")
