"""The storage of a stage's tensors under our strategies and Lightning's, for averages and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_transdiff.checkpoints.averages import EMA, Averages, Holder, Piece, flat
from lit_transdiff.config import require
from lit_transdiff.models.execution import shard_blocks
from lit_transdiff.models.paradigm import Paradigm

TENSORS_AT_ONCE = 64  # tensors whose differences are in memory together


def shard_piece(name: str, p: DTensor, rank: int, world: int) -> Piece:
    """This rank's elements of a row-sharded parameter; the first ranks have ceil(rows / world) rows."""
    rows, row = p.shape[0], p.numel() // p.shape[0]
    each = -(-rows // world)
    return Piece(name, min(rank * each, rows) * row, 0, p.to_local().numel())


class Holders(Averages):
    """The storage of whole and row-sharded parameters; other strategies override ``holders``."""

    lightning_module: pl.LightningModule | None
    optimizers: list[Optimizer]
    global_rank: int
    world_size: int

    def holders(self) -> Iterator[Holder]:
        """The stored tensors: of whole parameters each rank owns its share, of sharded ones its rows."""
        for i, (name, p) in enumerate(self.stage.named_parameters()):
            if isinstance(p, DTensor):
                yield Holder(p, (shard_piece(name, p, self.global_rank, self.world_size),))
            else:
                yield Holder(
                    p, (Piece(name, 0, 0, p.numel()),), owned=i % self.world_size == self.global_rank
                )

    def refresh(self) -> None:
        """Update the model from the holders; no action where they are the model's own tensors."""

    def shard(self, model: Paradigm) -> None:
        """Shard a new model; only FSDP does so here."""

    @property
    def stage(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def optimizer(self) -> Optimizer:
        return cast(Optimizer, getattr(self.optimizers[0], "optimizer", self.optimizers[0]))

    @torch.no_grad()
    def average_distance(self) -> Tensor:
        """[2]: squared distance of weights and averages, and squared norm of the weights, of this rank."""
        sums, states = torch.zeros(2, device=self.stage.device), self.optimizer.state
        averaged = [
            (flat(holder.tensor).float(), flat(states[holder.tensor][EMA]))
            for holder in self.holders()
            if holder.owned and EMA in states.get(holder.tensor, {})
        ]
        for first in range(0, len(averaged), TENSORS_AT_ONCE):
            weights, averages = zip(*averaged[first : first + TENSORS_AT_ONCE], strict=True)
            apart = torch._foreach_sub(weights, averages)
            norms = [torch.stack(torch._foreach_norm(tensors)) for tensors in (apart, weights)]
            sums += torch.stack(norms).square().sum(1).to(sums)
        return sums

    def gradient_norm(self) -> Tensor | None:
        """The norm of all gradients together, before clipping and the step."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.stage.parameters() if p.grad is not None])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def gradient_norm_of_step(self) -> Tensor | None:
        """The gradients' norm, for strategies that know it only after the step."""
        return None


class StockHolders(Holders):
    """The storage of Lightning's own strategies."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self.strategy: Any = trainer.strategy
        self.lightning_module, self.optimizers = trainer.lightning_module, trainer.optimizers
        self.global_rank, self.world_size = trainer.global_rank, trainer.world_size

    def shard(self, model: Paradigm) -> None:
        if isinstance(self.strategy, ModelParallelStrategy):
            mesh = self.strategy.device_mesh["data_parallel"]
            allowed = f"{self.world_size}, and tensor_parallel_size=1: each layer is on one device"
            fits = mesh.size() == self.world_size
            require(fits, "ModelParallelStrategy(data_parallel_size)", mesh.size(), allowed)
            shard_blocks(model, mesh)


def averages_of(trainer: pl.Trainer) -> Holders:
    """The averages of a trainer's stage. Raises ``ValueError`` if its strategy hides the tensors."""
    strategy = trainer.strategy
    if isinstance(strategy, Holders):
        return strategy
    known = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy)
    if not known or isinstance(strategy, DeepSpeedStrategy):
        raise ValueError(
            f"Trainer(strategy): got {type(strategy).__name__}, which hides the averages of the weights; "
            "allowed: one device, 'ddp', ModelParallelStrategy, or lit_transdiff.train with "
            "distributed.strategy zero1, zero2, zero3 or fsdp."
        )
    return StockHolders(trainer)
