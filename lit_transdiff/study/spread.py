"""The spread of a score over training seeds, and the critical values of its differences.

Shapes: G groups of runs, S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from functools import cache

import numpy as np

from lit_transdiff.base.student import CONFIDENCE
from lit_transdiff.study.repeats import Pooled, over
from lit_transdiff.study.verdicts import NO_DIFFERENCE, in_words


def seed_spread(groups: Sequence[Mapping[Hashable, float]]) -> tuple[float, int]:
    """The standard deviation of a score over seeds, and its degrees of freedom, given its values by seed.

    If all groups have the same seeds, what a seed adds to all of them does not count (two-way analysis of
    variance); else the variances within groups are pooled. Without repeats it is NaN with no freedom.
    """
    if len(groups) > 1 and len({frozenset(group) for group in groups}) == 1 and len(groups[0]) > 1:
        values = np.array([[group[seed] for seed in groups[0]] for group in groups])  # [G, S]
        rest = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
        free = (len(groups) - 1) * (len(groups[0]) - 1)
    else:
        rows = [np.array([*group.values()]) for group in groups]
        rest = np.concatenate([row - row.mean() for row in rows if len(row)])
        free = sum(len(row) - 1 for row in rows if len(row))
    return (math.sqrt(float((rest**2).sum()) / free), free) if free else (math.nan, 0)


@cache
def tukey(groups: int, freedom: int) -> float:
    """The critical value for all differences between means of groups, in standard errors of a difference.

    For two groups it is Student's; NaN without a degree of freedom.
    """
    if freedom == 0:
        return math.nan
    from scipy.stats import studentized_range

    return float(studentized_range.ppf(CONFIDENCE, groups, freedom)) / math.sqrt(2)


def with_verdict(mean: float, std: float, verdict: str, gap: float, noise: float) -> str:
    """Format a mean, as in ``10.5 ± 0.2, no difference above 0.3``."""
    score = Pooled(mean, std if math.isfinite(std) else None, 1)
    word = in_words(verdict, gap, noise) if verdict == NO_DIFFERENCE else verdict
    return f"{score}, {word}" if math.isfinite(mean) else word


def moments(metric: str, values: Sequence[float]) -> dict[str, float]:
    """The columns for the mean, standard deviation and number of values."""
    score = over(values) or Pooled(math.nan, None, 0)
    std = math.nan if score.std is None else score.std
    return {f"{metric} mean": score.mean, f"{metric} std": std, f"{metric} n": score.n}
