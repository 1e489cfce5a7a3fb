"""Stage 2: train the decoder alone on the frozen encoder (new resolution, new latents, longer training)."""

from __future__ import annotations

from lit_transdiff.config import PARADIGMS, RunConfig, require
from lit_transdiff.models.paradigm import network_of
from lit_transdiff.stages.base import TransDiffStage


class DiffusionHead(TransDiffStage):
    """Train only the head; all other weights are frozen and, by default, their dropout is off.

    Labels are still dropped, so that the head keeps learning the unconditional prediction.
    """

    head_alone = True

    @classmethod
    def check(cls, run: RunConfig) -> None:
        families = [name for name in PARADIGMS if network_of(name).head_prefixes]
        allowed = f"{', '.join(families)} in stage diffusion_head, which have a head of their own"
        require(run.model.paradigm in families, "model.paradigm", run.model.paradigm, allowed)
        super().check(run)
        allowed = "a trained run in stage diffusion_head: its encoder is frozen"
        require(run.init_from is not None, "init_from", run.init_from, allowed)

    def prepare(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.startswith(self.model.head_prefixes))

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        for name, module in self.model.named_modules():
            if name and not f"{name}.".startswith(self.model.head_prefixes):
                module.training = self.run.training.frozen_dropout
