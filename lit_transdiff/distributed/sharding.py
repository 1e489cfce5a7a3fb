"""The checkpoints of all strategies, derived from their tensor storage; each can resume the others'.

Lightning's own ``ModelCheckpoint`` works as well if every rank has unsharded tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_transdiff.checkpoints.averages import EMA, flat, parameter_shapes
from lit_transdiff.checkpoints.format import TRAINING, WEIGHT, Checkpoint, open_checkpoint, slice_key
from lit_transdiff.stages.holders import Holders


class Sharding(Holders):
    """Mixin of the strategies: tensor storage (``Holders``) and checkpoints."""

    is_whole: ClassVar[bool] = False  # whether every rank has unsharded tensors
    restore_checkpoint_after_setup = True
    lightning_restore_optimizer = False  # true once a file of Lightning's own is loaded
    without_tensors = False  # true while Lightning's checkpoint is made without tensors

    @torch.no_grad()
    def slices(self) -> dict[str, Tensor]:
        """CPU copies of all tensors that this rank saves."""
        copies = {}
        for holder in self.holders():
            states = self.optimizer.state.get(holder.tensor, {})
            for state, value in {WEIGHT: holder.tensor, **states}.items():
                for piece in holder.pieces if holder.owned else ():
                    if not torch.is_tensor(value) or value.shape != holder.tensor.shape:
                        part = torch.as_tensor(value).reshape(1)
                    else:
                        part = flat(value)[piece.offset : piece.offset + piece.length]
                    copies[slice_key(piece.name, state, piece.start)] = part.float().cpu().clone()
        return copies

    @torch.no_grad()
    def load_slices(self, checkpoint: Checkpoint) -> None:
        """Fill all holders and their optimizer states from a checkpoint, whatever wrote it."""
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
        """A state of the optimizer, created if missing."""
        states = self.optimizer.state[tensor]
        if state not in states:
            dtype = torch.float32 if state.startswith(EMA) else tensor.dtype
            counter = state == "step"  # a fused optimizer counts on the device
            states[state] = (
                torch.zeros((), device=tensor.device) if counter else torch.zeros_like(tensor, dtype=dtype)
            )
        return cast(Tensor, states[state])

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Restore model and optimizer; the returned state restores Lightning's loops and callbacks.

        A file of Lightning's ``ModelCheckpoint`` is returned as it is, and Lightning restores from it.
        """
        if Path(checkpoint_path).is_file() and self.is_whole:
            self.lightning_restore_optimizer = True
            return super().load_checkpoint(checkpoint_path, weights_only)  # type: ignore[misc]
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
        """The state of training without weights and optimizer states."""
        with self.tensors_left_out():
            state = dict(self.stage.trainer._checkpoint_connector.dump_checkpoint(weights_only=False))
        # ours are stored separately
        for name in ("state_dict", "optimizer_states", "hparams_name", "hyper_parameters"):
            state.pop(name, None)
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        buffers = {name: value.detach().cpu().clone() for name, value in self.buffers().items()}
        return {**state, "param_groups": groups, "buffers": buffers}

    @contextmanager
    def tensors_left_out(self) -> Iterator[None]:
        """Keep tensors out of Lightning's checkpoint in the block; ours store them as slices."""
        self.without_tensors = True
        try:
            yield
        finally:
            self.without_tensors = False

    # Called for Lightning's own checkpoints.
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {} if self.without_tensors else self.whole_tensors().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return {} if self.without_tensors else self.whole_tensors().optimizer_state(optimizer)

    def whole_tensors(self) -> Any:
        """Lightning's base strategy. Raises ``ValueError`` if tensors are sharded."""
        if not self.is_whole:
            raise ValueError(
                f"ModelCheckpoint, Trainer.save_checkpoint: strategy {type(self).__name__} holds tensors in "
                "parts, which they would leave out; allowed: the checkpoints that lit_transdiff.train "
                "writes by itself, or strategy single or ddp."
            )
        return super()

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        if "state_dict" in checkpoint:
            self.whole_tensors().load_model_state_dict(checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        if "optimizer_states" in checkpoint:
            self.whole_tensors().load_optimizer_state_dict(checkpoint)


def check_shapes(checkpoint: Checkpoint, shapes: dict[str, list[int]]) -> None:
    """Refuse a checkpoint of a model with other shapes."""
    saved = checkpoint.shapes
    for name in saved.keys() | shapes.keys():
        if saved.get(name) != shapes.get(name):
            raise ValueError(
                f"{checkpoint.folder / TRAINING}: {name}: {saved.get(name)} there, {shapes.get(name)} here."
            )


def place_loops(loop: dict[str, Any], micro_steps: int) -> None:
    """Set Lightning's counters to the end of micro-step ``micro_steps`` of the single epoch of a run.

    The checkpoint's counters depend on its accumulation, which may differ from that of this run.
    """
    epoch = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    batch = {
        "ready": micro_steps,
        "started": micro_steps,
        "processed": micro_steps,
        "completed": micro_steps - 1,
    }
    loop["epoch_progress"].update(total=dict(epoch), current=dict(epoch))
    loop["epoch_loop.batch_progress"].update(total=dict(batch), current=dict(batch), is_last_batch=False)
