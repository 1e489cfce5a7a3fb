"""Standard errors of scores over the sampled images of one evaluation.

They do not include the variation between training seeds. Shapes: N images, D features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lit_transdiff.evaluation.moments import Gaussian, frechet, gaussian_of
from lit_transdiff.evaluation.scores import Score, value
from lit_transdiff.evaluation.statistics import Statistics

GROUPS = 20  # groups of images for the jackknife
MOST_FEATURES = 512  # with more features, each distance of the jackknife takes minutes
OF_DRAWN, OF_REAL = ("precision", "class_accuracy"), ("recall",)  # fractions of sampled and of real images


def standard_errors(
    scores: Mapping[str, Score], features: Tensor, labels: Tensor, reference: Statistics | None
) -> dict[str, float]:
    """Standard errors of the fractions and the Frechet distance among ``scores`` of N images."""
    counts = dict.fromkeys(OF_DRAWN, len(features))
    if reference is not None and reference.has_features:
        counts |= dict.fromkeys(OF_REAL, reference.num_features)
    found = {
        name: error_of_share(value(scores[name]), count) for name, count in counts.items() if name in scores
    }
    if (
        "frechet_distance" in scores
        and reference is not None
        and features.shape[1] <= MOST_FEATURES
        and len(features) > GROUPS
    ):
        found["frechet_distance"] = error_of_distance(features, labels, reference.gaussian)
    return found


def error_of_share(share: float, count: int) -> float:
    """The Agresti-Coull (1998) error of a fraction of ``count`` images, which is above 0 even at 0 and 1."""
    p = (share * count + 2) / (count + 4)
    return math.sqrt(p * (1 - p) / (count + 4))


def error_of_distance(features: Tensor, labels: Tensor, real: Gaussian) -> float:
    """The jackknife error over GROUPS groups of images, each with an equal part of every class."""
    group = torch.empty_like(labels)
    group[labels.argsort(stable=True)] = torch.arange(len(labels)) % GROUPS
    without = torch.tensor(
        [frechet(gaussian_of([features[group != g]]), real) for g in range(GROUPS)], dtype=torch.float64
    )
    return math.sqrt((GROUPS - 1) * float(without.var(correction=0)))
