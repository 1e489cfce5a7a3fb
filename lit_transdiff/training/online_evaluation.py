"""Scores during training: images of the averaged weights, without any effect on training.

Shapes: N images, B images of a batch, K batches per rank, W ranks, D numbers per row.
"""

from __future__ import annotations

import dataclasses
import math

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from einops import rearrange
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lit_transdiff.config import RunConfig
from lit_transdiff.evaluation.extractor import Features
from lit_transdiff.evaluation.job import Job, draw_batch, prepare_job, score, with_reference
from lit_transdiff.evaluation.scores import FOLDER, value
from lit_transdiff.sampling.generator import Generator
from lit_transdiff.stages.base import TransDiffStage, log_now
from lit_transdiff.training.rhythm import StepCallback


class OnlineEvaluation(StepCallback):
    """Log ``online/<metric>`` of ``online_images`` images every ``evaluation.every`` steps and at the end.

    Images are sampled by the run's ``sampling`` settings with the same labels and seeds each time, and scored
    as by ``evaluate``. Batches are divided among the ranks; every rank then has all features and computes the
    scores. The global random generators, the weights and their averages are restored bit for bit.

    Before each batch all ranks check whether the run was asked to stop. If so, the scores are postponed to
    the next start of the run, before its first step. Those of the last step are completed, because no next
    start follows.

    Raises ``ValueError`` at construction for settings that cannot be scored.
    """

    def __init__(self, generator: Generator, run: RunConfig) -> None:
        self.folder = run.folder / FOLDER
        settings = dataclasses.replace(
            run.evaluation, num_images=run.evaluation.online_images, extractors=[], weights={}
        )
        self.job = prepare_job(generator, settings, run.sampling)
        self.postponed = False  # scores of the last step were left to the next start

    def state_dict(self) -> dict[str, bool]:
        return {"due": self.postponed}

    def load_state_dict(self, state: dict[str, bool]) -> None:
        self.postponed = state["due"]

    def on_fit_start(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        self.job.extractor.to(stage.device)
        self.job.generator.autoencoder.to(stage.device)
        self.job = with_reference(self.job, self.folder)

    def on_train_start(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        if self.postponed:
            self.log_scores(trainer, stage)

    def after_step(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        if self.rhythm.due("scores"):
            with self.rhythm.resting():
                self.log_scores(trainer, stage)

    def log_scores(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        """Score the averaged weights, unless the run was asked to stop."""
        assert isinstance(stage, TransDiffStage)
        with isolate_rng():
            model = stage.averaged_model()  # a copy, because a rank may have only a part of the weights
            scores = self.scores(
                trainer, dataclasses.replace(self.job, generator=self.job.generator.of(model))
            )
        self.postponed = scores is None
        if scores is not None:
            log_now(trainer, {f"online/{name}": value for name, value in scores.items()})

    @torch.no_grad()
    def scores(self, trainer: pl.Trainer, job: Job) -> dict[str, float] | None:
        """The scores of ``job`` by name (their means), or None if the run was asked to stop."""
        world, images = trainer.world_size, range(job.settings.num_images)
        batches = [
            images[first : first + job.settings.batch_size] for first in images[:: job.settings.batch_size]
        ]
        # A rank without a batch repeats the first one; its results are cut off behind the last image.
        mine = batches[trainer.global_rank :: world] or batches[:1]
        drawn = []
        for turn in range(math.ceil(len(batches) / world)):  # the same number on all ranks
            if trainer.global_step < trainer.max_steps and self.rhythm.asked_to_stop(trainer):
                return None
            drawn += [draw_batch(job, batch).features[0] for batch in mine[turn : turn + 1]]

        def all_ranks(rows: list[Tensor | None]) -> Tensor | None:
            present = [part for part in rows if part is not None]
            if not present:
                return None
            return gathered(present, job.settings.batch_size, len(batches), trainer)[: len(images)]

        features, logits, spatial = map(all_ranks, map(list, zip(*drawn, strict=True)))
        assert features is not None
        measured = score(job, [Features(features, logits)], [] if spatial is None else [spatial])
        return {name: value(score) for name, score in measured.scores.items()}


def gathered(rows: list[Tensor], batch_size: int, num_batches: int, trainer: pl.Trainer) -> Tensor:
    """The batches [B, D] of all ranks in image order: batch k of rank w is k W + w; padding is last."""
    world = trainer.world_size
    full = torch.stack([F.pad(part, (0, 0, 0, batch_size - len(part))) for part in rows])
    full = F.pad(full, (0, 0, 0, 0, 0, math.ceil(num_batches / world) - len(full)))
    everything = trainer.strategy.all_gather(full) if world > 1 else full[None]
    return rearrange(everything, "w k b d -> (k w b) d")
