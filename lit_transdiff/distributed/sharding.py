"""What every strategy here can say of its tensors, and what follows from it: checkpoints, averages, changes of strategy.

A *holder* is a float32 tensor that this rank updates: a whole parameter, a shard of one, or a flat partition of many. Its
*pieces* say which elements of which parameter it holds. The optimizer keeps its states in the holder's shape, so saving,
loading, swapping in the average and gathering are the same few lines for every strategy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_transdiff.checkpoints.averages import EMA
from lit_transdiff.checkpoints.format import TRAINING, WEIGHT, Checkpoint, open_checkpoint, slice_key


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


class Sharding:
    """Mixin of the strategies: everything that follows from ``holders``. A subclass may also have to ``refresh``."""

    lightning_module: pl.LightningModule | None
    optimizers: list[Optimizer]
    global_rank: int
    world_size: int

    # Lightning asks these; the checkpoint is written and read here, not by Lightning.
    restore_checkpoint_after_setup = True
    lightning_restore_optimizer = False

    def holders(self) -> Iterator[Holder]:
        """Whole parameters, the same on every rank; each rank writes its share of them."""
        for i, (name, p) in enumerate(self.stage.named_parameters()):
            yield Holder(p, (Piece(name, 0, 0, p.numel()),), owned=i % self.world_size == self.global_rank)

    def refresh(self) -> None:
        """Bring what the model computes with up to date, after holders have changed."""

    def shard(self, model: torch.nn.Module) -> None:
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

    # --- averages -------------------------------------------------------------------------------------------------------------

    @cached_property
    def set_aside(self) -> dict[Tensor, Tensor]:
        """Weights that wait while the model holds averages that are more precise than they are."""
        return {}

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

    # --- checkpoints ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def slices(self) -> dict[str, Tensor]:
        """Copies in CPU memory of everything that this rank writes."""
        found = {}
        for holder in self.holders():
            states = self.optimizer.state.get(holder.tensor, {})
            for state, value in {WEIGHT: holder.tensor, **states}.items():
                for piece in holder.pieces if holder.owned else ():
                    scalar = not torch.is_tensor(value) or value.shape != holder.tensor.shape
                    part = (
                        torch.as_tensor(value).reshape(1) if scalar else flat(value)[piece.offset : piece.offset + piece.length]
                    )
                    found[slice_key(piece.name, state, piece.start)] = part.float().cpu().clone()
        return found

    @torch.no_grad()
    def load_slices(self, checkpoint: Checkpoint) -> None:
        """Fill all holders and their optimizer states from a checkpoint of any strategy and any number of ranks."""
        check_shapes(checkpoint, parameter_shapes(self.stage))
        for holder in self.holders():
            for piece in holder.pieces:
                for state in checkpoint.states(piece.name):
                    target = holder.tensor if state == WEIGHT else self.state_of(holder.tensor, state)
                    if target.shape == holder.tensor.shape:
                        part = checkpoint.read(piece.name, state, piece.start, piece.length)
                        flat(target)[piece.offset : piece.offset + piece.length].copy_(part)
                    else:
                        target.copy_(checkpoint.scalar(piece.name, state))
        self.refresh()

    def state_of(self, tensor: Tensor, state: str) -> Tensor:
        """A state of the optimizer, made if it is not there yet."""
        states = self.optimizer.state[tensor]
        if state not in states:
            dtype = torch.float32 if state.startswith(EMA) else tensor.dtype
            counter = state == "step"  # a fused optimizer counts on the device
            states[state] = torch.zeros((), device=tensor.device) if counter else torch.zeros_like(tensor, dtype=dtype)
        return cast(Tensor, states[state])

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Restore model and optimizer; what is returned restores Lightning's loops, schedules and callbacks."""
        checkpoint = open_checkpoint(Path(checkpoint_path))
        self.load_slices(checkpoint)
        training = checkpoint.training()
        buffers = self.buffers()
        for name, value in training["buffers"].items():
            buffers[name].copy_(value)
        for group, saved in zip(self.optimizer.param_groups, training["param_groups"], strict=True):
            group.update(saved)
        steps = int(training["global_step"])
        place_loops(training["loops"]["fit_loop"], steps * self.stage.trainer.accumulate_grad_batches)
        return training

    def training_state(self) -> dict[str, Any]:
        """Where training stands, without weights and optimizer states."""
        trainer = self.stage.trainer
        state = dict(trainer._checkpoint_connector.dump_checkpoint(weights_only=False))
        del state["state_dict"], state["optimizer_states"]
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        return {**state, "param_groups": groups, "buffers": {k: v.detach().cpu().clone() for k, v in self.buffers().items()}}

    # Lightning's own collection of states: nothing to do.
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return {}

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None: ...

    def load_optimizer_state_dict(self, checkpoint: Any) -> None: ...


def parameter_shapes(stage: pl.LightningModule) -> dict[str, list[int]]:
    """Parameter -> shape of the whole, also where it is cut (ZeRO-3 keeps the shape aside)."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in stage.named_parameters()}


def check_shapes(checkpoint: Checkpoint, shapes: dict[str, list[int]]) -> None:
    """Refuse a checkpoint of another model."""
    saved = checkpoint.shapes
    for name in saved.keys() | shapes.keys():
        if saved.get(name) != shapes.get(name):
            raise ValueError(f"{checkpoint.folder / TRAINING}: {name}: {saved.get(name)} there, {shapes.get(name)} here.")


def place_loops(loop: dict[str, Any], micro_steps: int) -> None:
    """Set Lightning's counters to the state at the end of micro-step ``micro_steps``, in the one epoch that a run is.

    They are saved with the accumulation of then; this run may have another one.
    """
    epoch = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    batch = {"ready": micro_steps, "started": micro_steps, "processed": micro_steps, "completed": micro_steps - 1}
    loop["epoch_progress"].update(total=dict(epoch), current=dict(epoch))
    loop["epoch_loop.batch_progress"].update(total=dict(batch), current=dict(batch), is_last_batch=False)
