"""The strategies of distributed training: a table with the properties of each, and the choice by name.

Strategies for one device, whole copies (DDP) and shards (FSDP2) are defined here; ZeRO is in ``zero``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy

from lit_transdiff.config import RunConfig, require, unknown
from lit_transdiff.distributed.flight_recorder import record_collectives
from lit_transdiff.distributed.restarts import join
from lit_transdiff.distributed.sharding import Sharding
from lit_transdiff.distributed.world import (
    accelerator_and_devices,
    accumulation,
    micro_batch_size,
    num_nodes,
    precision_of,
    timeout_of,
    world_size,
)
from lit_transdiff.models.execution import shard_blocks
from lit_transdiff.models.paradigm import Paradigm
from lit_transdiff.stages import PREPARATORY


class Single(Sharding, SingleDeviceStrategy):
    """One device."""

    is_whole = True


class DDP(Sharding, DDPStrategy):
    """Whole copies on every device; gradients are averaged."""

    is_whole = True


class FSDP(Sharding, ModelParallelStrategy):
    """FSDP2: parameters, gradients, optimizer states and averages are sharded by rows."""

    def shard(self, model: Paradigm) -> None:
        shard_blocks(model, self.device_mesh["data_parallel"])


BUCKETS = 2 * 200_000_000 * 4.0  # bytes of DeepSpeed's two gradient buffers


@dataclass(frozen=True)
class StrategyKind:
    """A strategy: its constructor, communication volume, sharded parts and supported settings.

    ``traffic``: bytes that a GPU sends per step, from the bytes of a ring over the weights, those of a ring
    over the gradients, and the number of passes.
    """

    build: Callable[[RunConfig], Strategy]
    traffic: Callable[[float, float, int], float]
    alone: bool = False  # only for one device
    cuts_weights: bool = False
    cuts_gradients: bool = False
    cuts_optimizer: bool = False  # moments and weight averages
    has_master: bool = False  # a second, sharded float32 copy of the weights for the optimizer
    keeps_reduced: bool = False  # the reduced shard of the gradients in addition to the whole ones
    buffers: float = 0.0  # bytes
    own_autocast: bool = False  # Lightning's own precision is float32
    takes_muon: bool = False  # Muon can find whole matrices in its storage
    offloads: tuple[str, ...] = ("none",)  # supported values of distributed.offload
    offloads_parameters: bool = False

    @property
    def whole(self) -> bool:
        """Whether every device keeps whole parameters and whole optimizer states."""
        return not (self.cuts_weights or self.cuts_gradients or self.cuts_optimizer)


def build_single(run: RunConfig) -> Strategy:
    return Single(
        torch.device("cuda", 0) if accelerator_and_devices(run)[0] == "gpu" else torch.device("cpu")
    )


def build_ddp(run: RunConfig) -> Strategy:
    return DDP(timeout=timeout_of(run), gradient_as_bucket_view=True)  # no second copy of the gradients


def build_fsdp(run: RunConfig) -> Strategy:
    return FSDP(data_parallel_size=world_size(run), tensor_parallel_size=1, timeout=timeout_of(run))


def build_zero(stage: int, run: RunConfig) -> Strategy:
    from lit_transdiff.distributed.zero import ZeRO  # DeepSpeed takes seconds to import

    on_cpu, bf16 = accelerator_and_devices(run)[0] == "cpu", precision_of(run) != "32-true"
    micro = micro_batch_size(run)
    return ZeRO(stage, run.distributed, micro_batch=micro, on_cpu=on_cpu, bf16=bf16, timeout=timeout_of(run))


DeepSpeed = partial(StrategyKind, cuts_optimizer=True, has_master=True, buffers=BUCKETS, own_autocast=True)
STRATEGIES: dict[str, StrategyKind] = {
    "single": StrategyKind(build_single, lambda weights, gradients, passes: 0.0, alone=True, takes_muon=True),
    # Gradients are reduced once per step.
    "ddp": StrategyKind(build_ddp, lambda weights, gradients, passes: 2 * gradients, takes_muon=True),
    # Gradients are reduced to their owners once per step, then the updated weights are gathered.
    "zero1": DeepSpeed(
        partial(build_zero, 1),
        lambda weights, gradients, passes: gradients + weights,
        keeps_reduced=True,
        takes_muon=True,
        offloads=("none", "cpu"),
    ),
    # Gradients are reduced in every pass.
    "zero2": DeepSpeed(
        partial(build_zero, 2),
        lambda weights, gradients, passes: passes * gradients + weights,
        cuts_gradients=True,
        offloads=("none", "cpu"),
    ),
    # Weights are gathered for the forward and backward computation of every pass.
    "zero3": DeepSpeed(
        partial(build_zero, 3),
        lambda weights, gradients, passes: passes * (2 * weights + gradients),
        cuts_weights=True,
        cuts_gradients=True,
        offloads=("none", "cpu", "nvme"),
        offloads_parameters=True,
    ),
    "fsdp": StrategyKind(
        build_fsdp,
        lambda weights, gradients, passes: passes * (2 * weights + gradients),
        cuts_weights=True,
        cuts_gradients=True,
        cuts_optimizer=True,
        takes_muon=True,
    ),
}
EVERYWHERE = ("auto", "fp32", "bf16-mixed")  # precisions that every strategy supports


def whole_strategies() -> list[str]:
    """The strategies with whole parameters on every device; they support all stages and precisions."""
    return [name for name, kind in STRATEGIES.items() if kind.whole]


def strategy_name(run: RunConfig) -> str:
    """The strategy, with ``auto`` resolved: ``single`` on one device, ``ddp`` on several."""
    name, world = run.distributed.strategy, world_size(run)
    if name == "auto":
        name = "single" if world == 1 else "ddp"
    if name not in STRATEGIES:
        raise unknown("distributed.strategy", name, ["auto", *STRATEGIES])
    kind, wholes = STRATEGIES[name], whole_strategies()
    require(not kind.alone or world == 1, "distributed.strategy", name, f"ddp on {world} devices")
    allowed = f"{' or '.join(wholes)} in stage {run.stage}"
    require(kind.whole or run.stage not in PREPARATORY, "distributed.strategy", name, allowed)
    precision = run.training.precision
    allowed = f"{EVERYWHERE} with strategy {name}"
    require(kind.whole or precision in EVERYWHERE, "training.precision", precision, allowed)
    offload, places = run.distributed.offload, " or ".join(map(repr, kind.offloads))
    require(offload in kind.offloads, "distributed.offload", offload, f"{places} with strategy {name}")
    parameters = run.distributed.offload_parameters
    possible = not parameters or kind.offloads_parameters
    require(possible, "distributed.offload_parameters", parameters, f"false with strategy {name}")
    fits = run.training.kernels is not True or name != "zero3"  # zero3 gathers weights layer by layer
    require(fits, "training.kernels", True, f"'auto' or false with strategy {name}")
    fits = run.training.cuda_graphs is not True or kind.whole
    require(fits, "training.cuda_graphs", True, f"'auto' or false with strategy {name}")
    if run.optimizer.name == "muon":
        takers = [taker for taker, other in STRATEGIES.items() if other.takes_muon]
        allowed = f"{', '.join(takers)} with optimizer.name=muon"
        require(kind.takes_muon, "distributed.strategy", name, allowed)
        require(offload == "none", "distributed.offload", offload, "'none' with optimizer.name=muon")
    return name


def check_distributed(run: RunConfig) -> None:
    """Refuse strategies, batches and offloading that are impossible here."""
    strategy_name(run)
    micro_batch_size(run)
    if run.distributed.offload == "nvme":
        from lit_transdiff.distributed.zero import check_nvme

        check_nvme(run.distributed, on_cpu=accelerator_and_devices(run)[0] == "cpu")


def trainer_settings(run: RunConfig) -> dict[str, Any]:
    """The device-dependent arguments of the Trainer."""
    accelerator, devices = accelerator_and_devices(run)
    kind = STRATEGIES[strategy_name(run)]
    if accelerator == "gpu" and world_size(run) > 1:
        record_collectives(run.folder)
    join("nccl" if accelerator == "gpu" else "gloo", timeout_of(run))
    plain_slurm = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return dict(
        plugins=[SLURMEnvironment(auto_requeue=False)] if plain_slurm else None,  # requeueing: see preemption
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes(run),
        strategy=kind.build(run),
        precision="32-true" if kind.own_autocast else precision_of(run),
        accumulate_grad_batches=accumulation(run),
    )
