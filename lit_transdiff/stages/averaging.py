"""The averages of the weights while a stage trains: swapped in, measured and gathered, under any strategy.

A *holder* is a tensor that this rank updates: a whole parameter, a shard of one, or a flat partition of many. Its *pieces* say
which elements of which parameter it holds. The optimizer keeps its states, the averages among them, in the holder's shape, so
the same few lines serve every strategy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_transdiff.checkpoints.averages import EMA
from lit_transdiff.config import require
from lit_transdiff.models.execution import shard_blocks
from lit_transdiff.models.transdiff import TransDiff


@dataclass(frozen=True)
class Piece:
    """``length`` elements: from ``start`` of a flattened parameter, at ``offset`` of the flattened holder."""

    name: str
    start: int
    offset: int
    length: int


@dataclass(frozen=True)
class Holder:
    """A tensor that this rank updates, and what it holds. ``owned`` is false where another rank holds the same and writes it."""

    tensor: Tensor
    pieces: tuple[Piece, ...]
    owned: bool = True


def flat(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor as a flat view."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().view(-1)


def shard_piece(name: str, p: DTensor, rank: int, world: int) -> Piece:
    """Which elements of a parameter cut by rows this rank holds; the first ranks have ceil(rows / world) rows each."""
    rows, row = p.shape[0], p.numel() // p.shape[0]
    each = -(-rows // world)
    return Piece(name, min(rank * each, rows) * row, 0, p.to_local().numel())


def parameter_shapes(stage: pl.LightningModule) -> dict[str, list[int]]:
    """Parameter -> shape of the whole, also where it is cut (ZeRO-3 keeps the shape aside)."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in stage.named_parameters()}


class Averages:
    """Everything that follows from ``holders``; a strategy that holds tensors in its own way says which, and may ``refresh``."""

    lightning_module: pl.LightningModule | None
    optimizers: list[Optimizer]
    global_rank: int
    world_size: int

    def holders(self) -> Iterator[Holder]:
        """Whole parameters, the same on every rank, each rank answering for its share; of those cut by rows this rank's part."""
        for i, (name, p) in enumerate(self.stage.named_parameters()):
            if isinstance(p, DTensor):
                yield Holder(p, (shard_piece(name, p, self.global_rank, self.world_size),))
            else:
                yield Holder(p, (Piece(name, 0, 0, p.numel()),), owned=i % self.world_size == self.global_rank)

    def refresh(self) -> None:
        """Bring what the model computes with up to date, after holders have changed."""

    def shard(self, model: TransDiff) -> None:
        """Cut a model that has just been made; only FSDP does it here."""

    @property
    def stage(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer itself, without what wraps it."""
        return cast(Optimizer, getattr(self.optimizers[0], "optimizer", self.optimizers[0]))

    def gradient_norm(self) -> Tensor | None:
        """Norm of all gradients together, before clipping and the step."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.stage.parameters() if p.grad is not None])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def gradient_norm_of_step(self) -> Tensor | None:
        """The same after the step, where only then it is known."""
        return None

    @property
    def set_aside(self) -> dict[Tensor, Tensor]:
        """Weights that wait, beside their stage, while the model holds averages that are more precise than they are."""
        return vars(self.stage).setdefault("weights_set_aside", {})

    @torch.no_grad()
    def swap_averages(self) -> None:
        """Exchange weights and averages in place; a second call exchanges them back. Nothing happens before the first step.

        Weights that are less precise than their average are set aside instead: in their place it would be rounded.
        """
        for holder in self.holders():
            average = self.optimizer.state.get(holder.tensor, {}).get(EMA)
            if holder.tensor in self.set_aside:
                flat(holder.tensor).copy_(self.set_aside.pop(holder.tensor))
            elif average is not None:
                weights = flat(holder.tensor).clone()
                flat(holder.tensor).copy_(flat(average))
                if average.dtype == weights.dtype:
                    flat(average).copy_(weights)
                else:
                    self.set_aside[holder.tensor] = weights
        self.refresh()

    @torch.no_grad()
    def average_distance(self) -> Tensor:
        """[2]: squared distance between weights and averages, and squared norm of the weights, of what this rank owns."""
        sums = torch.zeros(2, device=self.stage.device)
        for holder in self.holders():
            average, weights = self.optimizer.state.get(holder.tensor, {}).get(EMA), flat(holder.tensor).float()
            if holder.owned and average is not None:
                sums += torch.stack([(weights - flat(average)).square().sum(), weights.square().sum()]).to(sums)
        return sums

    @torch.no_grad()
    def averaged_state(self) -> dict[str, Tensor]:
        """State dict of the stage with averages for weights, whole and float32 on every rank. All ranks call it together."""
        state = {name: value.detach().clone() for name, value in self.buffers().items()}
        shapes = parameter_shapes(self.stage)
        for name, shape in shapes.items():
            state[name] = torch.zeros(shape, device=self.stage.device)
        for holder in self.holders():
            value = self.optimizer.state.get(holder.tensor, {}).get(EMA, holder.tensor)
            for piece in holder.pieces if holder.owned else ():
                part = flat(value)[piece.offset : piece.offset + piece.length]
                state[piece.name].view(-1)[piece.start : piece.start + piece.length] = part
        if self.world_size > 1:
            for name in shapes:
                torch.distributed.all_reduce(state[name])
        return state

    def buffers(self) -> dict[str, Tensor]:
        """The stage's persistent buffers."""
        names = {name for name, _ in self.stage.named_parameters()}
        return {name: value for name, value in self.stage.state_dict().items() if name not in names and torch.is_tensor(value)}


class StockAverages(Averages):
    """The same for Lightning's own strategies, whose parameters are whole or cut by rows."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self.strategy: Any = trainer.strategy
        self.lightning_module, self.optimizers = trainer.lightning_module, trainer.optimizers
        self.global_rank, self.world_size = trainer.global_rank, trainer.world_size

    def shard(self, model: TransDiff) -> None:
        if isinstance(self.strategy, ModelParallelStrategy):
            mesh = self.strategy.device_mesh["data_parallel"]
            allowed = f"{self.world_size}, and tensor_parallel_size=1: each layer is on one device"
            require(mesh.size() == self.world_size, "ModelParallelStrategy(data_parallel_size)", mesh.size(), allowed)
            shard_blocks(model, mesh)


def averages_of(trainer: pl.Trainer) -> Averages:
    """What swaps and gathers the averages of a trainer's stage. Raises ``ValueError`` for a strategy that hides its tensors."""
    strategy = trainer.strategy
    if isinstance(strategy, Averages):
        return strategy
    known = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy)
    if not known or isinstance(strategy, DeepSpeedStrategy):
        raise ValueError(
            f"Trainer(strategy): got {type(strategy).__name__}, which hides the averages of the weights; allowed: one device, "
            "'ddp', ModelParallelStrategy, or lit_transdiff.train with distributed.strategy zero1, zero2, zero3 or fsdp."
        )
    return StockAverages(trainer)
