"""A profile of some steps of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_transdiff.base.profile import Profile
from lit_transdiff.data.datamodule import Batch
from lit_transdiff.training.rhythm import StepCallback


class ProfileSteps(StepCallback):
    """Profile the first rank from the first to the last of ``steps``, both included.

    A run that ends or stops before the last of them writes what it has recorded.
    """

    def __init__(self, steps: Sequence[int], folder: Path) -> None:
        self.first, self.last = steps
        self.folder = folder / f"steps-{self.first}-{self.last}"
        self.profile: Profile | None = None

    def before_pass(self, trainer: pl.Trainer, stage: pl.LightningModule, batch: Batch) -> None:
        recording = self.profile is not None
        if trainer.is_global_zero and not recording and self.first <= trainer.global_step + 1 <= self.last:
            self.profile = Profile(self.folder)
            self.profile.start()

    def after_step(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        if trainer.global_step >= self.last:
            self.write()

    def finish(self, trainer: pl.Trainer) -> None:
        self.write()

    def on_exception(self, trainer: pl.Trainer, stage: pl.LightningModule, exception: BaseException) -> None:
        self.write()

    def write(self) -> None:
        if self.profile is None:
            return
        with self.rhythm.resting():
            self.profile.stop()
        self.profile = None
        rank_zero_info(f"profile of steps {self.first} to {self.last}: {self.folder}")
