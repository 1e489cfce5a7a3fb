"""Steps with a non-finite or spiking loss are reported and skipped or undone, up to a limit."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_transdiff.base.files import read_json, replace_file, sealed
from lit_transdiff.checkpoints.averages import Averaging
from lit_transdiff.config import SafetyConfig
from lit_transdiff.data.datamodule import Batch
from lit_transdiff.data.names import sample_names
from lit_transdiff.training.callbacks import NonFiniteLoss
from lit_transdiff.training.rhythm import StepCallback

log = logging.getLogger(__name__)
HISTORY, ENOUGH = 50, 20  # number of losses for the median, and the minimum


class RollBack(Exception):
    """Training returns to the last checkpoint and will skip the bad step."""


class GuardSteps(StepCallback):
    """Check each step's loss before the update; ranks decide together, by one reduction per step.

    ``skip``: weights, moments and averages are unchanged and the next batch follows. ``roll_back``: training
    returns to the last checkpoint and skips the steps listed in ``bad_steps.json`` of the run folder.
    """

    def __init__(self, safety: SafetyConfig, folder: Path) -> None:
        self.safety = safety
        self.file = folder / "bad_steps.json"
        self.left_out: set[int] = steps_in(self.file)
        self.recent: deque[float] = deque(maxlen=HISTORY)
        self.num_bad = 0
        self.loss: Tensor | None = None
        self.batches: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        return {"recent": list(self.recent), "num_bad": self.num_bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.recent.extend(state["recent"])
        self.num_bad = state["num_bad"]

    def before_pass(self, trainer: pl.Trainer, stage: pl.LightningModule, batch: Batch) -> None:
        self.batches.append(batch.samples)

    def on_before_backward(self, trainer: pl.Trainer, stage: pl.LightningModule, loss: Tensor) -> None:
        self.loss = loss.detach().float() + (0 if self.loss is None else self.loss)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, stage: pl.LightningModule, optimizer: Any
    ) -> None:
        assert self.loss is not None
        own, step = self.loss.item(), self.rhythm.step
        average = trainer.strategy.reduce(torch.nan_to_num(self.loss, nan=math.inf), reduce_op="mean").item()
        median = statistics.median(self.recent) if len(self.recent) >= ENOUGH else math.inf
        spike = self.safety.spike_factor > 0 and average > self.safety.spike_factor * median
        if step in self.left_out:
            self.skip(stage)
        elif not math.isfinite(average) or spike:
            self.react(trainer, stage, step, own, f"{average:.4g}; median before {median:.4g}")
        else:
            self.recent.append(average)

    def after_step(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        self.optimizer(stage).skip_step = False
        self.loss, self.batches = None, []

    def react(self, trainer: pl.Trainer, stage: pl.LightningModule, step: int, own: float, mean: str) -> None:
        """Report the bad step, then stop, skip or roll back."""
        self.num_bad += 1
        samples = torch.cat([samples.flatten() for samples in self.batches])
        shown = sample_names(trainer.datamodule, samples)  # type: ignore[attr-defined]
        bad = max(self.num_bad, len(self.left_out) + 1)
        message = (
            f"bad step {step} ({bad} so far): the loss on rank {trainer.global_rank} is {own:.4g} "
            f"(mean over ranks {mean}). Samples of that batch: {shown}."
        )
        if self.safety.on_bad_step == "stop" or bad > self.safety.max_bad_steps:
            raise NonFiniteLoss(f"{message} Training has stopped (safety.on_bad_step, safety.max_bad_steps).")
        log.warning(message)
        if self.safety.on_bad_step == "skip":
            return self.skip(stage)
        if trainer.is_global_zero:
            replace_file(self.file, sealed({"steps": sorted(self.left_out | {step})}))
        trainer.strategy.barrier()
        raise RollBack(f"going back to the last checkpoint; step {step} will be left out")

    def skip(self, stage: pl.LightningModule) -> None:
        self.optimizer(stage).skip_step = True

    def optimizer(self, stage: pl.LightningModule) -> Averaging:
        """The run's optimizer without the strategy's wrapper."""
        wrapped = stage.optimizers(use_pl_optimizer=False)
        optimizer = getattr(wrapped, "optimizer", wrapped)
        if not isinstance(optimizer, Averaging):
            text = f"got the optimizer {type(optimizer).__name__}; allowed: one of OPTIMIZERS."
            raise ValueError(f"safety.on_bad_step, safety.spike_factor: {text}")
        return optimizer


def steps_in(file: Path) -> set[int]:
    """The steps that a run skips; also reads the format of earlier versions. ``ValueError`` if damaged."""
    content = read_json(file) if file.exists() else []
    steps = content.get("steps") if isinstance(content, dict) else content
    if not isinstance(steps, list) or not all(isinstance(step, int) for step in steps):
        raise ValueError(f"{file}: got {steps!r}; allowed: a list of steps.")
    return set(steps)
