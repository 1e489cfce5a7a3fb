"""The devices of a run: number, division of the batch, and precision."""

from __future__ import annotations

import logging
import os
from datetime import timedelta

import torch
from lightning.fabric import Fabric
from lightning.pytorch.plugins.environments import SLURMEnvironment

from lit_transdiff.config import DistributedConfig, RunConfig, require
from lit_transdiff.distributed.restarts import join

log = logging.getLogger(__name__)


def accelerator_and_devices(run: RunConfig) -> tuple[str, int]:
    """Accelerator ("gpu" or "cpu") and devices per node.

    The default number is that of the processes which torchrun or srun started, else one.
    """
    config = run.distributed
    gpus = torch.cuda.device_count()
    accelerator = ("gpu" if gpus else "cpu") if config.accelerator == "auto" else config.accelerator
    allowed = "cpu, as there is no GPU here"
    require(accelerator == "cpu" or gpus > 0, "distributed.accelerator", config.accelerator, allowed)
    devices = config.devices or launched()[0]
    allowed = f"at most the {gpus} GPUs of this node"
    require(accelerator == "cpu" or devices <= gpus, "distributed.devices", devices, allowed)
    return accelerator, devices


def num_nodes(run: RunConfig) -> int:
    """The number of nodes, from torchrun or srun, or from the run's settings."""
    return launched()[1] or run.distributed.num_nodes


def launched() -> tuple[int, int]:
    """Processes per node and nodes started by torchrun or srun; (1, 0) without either."""
    if "LOCAL_WORLD_SIZE" in os.environ and "WORLD_SIZE" in os.environ:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return local, int(os.environ["WORLD_SIZE"]) // local
    if SLURMEnvironment.detect() and "SLURM_PROCID" in os.environ:
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        return int(os.environ["SLURM_NTASKS"]) // nodes, nodes
    return 1, 0


def world_size(run: RunConfig) -> int:
    return accelerator_and_devices(run)[1] * num_nodes(run)


def build_fabric() -> Fabric:
    """A Fabric of the ranks that torchrun started, or of this process, on GPUs if there are any."""
    gpus = torch.cuda.device_count()
    join("nccl" if gpus else "gloo", timedelta(minutes=DistributedConfig().timeout_minutes))
    devices, nodes = launched()
    nodes = max(1, nodes)
    strategy = "ddp" if devices * nodes > 1 else "auto"
    fabric = Fabric(accelerator="gpu" if gpus else "cpu", devices=devices, num_nodes=nodes, strategy=strategy)
    fabric.launch()
    return fabric


def micro_batch_size(run: RunConfig) -> int:
    """Rows per device and forward pass; it determines the number of accumulated passes."""
    size, world = run.training.global_batch_size, world_size(run)
    require(size % world == 0, "training.global_batch_size", size, f"a multiple of the {world} devices")
    micro = run.training.micro_batch_size or size // world
    allowed = f"a divisor of {size} / {world} devices = {size // world}"
    require(size % (micro * world) == 0, "training.micro_batch_size", micro, allowed)
    return micro


def accumulation(run: RunConfig) -> int:
    """Forward passes per device and optimizer step."""
    return run.training.global_batch_size // (micro_batch_size(run) * world_size(run))


def timeout_of(run: RunConfig) -> timedelta:
    """The time limit of a collective."""
    return timedelta(minutes=run.distributed.timeout_minutes)


def precision_of(run: RunConfig) -> str:
    """Lightning's name of the precision of computation; the stage converts the weights of bf16-true."""
    accelerator, _ = accelerator_and_devices(run)
    precision = run.training.precision
    if precision == "auto":
        precision = "bf16-mixed" if accelerator == "gpu" and torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp16-mixed" and accelerator == "cpu":
        log.warning("training.precision: CPUs have no fp16-mixed; bf16-mixed is used")
        precision = "bf16-mixed"
    others = {"fp32": "32-true", "fp16-mixed": "16-mixed", "bf16-true": "bf16-mixed"}
    return others.get(precision, precision)


def compute_dtype(run: RunConfig) -> torch.dtype:
    """The dtype of matrix products."""
    return {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[
        precision_of(run)
    ]


def default_device() -> torch.device:
    """The first GPU, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
