"""How a run is spread over devices: strategies by name."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import Strategy

from lit_transdiff.config import DistributedConfig, RunConfig, require, unknown
from lit_transdiff.distributed.restarts import join
from lit_transdiff.distributed.strategies import DDP, FSDP, Single
from lit_transdiff.stages import PREPARATORY

log = logging.getLogger(__name__)


def build_single(run: RunConfig) -> Strategy:
    return Single(torch.device("cuda", 0) if devices_of(run)[0] == "gpu" else torch.device("cpu"))


def build_ddp(run: RunConfig) -> Strategy:
    return DDP(timeout=timeout_of(run), gradient_as_bucket_view=True)  # no second copy of the gradients


def build_fsdp(run: RunConfig) -> Strategy:
    return FSDP(data_parallel_size=world_size(run), tensor_parallel_size=1, timeout=timeout_of(run))


def build_zero(stage: int, run: RunConfig) -> Strategy:
    from lit_transdiff.distributed.zero import ZeRO  # DeepSpeed takes seconds to import

    on_cpu, bf16 = devices_of(run)[0] == "cpu", precision_of(run) != "32-true"
    micro = micro_batch_size(run)
    return ZeRO(stage, run.distributed, micro_batch=micro, on_cpu=on_cpu, bf16=bf16, timeout=timeout_of(run))


STRATEGIES: dict[str, Callable[[RunConfig], Strategy]] = {
    "single": build_single,
    "ddp": build_ddp,
    "zero1": partial(build_zero, 1),
    "zero2": partial(build_zero, 2),
    "zero3": partial(build_zero, 3),
    "fsdp": build_fsdp,
}
WHOLE = ("single", "ddp")  # strategies that keep whole parameters on every device
EVERYWHERE = ("auto", "fp32", "bf16-mixed")  # precisions that every strategy has


def devices_of(run: RunConfig) -> tuple[str, int]:
    """Accelerator ("gpu" or "cpu") and devices a node.

    What the run does not say: as many as torchrun or srun started, else one.
    """
    config = run.distributed
    gpus = torch.cuda.device_count()
    accelerator = ("gpu" if gpus else "cpu") if config.accelerator == "auto" else config.accelerator
    require(accelerator == "cpu" or gpus > 0, "distributed.accelerator", config.accelerator, "cpu, as there is no GPU here")
    devices = config.devices or launched()[0]
    require(accelerator == "cpu" or devices <= gpus, "distributed.devices", devices, f"at most the {gpus} GPUs of this node")
    return accelerator, devices


def num_nodes(run: RunConfig) -> int:
    """Nodes of the job: what torchrun or srun started, or what the run says."""
    return launched()[1] or run.distributed.num_nodes


def launched() -> tuple[int, int]:
    """Processes a node and nodes, as torchrun or srun started them; one process and 0 nodes where neither did."""
    if "LOCAL_WORLD_SIZE" in os.environ and "WORLD_SIZE" in os.environ:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return local, int(os.environ["WORLD_SIZE"]) // local
    if SLURMEnvironment.detect() and "SLURM_PROCID" in os.environ:
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        return int(os.environ["SLURM_NTASKS"]) // nodes, nodes
    return 1, 0


def world_size(run: RunConfig) -> int:
    return devices_of(run)[1] * num_nodes(run)


def build_fabric() -> Fabric:
    """The ranks that torchrun started, or this process alone; on GPUs where there are any."""
    gpus = torch.cuda.device_count()
    join("nccl" if gpus else "gloo", timedelta(minutes=DistributedConfig().timeout_minutes))
    devices, nodes = launched()
    nodes = max(1, nodes)
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
    allowed = f"{' or '.join(WHOLE)} in stage {run.stage}"
    require(name in WHOLE or run.stage not in PREPARATORY, "distributed.strategy", name, allowed)
    precision = run.training.precision
    require(name in WHOLE or precision in EVERYWHERE, "training.precision", precision, f"{EVERYWHERE} with strategy {name}")
    offload = run.distributed.offload
    require(offload == "none" or name.startswith("zero"), "distributed.offload", offload, f"'none' with strategy {name}")
    require(offload != "nvme" or name == "zero3", "distributed.offload", offload, f"'none' or 'cpu' with strategy {name}")
    return name


def check_spread(run: RunConfig) -> None:
    """Refuse a strategy, batch or offload that is not possible here."""
    strategy_name(run)
    micro_batch_size(run)
    if run.distributed.offload == "nvme":
        from lit_transdiff.distributed.zero import check_nvme

        check_nvme(run.distributed, on_cpu=devices_of(run)[0] == "cpu")


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


def timeout_of(run: RunConfig) -> timedelta:
    """How long a collective may take."""
    return timedelta(minutes=run.distributed.timeout_minutes)


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


def compute_dtype(run: RunConfig) -> torch.dtype:
    """What matrix products are computed in."""
    return {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[precision_of(run)]


def trainer_settings(run: RunConfig) -> dict[str, Any]:
    """The part of the Trainer's arguments that depends on devices."""
    accelerator, devices = devices_of(run)
    name = strategy_name(run)
    join("nccl" if accelerator == "gpu" else "gloo", timeout_of(run))
    plain_slurm = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return dict(
        plugins=[SLURMEnvironment(auto_requeue=False)] if plain_slurm else None,  # see preemption
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes(run),
        strategy=STRATEGIES[name](run),
        precision="32-true" if name.startswith("zero") else precision_of(run),  # ZeRO does its own autocast
        accumulate_grad_batches=accumulation(run),
    )


def default_device() -> torch.device:
    """The first GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
