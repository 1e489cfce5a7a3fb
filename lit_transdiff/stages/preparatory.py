"""What is trained once a data set, before the stages: the base of an autoencoder's training and a classifier's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lit_transdiff.base.randomness import mix
from lit_transdiff.config import RunConfig, require
from lit_transdiff.stages.base import Stage, log_now
from lit_transdiff.stages.optim import lr_factor


class PreparatoryStage(Stage, ABC):
    """What such stages share: AdamW over all parameters, and its schedule. The last weights are exported."""

    uses_labels = True  # so that held-out classes must be those that are trained on

    @classmethod
    def check(cls, run: RunConfig) -> None:
        super().check(run)
        optimizer = run.optimizer.name
        require(optimizer == "adamw", "optimizer.name", optimizer, f"'adamw' in stage {run.stage}")
        policy, factor, frozen = run.safety.on_bad_step, run.safety.spike_factor, run.training.frozen_dropout
        require(policy == "stop", "safety.on_bad_step", policy, f"'stop' in stage {run.stage}")
        require(factor == 0, "safety.spike_factor", factor, f"0 in stage {run.stage}")
        require(not frozen, "training.frozen_dropout", frozen, f"false in stage {run.stage}, which freezes nothing")

    @abstractmethod
    def export(self, folder: Path, batches: Iterable[Any]) -> None:
        """Write what was trained to ``folder``, which exists on the first rank, the only one that writes.

        ``batches`` of the training data, in their order from the start, have ``values`` [B, R, C, H, W] and are read on demand.
        """

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        """Posterior noise and dropout are functions of the step and the rank, so that a resumed run goes on exactly."""
        micro_step = batch_index % self.trainer.accumulate_grad_batches
        torch.manual_seed(mix(self.run.seed, self.run.stage, self.global_step, micro_step, self.global_rank))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        self.log_loss(outputs["loss"] * self.trainer.accumulate_grad_batches, len(batch.labels))  # Lightning has divided it

    def on_validation_end(self) -> None:
        if not self.logs_itself:
            log_now(self.trainer, {k: float(v) for k, v in self.trainer.callback_metrics.items() if k.startswith("val/")})

    def configure_optimizers(self) -> Any:
        config, steps = self.run.optimizer, self.run.training.max_steps
        betas = (config.betas[0], config.betas[1])
        optimizer = torch.optim.AdamW(self.parameters(), config.lr, betas, config.eps, config.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps, config))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
