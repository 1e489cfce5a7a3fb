"""The base class of preparatory stages, trained once per data set: autoencoder and classifiers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lit_transdiff.base.randomness import mix
from lit_transdiff.config import RunConfig, require
from lit_transdiff.stages.base import Stage, log_now


class PreparatoryStage(Stage, ABC):
    """A preparatory stage: AdamW over all parameters with a schedule. The last weights are exported."""

    uses_labels = True  # True: held-out classes must be those of training

    @classmethod
    def check(cls, run: RunConfig) -> None:
        super().check(run)
        optimizer = run.optimizer.name
        require(optimizer == "adamw", "optimizer.name", optimizer, f"'adamw' in stage {run.stage}")
        policy, factor, frozen = run.safety.on_bad_step, run.safety.spike_factor, run.training.frozen_dropout
        require(policy == "stop", "safety.on_bad_step", policy, f"'stop' in stage {run.stage}")
        require(factor == 0, "safety.spike_factor", factor, f"0 in stage {run.stage}")
        allowed = f"false in stage {run.stage}, which freezes nothing"
        require(not frozen, "training.frozen_dropout", frozen, allowed)

    @abstractmethod
    def export(self, folder: Path, batches: Iterable[Any]) -> None:
        """Write the trained network to ``folder``, which exists on the first rank; only that rank writes.

        ``batches`` of training data, read on demand from the start of their order, have ``values`` [B, R, C,
        H, W].
        """

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        """Seed posterior noise and dropout by step and rank, so that a resumed run continues exactly."""
        micro_step = batch_index % self.trainer.accumulate_grad_batches
        torch.manual_seed(mix(self.run.seed, self.run.stage, self.global_step, micro_step, self.global_rank))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        loss = outputs["loss"] * self.trainer.accumulate_grad_batches  # Lightning has divided it
        self.log_loss(loss, len(batch.labels))

    def on_validation_end(self) -> None:
        if not self.logs_itself:
            values = self.trainer.callback_metrics
            log_now(self.trainer, {name: float(v) for name, v in values.items() if name.startswith("val/")})

    def configure_optimizers(self) -> Any:
        config = self.run.optimizer
        betas = (config.betas[0], config.betas[1])
        optimizer = torch.optim.AdamW(self.parameters(), config.lr, betas, config.eps, config.weight_decay)
        return self.scheduled(optimizer)
