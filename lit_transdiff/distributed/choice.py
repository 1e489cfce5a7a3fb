"""The strategy of a run: chosen by name, checked against the rest of the run, and handed to Lightning."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from lit_transdiff.config import RunConfig, require, unknown
from lit_transdiff.distributed.kinds import EVERYWHERE, STRATEGIES, whole_strategies
from lit_transdiff.distributed.restarts import join
from lit_transdiff.distributed.world import (
    accumulation,
    devices_of,
    micro_batch_size,
    num_nodes,
    precision_of,
    timeout_of,
    world_size,
)
from lit_transdiff.stages import PREPARATORY


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
    require(kind.whole or precision in EVERYWHERE, "training.precision", precision, f"{EVERYWHERE} with strategy {name}")
    offload, places = run.distributed.offload, " or ".join(map(repr, kind.offloads))
    require(offload in kind.offloads, "distributed.offload", offload, f"{places} with strategy {name}")
    parameters = run.distributed.offload_parameters
    possible = not parameters or kind.offloads_parameters
    require(possible, "distributed.offload_parameters", parameters, f"false with strategy {name}")
    return name


def check_spread(run: RunConfig) -> None:
    """Refuse a strategy, batch or offload that is not possible here."""
    strategy_name(run)
    micro_batch_size(run)
    if run.distributed.offload == "nvme":
        from lit_transdiff.distributed.zero import check_nvme

        check_nvme(run.distributed, on_cpu=devices_of(run)[0] == "cpu")


def trainer_settings(run: RunConfig) -> dict[str, Any]:
    """The part of the Trainer's arguments that depends on devices."""
    accelerator, devices = devices_of(run)
    kind = STRATEGIES[strategy_name(run)]
    join("nccl" if accelerator == "gpu" else "gloo", timeout_of(run))
    plain_slurm = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return dict(
        plugins=[SLURMEnvironment(auto_requeue=False)] if plain_slurm else None,  # see preemption
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes(run),
        strategy=kind.build(run),
        precision="32-true" if kind.own_autocast else precision_of(run),
        accumulate_grad_batches=accumulation(run),
    )
