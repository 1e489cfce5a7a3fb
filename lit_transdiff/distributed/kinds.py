"""What each strategy is: all that the rest of the house knows of it stands in its row of STRATEGIES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from lightning.pytorch.strategies import Strategy

from lit_transdiff.config import RunConfig
from lit_transdiff.distributed.strategies import DDP, FSDP, Single
from lit_transdiff.distributed.world import devices_of, micro_batch_size, precision_of, timeout_of, world_size

BUCKETS = 2 * 200_000_000 * 4.0  # bytes of DeepSpeed's two buffers for gradients on their way


@dataclass(frozen=True)
class Kind:
    """A strategy: how it is built, what it sends, which parts one of n GPUs holds 1 / n of, and what it takes.

    ``sent``: bytes that a GPU sends in a step, of the bytes of a ring over the weights, those of a ring over the gradients, and
    the number of passes.
    """

    build: Callable[[RunConfig], Strategy]
    sent: Callable[[float, float, int], float]
    alone: bool = False  # for one device; the others are for several
    cuts_weights: bool = False
    cuts_gradients: bool = False
    cuts_optimizer: bool = False  # its moments, and the averages of the weights
    has_master: bool = False  # a second float32 copy of the weights, cut, that the optimizer updates
    keeps_reduced: bool = False  # its reduced part of the gradients beside the whole ones
    buffers: float = 0.0  # bytes
    own_autocast: bool = False  # Lightning is told float32
    offloads: tuple[str, ...] = ("none",)  # where it can keep the optimizer's state (distributed.offload)
    offloads_parameters: bool = False

    @property
    def whole(self) -> bool:
        """Whether every device keeps whole parameters and whole optimizer states."""
        return not (self.cuts_weights or self.cuts_gradients or self.cuts_optimizer)


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


DeepSpeed = partial(Kind, cuts_optimizer=True, has_master=True, buffers=BUCKETS, own_autocast=True)
STRATEGIES: dict[str, Kind] = {
    "single": Kind(build_single, lambda weights, gradients, passes: 0.0, alone=True),
    # Gradients are reduced and gathered once a step.
    "ddp": Kind(build_ddp, lambda weights, gradients, passes: 2 * gradients),
    # Gradients go to their owners once a step, then the updated weights to all.
    "zero1": DeepSpeed(
        partial(build_zero, 1),
        lambda weights, gradients, passes: gradients + weights,
        keeps_reduced=True,
        offloads=("none", "cpu"),
    ),
    # Gradients are reduced in every pass.
    "zero2": DeepSpeed(
        partial(build_zero, 2),
        lambda weights, gradients, passes: passes * gradients + weights,
        cuts_gradients=True,
        offloads=("none", "cpu"),
    ),
    # Weights are gathered for both directions of every pass.
    "zero3": DeepSpeed(
        partial(build_zero, 3),
        lambda weights, gradients, passes: passes * (2 * weights + gradients),
        cuts_weights=True,
        cuts_gradients=True,
        offloads=("none", "cpu", "nvme"),
        offloads_parameters=True,
    ),
    "fsdp": Kind(
        build_fsdp,
        lambda weights, gradients, passes: passes * (2 * weights + gradients),
        cuts_weights=True,
        cuts_gradients=True,
        cuts_optimizer=True,
    ),
}
EVERYWHERE = ("auto", "fp32", "bf16-mixed")  # precisions that every strategy has


def whole_strategies() -> list[str]:
    """Those that keep whole parameters on every device: they take every stage and every precision."""
    return [name for name, kind in STRATEGIES.items() if kind.whole]
