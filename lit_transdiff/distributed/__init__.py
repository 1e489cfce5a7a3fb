"""How a run is spread over devices: strategies by name."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from lightning.fabric import Fabric

from lit_transdiff.config import RunConfig, require, unknown

log = logging.getLogger(__name__)
# Name -> the name that Lightning's Trainer takes.
STRATEGIES: dict[str, str] = {"single": "auto", "ddp": "ddp"}


def devices_of(run: RunConfig) -> tuple[str, int]:
    """Accelerator ("gpu" or "cpu") and devices a node.

    What the run does not say: as many as torchrun started, and one without torchrun.
    """
    config = run.distributed
    gpus = torch.cuda.device_count()
    accelerator = ("gpu" if gpus else "cpu") if config.accelerator == "auto" else config.accelerator
    require(accelerator == "cpu" or gpus > 0, "distributed.accelerator", config.accelerator, "cpu, as there is no GPU here")
    devices = config.devices or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    require(accelerator == "cpu" or devices <= gpus, "distributed.devices", devices, f"at most the {gpus} GPUs of this node")
    return accelerator, devices


def num_nodes(run: RunConfig) -> int:
    """Nodes of the job: what torchrun started, or what the run says."""
    if "LOCAL_WORLD_SIZE" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])
    return run.distributed.num_nodes


def world_size(run: RunConfig) -> int:
    return devices_of(run)[1] * num_nodes(run)


def build_fabric() -> Fabric:
    """The ranks that torchrun started, or this process alone; on GPUs where there are any."""
    gpus = torch.cuda.device_count()
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    nodes = int(os.environ.get("WORLD_SIZE", devices)) // devices
    strategy = "ddp" if devices * nodes > 1 else "auto"
    fabric = Fabric(accelerator="gpu" if gpus else "cpu", devices=devices, num_nodes=nodes, strategy=strategy)
    fabric.launch()
    return fabric


def strategy_name(run: RunConfig) -> str:
    """The strategy, with ``auto`` resolved: ``single`` on one device, ``ddp`` on several."""
    name, world = run.distributed.strategy, world_size(run)
    if name == "auto":
        return "single" if world == 1 else "ddp"
    if name not in STRATEGIES:
        raise unknown("distributed.strategy", name, ["auto", *STRATEGIES])
    require(name != "single" or world == 1, "distributed.strategy", name, f"ddp on {world} devices")
    return name


def micro_batch_size(run: RunConfig) -> int:
    """Images a device and forward pass; the number of accumulated passes follows from it."""
    size, world = run.training.global_batch_size, world_size(run)
    require(size % world == 0, "training.global_batch_size", size, f"a multiple of the {world} devices")
    micro = run.training.micro_batch_size or size // world
    require(
        size % (micro * world) == 0,
        "training.micro_batch_size",
        micro,
        f"a divisor of {size} / {world} devices = {size // world}",
    )
    return micro


def accumulation(run: RunConfig) -> int:
    """Forward passes a device and optimizer step."""
    return run.training.global_batch_size // (micro_batch_size(run) * world_size(run))


def precision_of(run: RunConfig) -> str:
    """Lightning's name of the precision: what is computed in; the weights of bf16-true are the stage's business."""
    accelerator, _ = devices_of(run)
    wanted = run.training.precision
    if wanted == "auto":
        wanted = "bf16-mixed" if accelerator == "gpu" and torch.cuda.is_bf16_supported() else "fp32"
    if wanted == "fp16-mixed" and accelerator == "cpu":
        log.warning("training.precision: CPUs have no fp16-mixed; bf16-mixed is used")
        wanted = "bf16-mixed"
    return {"fp32": "32-true", "bf16-mixed": "bf16-mixed", "fp16-mixed": "16-mixed", "bf16-true": "bf16-mixed"}[wanted]


def trainer_settings(run: RunConfig) -> dict[str, Any]:
    """The part of the Trainer's arguments that depends on devices."""
    accelerator, devices = devices_of(run)
    return dict(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes(run),
        strategy=STRATEGIES[strategy_name(run)],
        precision=precision_of(run),
        accumulate_grad_batches=accumulation(run),
    )


def default_device() -> torch.device:
    """The first GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
