"""Preparation: train the judge, used only for scoring, to name the class and the distortion of an image.

A network that only names classes becomes blind to noise and scratches, because they do not change the class.
The judge therefore also learns the strength of synthetic distortions, like networks for blind image quality
(arXiv 1907.02665). The layer for them is not exported: scores use the features below it.

Shapes: B batch, C image channels, H W pixels. Images are in [-1, 1]. Strengths [B] are in [0, 1]; 0 is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_transdiff.config import RunConfig
from lit_transdiff.models.classifier import Judge
from lit_transdiff.stages.classifier import ClassifierStage

SHARE = 0.3  # the share of the images that each kind of distortion changes
# the weight of the strengths' squared errors, summed over kinds, relative to the cross-entropy
DISTORTION_WEIGHT = 4.0


def noise(images: Tensor, strength: Tensor) -> Tensor:
    """Gaussian noise of a standard deviation up to 0.2."""
    return images + 0.2 * strength * torch.randn_like(images)


def blur(images: Tensor, strength: Tensor) -> Tensor:
    """The mean of 3 x 3 pixels, mixed with the image."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    return torch.lerp(images, F.avg_pool2d(padded, 3, stride=1), strength)


def scratches(images: Tensor, strength: Tensor) -> Tensor:
    """Two darker rows or columns, by up to 0.8."""
    size = images.shape[-1]
    places = torch.randint(size, (len(images), 2), device=images.device)
    rows = F.one_hot(places, size).sum(1).clamp(max=1)[:, None, :, None]
    lines = torch.where(torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5, rows, rows.mT)
    return images - 0.8 * strength * lines * (images > -0.9)


def patch(images: Tensor, strength: Tensor) -> Tensor:
    """A square of another image, a third of the width wide, mixed with the image."""
    size = images.shape[-1]
    corner = torch.randint(size - size // 3, (2, len(images), 1), device=images.device)
    place = torch.arange(size, device=images.device)
    rows, columns = (place >= corner) & (place < corner + size // 3)
    square = (rows[:, :, None] & columns[:, None, :])[:, None]
    return torch.lerp(images, images.roll(1, 0), strength * square)


DISTORTIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (patch, blur, scratches, noise)


def distorted(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W] with random distortion, and its strengths [B, kinds]."""
    chosen = torch.rand(len(images), len(DISTORTIONS), device=images.device) < SHARE
    strengths = chosen * torch.rand(chosen.shape, device=images.device)
    for distortion, strength in zip(DISTORTIONS, strengths.T, strict=True):
        images = distortion(images, strength[:, None, None, None])
    return images.clamp(-1, 1), strengths


class JudgeStage(ClassifierStage):
    """Cross-entropy of the classes plus squared errors of the strengths of distortion."""

    network = Judge

    def __init__(self, run: RunConfig | Mapping[str, Any]) -> None:
        super().__init__(run)
        self.distortion_head = nn.Linear(self.network.num_features, len(DISTORTIONS))
        nn.init.zeros_(self.distortion_head.weight)

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        images, strengths = distorted(batch.values[:, 0])
        features = self.classifier.features(images)
        logits = self.classifier.head(self.classifier.dropout(features))
        classes = F.cross_entropy(logits, batch.labels, label_smoothing=0.05)
        errors = (self.distortion_head(features) - strengths).square().sum(dim=1)
        return classes + DISTORTION_WEIGHT * errors.mean()
