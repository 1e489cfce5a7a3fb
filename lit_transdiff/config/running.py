"""Settings of tracking, devices, checkpoints and failures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional

from lit_transdiff.config.checks import expand, require


@dataclass(frozen=True)
class TrackingConfig:
    """Weights & Biases. Its own environment variables decide between online, offline and disabled."""

    wandb: bool = True  # log to W&B; false: only to the files of the run folder
    project: str = "lit-transdiff"  # project in W&B
    group: Optional[str] = None  # group of runs in W&B; that of a trial is its sweep
    tags: list[str] = field(default_factory=list)  # tags of the run in W&B
    upload_models: bool = True  # upload weights as artifacts; false: artifacts only refer to the files
    registry: Optional[str] = None  # REGISTRY/COLLECTION in W&B that gets the best model, as in model/fashion
    every_node: bool = True
    # with several nodes: system metrics of each (W&B's shared mode); false: of the first

    def __post_init__(self) -> None:
        parts = [] if self.registry is None else self.registry.split("/")
        allowed = "a registry and a collection, as in model/fashion"
        fits = self.registry is None or (len(parts) == 2 and all(parts))
        require(fits, "tracking.registry", self.registry, allowed)


@dataclass(frozen=True)
class DistributedConfig:
    """Devices and strategy of distributed training."""

    strategy: str = (
        "auto"  # a name in distributed.strategies.STRATEGIES; auto: single on one device, else ddp
    )
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"  # auto: gpu if there is one
    devices: Optional[int] = None  # devices per node; null: as many as torchrun or srun started, else one
    num_nodes: int = 1  # nodes of the job; torchrun and srun take precedence
    offload: Literal["none", "cpu", "nvme"] = "none"  # place of the optimizer's state under ZeRO
    offload_parameters: bool = False  # zero3: also offload the parameters
    nvme_path: Optional[str] = None  # folder on a local disk, for offload: nvme
    timeout_minutes: float = 30.0  # time limit of a collective, after which the job ends

    def __post_init__(self) -> None:
        expand(self, "distributed.nvme_path")
        allowed = "a folder when distributed.offload is 'nvme', else null"
        fits = (self.offload == "nvme") == (self.nvme_path is not None)
        require(fits, "distributed.nvme_path", self.nvme_path, allowed)
        allowed = "true only with distributed.offload 'cpu' or 'nvme'"
        fits = not self.offload_parameters or self.offload != "none"
        require(fits, "distributed.offload_parameters", self.offload_parameters, allowed)
        allowed = "above 0, at most a year (525600)"
        require(
            0 < self.timeout_minutes <= 525_600, "distributed.timeout_minutes", self.timeout_minutes, allowed
        )
        allowed = "null, or at least 1"
        require(self.devices is None or self.devices >= 1, "distributed.devices", self.devices, allowed)
        require(self.num_nodes >= 1, "distributed.num_nodes", self.num_nodes, "at least 1")


@dataclass(frozen=True)
class CheckpointConfig:
    """Retention and writing of checkpoints. Their interval is ``training.checkpoint_every``."""

    keep_last: int = 1  # number of latest checkpoints to keep
    keep_every_images: int = 0
    # also keep the first checkpoint after each multiple of this number of images; 0: none
    keep_best: Optional[str] = None  # also keep the best checkpoint by this metric, such as val/loss
    best_is: Literal["lowest", "highest"] = "lowest"  # the better direction of the metric keep_best
    asynchronous: bool = True  # write files in the background, from a copy in CPU memory
    on_error: Literal["stop", "continue"] = "stop"
    # reaction to a checkpoint that cannot be written (full disk); earlier ones remain
    mirror: Optional[str] = None
    # URL (``s3://``, ``gs://``, ...) or folder; mirror/name is a copy of the run folder, from which the run
    # continues where its folder is lost (docs/remote.md)

    def __post_init__(self) -> None:
        expand(self, "checkpoint.mirror")
        web = self.mirror is not None and self.mirror.startswith(("http://", "https://", "hf://"))
        allowed = "a URL to which files can be written at any time, as in s3://bucket/runs, or a folder"
        require(not web, "checkpoint.mirror", self.mirror, allowed)
        require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "at least 1")
        allowed = "0 (none) or more"
        require(self.keep_every_images >= 0, "checkpoint.keep_every_images", self.keep_every_images, allowed)


@dataclass(frozen=True)
class SafetyConfig:
    """Reactions to bad steps and stalls."""

    on_bad_step: Literal["stop", "skip", "roll_back"] = "stop"  # reaction to a non-finite or spiking loss
    spike_factor: float = 0.0
    # a loss above this multiple of the median of the last 50 steps is a spike; 0: off
    max_bad_steps: int = 10  # number of bad steps after which training stops in any case
    stall_seconds: float = 600.0
    # seconds without a step (stuck worker, lost rank) after which the process ends; 0: never
    slow_rank: float = 1.5
    # a rank whose own work takes this multiple of the ranks' median is named; 0: never

    def __post_init__(self) -> None:
        fits = self.spike_factor == 0 or self.spike_factor > 1
        require(fits, "safety.spike_factor", self.spike_factor, "0 (off) or above 1")
        require(self.max_bad_steps >= 1, "safety.max_bad_steps", self.max_bad_steps, "at least 1")
        allowed = "0 (off) or more, at most a year (31536000)"
        require(0 <= self.stall_seconds <= 31_536_000, "safety.stall_seconds", self.stall_seconds, allowed)
        allowed = "0 (off) or above 1"
        require(self.slow_rank == 0 or self.slow_rank > 1, "safety.slow_rank", self.slow_rank, allowed)
