"""Groups of images for the uncertainty of scores: the delete-group jackknife, and disjoint parts.

A plain bootstrap does not work for distances between distributions: an image drawn twice adds nothing, so a
resample has the bias of fewer images on top of that of the original. Shapes: N images, K groups.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GROUPS = (20, 30, 40, 50)  # numbers of groups, the first that divides the images of a class
DISJOINT_PARTS = 10  # disjoint parts of the images, each of whole groups


def groups_of(labels: Tensor, *, balanced: bool = True, rows: int = 1) -> Tensor | None:
    """The group [N] of every image, or None for too few images.

    With ``balanced`` labels [N] every group has the same number of each class, up to one image. Random labels
    are in random order already, and their groups are random. ``rows`` consecutive images, which depend on
    each other, stay together.
    """
    labels = labels[::rows]
    smallest = int(labels.bincount()[labels.unique()].min())
    count = next((number for number in GROUPS if balanced and smallest % number == 0), GROUPS[0])
    if len(labels) < 2 * count:
        return None
    group = torch.empty_like(labels)
    order = labels.argsort(stable=True) if balanced else torch.arange(len(labels))
    group[order] = torch.arange(len(labels)) % count
    return group.repeat_interleave(rows)


def number_of_groups(group: Tensor) -> int:
    return int(group.max()) + 1 if len(group) else 0


def jackknife_error(without: Tensor) -> float:
    """The standard error of a score from its values [K] without each group."""
    return math.sqrt((len(without) - 1) * float(without.double().var(correction=0)))


def jackknife_limit(score: float, without: Tensor) -> float:
    """The score for infinitely many images, if its bias falls as 1/N: K T - (K - 1) mean T_k."""
    count = len(without)
    return count * score - (count - 1) * float(without.double().mean())


def checked_limit(values: Tensor, half: Tensor) -> float | None:
    """The limit from a score and its values [1 + K], unless half of the images have another limit.

    With too few images for the number of features the bias does not fall as 1/N yet. Then the limit of the
    ``half`` (values [1 + K/2]) lies more than two standard errors away, and None is returned.
    """
    limit, of_half = (jackknife_limit(float(each[0]), each[1:]) for each in (values, half))
    return limit if abs(of_half - limit) <= 2 * jackknife_error(values[1:]) else None


def mean_error(parts: Tensor) -> float:
    """The standard error of the mean of a score's values on disjoint parts."""
    return float(parts.double().std()) / math.sqrt(len(parts))
