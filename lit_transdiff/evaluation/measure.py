"""The scores of one representation, with the values from which their uncertainty follows.

Shapes: N images, K groups of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from lit_transdiff.config import EvaluationConfig
from lit_transdiff.evaluation.functions import Scored
from lit_transdiff.evaluation.groups import DISJOINT_PARTS, checked_limit, number_of_groups
from lit_transdiff.evaluation.metrics import METRICS
from lit_transdiff.evaluation.scores import Score, value
from lit_transdiff.evaluation.statistics import Statistics

PER_IMAGE = ("features", "labels", "logits", "group")  # fields of Scored


@dataclass(frozen=True)
class Measured:
    """Scores, and their values for their uncertainty: without each group of images, or on disjoint parts."""

    scores: dict[str, Score] = field(default_factory=dict)
    without: dict[str, list[float]] = field(default_factory=dict)  # by score, [K]
    parts: dict[str, list[float]] = field(default_factory=dict)  # by score, [DISJOINT_PARTS]
    limits: dict[str, float | None] = field(default_factory=dict)  # by score, None if it cannot be estimated

    def update(self, other: Measured, prefix: str) -> None:
        """Add all of ``other`` with ``prefix`` before the names."""
        self.scores.update({f"{prefix}{name}": score for name, score in other.scores.items()})
        self.without.update({f"{prefix}{name}": values for name, values in other.without.items()})
        self.parts.update({f"{prefix}{name}": values for name, values in other.parts.items()})
        self.limits.update({f"{prefix}{name}": limit for name, limit in other.limits.items()})

    def add(self, name: str, values: Score | Tensor) -> None:
        """Add a score with its values without each group, if it has them."""
        self.scores[name] = float(values[0]) if isinstance(values, Tensor) else values
        if isinstance(values, Tensor) and len(values) > 1:
            self.without[name] = values[1:].tolist()


def measure(
    generated: Scored, reference: Statistics | None, settings: EvaluationConfig, names: Sequence[str]
) -> Measured:
    """The scores ``names`` of one extractor with the values for their uncertainty."""
    found = Measured()
    for name in names:
        metric = METRICS[name]
        values = metric.values(generated, reference, settings)
        found.add(name, values)
        if name in found.without:
            assert isinstance(values, Tensor)
            half = metric.values(half_of(generated), reference, settings)
            found.limits[name] = checked_limit(values, half) if isinstance(half, Tensor) else None
        if metric.in_parts and generated.group is not None:
            parts = [part_of(generated, number) for number in range(DISJOINT_PARTS)]
            if all(len(part.features) > settings.num_neighbours for part in parts):
                found.parts[name] = [value(metric(part, reference, settings)) for part in parts]
    return found


def half_of(generated: Scored) -> Scored:
    """The images of half of the groups, which remain groups."""
    assert generated.group is not None
    return subset(generated, generated.group < number_of_groups(generated.group) // 2)


def part_of(generated: Scored, number: int) -> Scored:
    """One of DISJOINT_PARTS disjoint parts of the images, made of whole groups."""
    assert generated.group is not None
    return replace(subset(generated, generated.group % DISJOINT_PARTS == number), group=None)


def subset(generated: Scored, kept: Tensor) -> Scored:
    """The generated images that are ``kept`` [N]."""
    rows: dict[str, Any] = {name: getattr(generated, name) for name in PER_IMAGE}
    chosen: dict[str, Any] = {name: None if each is None else each[kept] for name, each in rows.items()}
    return replace(generated, **chosen)
