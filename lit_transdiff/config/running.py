"""Where a run is tracked, on what it is spread, and what happens when something goes wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional

from lit_transdiff.config.checks import expand, require


@dataclass(frozen=True)
class TrackingConfig:
    """Weights & Biases. Online, offline or disabled is decided by W&B's own environment variables."""

    wandb: bool = True  # false: only the files of the run folder
    project: str = "lit-transdiff"  # of W&B
    group: Optional[str] = None  # of W&B: runs that belong together; a trial's is its sweep
    tags: list[str] = field(default_factory=list)  # of W&B, to find the run by
    upload_models: bool = True  # weights as artifacts; false: artifacts only refer to the files


@dataclass(frozen=True)
class DistributedConfig:
    """On what the run is spread."""

    strategy: str = "auto"  # a name in distributed.strategies.STRATEGIES, or auto: single on one device, ddp on several
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"  # auto: a GPU where there is one
    devices: Optional[int] = None  # per node; null: what torchrun or srun started, else one
    num_nodes: int = 1  # of the job; torchrun and srun go over it
    offload: Literal["none", "cpu", "nvme"] = "none"  # where ZeRO keeps the optimizer's state
    offload_parameters: bool = False  # zero3: where offload says, the parameters too
    nvme_path: Optional[str] = None  # folder on a local disk, for offload: nvme
    timeout_minutes: float = 30.0  # a collective that takes longer ends the job

    def __post_init__(self) -> None:
        expand(self, "distributed.nvme_path")
        require(
            (self.offload == "nvme") == (self.nvme_path is not None),
            "distributed.nvme_path",
            self.nvme_path,
            "a folder when distributed.offload is 'nvme', else null",
        )
        require(
            not self.offload_parameters or self.offload != "none",
            "distributed.offload_parameters",
            self.offload_parameters,
            "true only with distributed.offload 'cpu' or 'nvme'",
        )
        allowed = "above 0, at most a year (525600)"
        require(0 < self.timeout_minutes <= 525_600, "distributed.timeout_minutes", self.timeout_minutes, allowed)
        require(self.devices is None or self.devices >= 1, "distributed.devices", self.devices, "null, or at least 1")
        require(self.num_nodes >= 1, "distributed.num_nodes", self.num_nodes, "at least 1")


@dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints stay, and how they are written. The rhythm is ``training.checkpoint_every``."""

    keep_last: int = 1  # checkpoints kept beside those below
    keep_every_images: int = 0  # also keep the first one after every so many images; 0: none
    keep_best: Optional[str] = None  # also keep the best one by this metric, as in val/loss
    best_is: Literal["lowest", "highest"] = "lowest"  # which value of keep_best is best
    asynchronous: bool = True  # write files beside the training; a copy in CPU memory is made first
    on_error: Literal["stop", "continue"] = "stop"  # when one cannot be written (a full disk); the earlier ones stay

    def __post_init__(self) -> None:
        require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "at least 1")
        require(self.keep_every_images >= 0, "checkpoint.keep_every_images", self.keep_every_images, "0 (none) or more")


@dataclass(frozen=True)
class SafetyConfig:
    """What is done about steps that go wrong, lost time and signals."""

    on_bad_step: Literal["stop", "skip", "roll_back"] = "stop"  # a loss that is not finite, or a spike
    spike_factor: float = 0.0  # a loss above this many medians of the last 50 steps is a spike; 0: spikes are not looked for
    max_bad_steps: int = 10  # after so many, training stops whatever on_bad_step says
    stall_seconds: float = 600.0  # without a step for so long (a stuck worker, a lost rank) the process ends; 0: never

    def __post_init__(self) -> None:
        require(self.spike_factor == 0 or self.spike_factor > 1, "safety.spike_factor", self.spike_factor, "0 (off) or above 1")
        require(self.max_bad_steps >= 1, "safety.max_bad_steps", self.max_bad_steps, "at least 1")
        allowed = "0 (off) or more, at most a year (31536000)"
        require(0 <= self.stall_seconds <= 31_536_000, "safety.stall_seconds", self.stall_seconds, allowed)
