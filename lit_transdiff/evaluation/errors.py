"""The uncertainty of the scores of one evaluation over its sampled images.

It does not include the variation between training seeds. Shapes: N images, K groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lit_transdiff.evaluation.functions import Scored
from lit_transdiff.evaluation.groups import jackknife_error, number_of_groups
from lit_transdiff.evaluation.measure import Measured
from lit_transdiff.evaluation.representations import real_scores
from lit_transdiff.evaluation.scores import Score, value

if TYPE_CHECKING:
    from lit_transdiff.evaluation.job import Job

OF_DRAWN, OF_REAL = ("precision", "class_accuracy"), ("recall", "coverage")  # fractions of images
SIGNIFICANT = 8  # significant ones of the values without each group


def uncertainty(measured: Measured, scored: Sequence[Scored], job: Job) -> dict[str, Any]:
    """The part of a manifest about the uncertainty of scores, and the scores of real images."""
    group = scored[0].group
    real: dict[str, Score] = {}
    for one, generated in zip(job.representations, scored, strict=True):
        real |= real_scores(one, generated, job.settings)
    errors: dict[str, float] = {}
    for one in job.representations:
        counts = dict.fromkeys(OF_DRAWN, len(job.labels))
        if one.reference is not None and one.reference.has_features:
            counts |= dict.fromkeys(OF_REAL, one.reference.num_features)
        errors |= standard_errors(measured, {f"{one.prefix}{name}": n for name, n in counts.items()})
    return {
        "standard_errors": errors,
        "groups": None if group is None else number_of_groups(group),
        "without_group": {name: with_few_digits(values) for name, values in measured.without.items()},
        "parts": {name: with_few_digits(values) for name, values in measured.parts.items()},
        "limits": measured.limits,
        "real_scores": real,
    }


def standard_errors(measured: Measured, counts: Mapping[str, int]) -> dict[str, float]:
    """Standard errors of smooth scores by the jackknife, and of fractions of so many (``counts``) images."""
    shares = {
        name: error_of_share(value(measured.scores[name]), count)
        for name, count in counts.items()
        if name in measured.scores
    }
    smooth = {name: jackknife_error(torch.tensor(values)) for name, values in measured.without.items()}
    return smooth | shares


def error_of_share(share: float, count: int) -> float:
    """The Agresti-Coull (1998) error of a fraction of ``count`` images, which is above 0 even at 0 and 1."""
    p = (share * count + 2) / (count + 4)
    return math.sqrt(p * (1 - p) / (count + 4))


def with_few_digits(values: Sequence[float]) -> list[float]:
    """Values with SIGNIFICANT significant digits, which suffice for their differences."""
    return [float(f"{number:.{SIGNIFICANT}g}") for number in values]
