"""Preparation: train a small classifier on the user's own shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from lit_transdiff.config import RunConfig
from lit_transdiff.models.classifier import Classifier, SmallClassifier, save_classifier
from lit_transdiff.stages.preparatory import PreparatoryStage


class ClassifierStage(PreparatoryStage):
    """Cross-entropy on batches with ``values`` [B, 1, C, H, W] in [-1, 1] and ``labels`` [B]."""

    network: ClassVar[type[Classifier]] = SmallClassifier

    def __init__(self, run: RunConfig | Mapping[str, Any]) -> None:
        super().__init__(run)
        run = self.run
        self.classifier = self.network(run.model.num_classes, run.data.image_size, run.data.image_channels)

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        return F.cross_entropy(self.classifier(batch.values[:, 0]), batch.labels, label_smoothing=0.05)

    def validation_step(self, batch: Any, batch_index: int) -> None:
        correct = self.classifier(batch.values[:, 0]).argmax(dim=1) == batch.labels
        self.log(
            "val/accuracy",
            correct.float().mean(),
            batch_size=len(correct),
            sync_dist=True,
            logger=self.logs_itself,
        )

    def export(self, folder: Path, batches: Iterable[Any]) -> None:
        """Write the network's weights to ``folder`` on the first rank. No batch is read."""
        if self.global_rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            save_classifier(self.classifier.eval(), folder / f"{self.network.kind}.safetensors")
