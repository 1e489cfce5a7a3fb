"""How far scores move with the images that happen to be drawn: standard errors over those of one evaluation.

They say nothing of how a score moves with the seed of a training. Shapes: N images, D features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lit_transdiff.evaluation.moments import Gaussian, frechet, gaussian_of
from lit_transdiff.evaluation.scores import Score, value
from lit_transdiff.evaluation.statistics import Statistics

GROUPS = 20  # of images, each of which is left out once
MOST_FEATURES = 512  # with more, the distances without a group each take minutes
OF_DRAWN, OF_REAL = ("precision", "class_accuracy"), ("recall",)  # shares of images


def standard_errors(
    scores: Mapping[str, Score], features: Tensor, labels: Tensor, reference: Statistics | None
) -> dict[str, float]:
    """Of those ``scores`` of images with ``features`` [N, D] and ``labels`` [N] that are shares or the Frechet distance."""
    counts = dict.fromkeys(OF_DRAWN, len(features))
    if reference is not None and reference.has_features:
        counts |= dict.fromkeys(OF_REAL, reference.num_features)
    found = {name: error_of_share(value(scores[name]), count) for name, count in counts.items() if name in scores}
    if "frechet_distance" in scores and reference is not None and features.shape[1] <= MOST_FEATURES and len(features) > GROUPS:
        found["frechet_distance"] = error_of_distance(features, labels, reference.gaussian)
    return found


def error_of_share(share: float, count: int) -> float:
    """Of a share of ``count`` independent images, with two more of each kind (Agresti and Coull 1998): above 0 at 0 and 1."""
    p = (share * count + 2) / (count + 4)
    return math.sqrt(p * (1 - p) / (count + 4))


def error_of_distance(features: Tensor, labels: Tensor, real: Gaussian) -> float:
    """The jackknife over GROUPS groups of images, each with an equal part of every class."""
    group = torch.empty_like(labels)
    group[labels.argsort(stable=True)] = torch.arange(len(labels)) % GROUPS
    without = torch.tensor([frechet(gaussian_of([features[group != g]]), real) for g in range(GROUPS)], dtype=torch.float64)
    return math.sqrt((GROUPS - 1) * float(without.var(correction=0)))
