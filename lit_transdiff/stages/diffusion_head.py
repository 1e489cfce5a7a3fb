"""Stage 2: the decoder alone, on the features of a frozen encoder (new resolution, new latents, longer training)."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_transdiff.config import RunConfig, require
from lit_transdiff.stages.base import TransDiffStage


class DiffusionHead(TransDiffStage):
    """The encoder's weights, with its position embedding of the context, do not move; its dropout is off unless asked for.

    The label is still dropped, so that the decoder keeps learning the unconditional velocity.
    """

    trains_encoder = False

    @classmethod
    def check(cls, run: RunConfig) -> None:
        super().check(run)
        require(
            run.init_from is not None, "init_from", run.init_from, "a trained run in stage diffusion_head: its encoder is frozen"
        )

    def prepare(self) -> None:
        self.model.encoder.requires_grad_(False)

    def context(self, labels: Tensor, references: Tensor, drop: Tensor) -> Tensor:
        with torch.no_grad():
            return super().context(labels, references, drop)

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        self.model.encoder.train(self.run.training.frozen_dropout)
