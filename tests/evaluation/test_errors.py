"""The uncertainty of scores against repeated samples of the same distribution, and against arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lit_transdiff.config import EvaluationConfig
from lit_transdiff.evaluation.errors import standard_errors
from lit_transdiff.evaluation.functions import Scored
from lit_transdiff.evaluation.groups import (
    DISJOINT_PARTS,
    GROUPS,
    groups_of,
    jackknife_error,
    mean_error,
    number_of_groups,
)
from lit_transdiff.evaluation.measure import measure
from lit_transdiff.evaluation.moments import Gaussian, frechet, frechet_by_group, gaussian_of
from lit_transdiff.evaluation.neighbours import Manifold, covered
from lit_transdiff.evaluation.statistics import Statistics

REAL = Gaussian(np.zeros(4), np.eye(4))


def drawn(seed: int, labels: torch.Tensor) -> torch.Tensor:
    """Features whose mean depends on the class, at some distance of REAL."""
    noise = torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(seed))
    return (
        0.3
        + noise * torch.tensor([1.0, 0.8, 1.2, 1.0])
        + 0.5 * labels[:, None] * torch.tensor([1.0, 0.0, 0.0, 0.0])
    )


def error_of(features: torch.Tensor, labels: torch.Tensor) -> float:
    group = groups_of(labels)
    assert group is not None
    return jackknife_error(frechet_by_group(features, group, REAL))


def test_the_jackknife_knows_the_spread_of_the_distance_over_other_draws() -> None:
    labels = torch.arange(600) * 3 // 600
    sets = [drawn(seed, labels) for seed in range(60)]
    spread = np.std([frechet(gaussian_of([features]), REAL) for features in sets], ddof=1)
    errors = [error_of(features, labels) for features in sets[:20]]
    assert np.mean(errors) == pytest.approx(spread, rel=0.3)  # each of the two is known within about 10 %


def test_an_order_of_the_images_changes_nothing_but_the_groups() -> None:
    labels = torch.arange(400) * 2 // 400
    features = drawn(0, labels)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    assert error_of(features[order], labels[order]) == pytest.approx(error_of(features, labels), rel=0.6)


@pytest.mark.parametrize(("images", "count"), [(2000, 20), (500, 50), (900, 30), (70, 20)])
def test_groups_hold_equal_parts_of_every_class(images: int, count: int) -> None:
    labels = torch.arange(images) * 10 // images
    group = groups_of(labels)
    assert group is not None and number_of_groups(group) == count
    counts = torch.stack([labels[group == g].bincount(minlength=10) for g in range(count)])
    assert int((counts.amax(0) - counts.amin(0)).max()) <= (images // 10 % count != 0)


def test_images_of_a_row_stay_together_and_random_labels_have_random_groups() -> None:
    labels = torch.randint(5, (300,), generator=torch.Generator().manual_seed(0)).repeat_interleave(4)
    group = groups_of(labels, balanced=False, rows=4)
    assert group is not None and bool((group.view(-1, 4) == group[::4, None]).all())
    assert torch.equal(group[::4], torch.arange(300) % GROUPS[0])
    assert groups_of(torch.zeros(2 * GROUPS[0] - 1, dtype=torch.long)) is None


def measured(names: list[str], count: int = 200) -> tuple[Scored, Statistics, EvaluationConfig]:
    labels = torch.arange(count) * 4 // count
    features = np.random.default_rng(0).normal(size=(90, 4)).astype(np.float32)
    scored = Scored(drawn(0, labels), labels, drawn(0, labels), True, group=groups_of(labels))
    return scored, Statistics(REAL.mu, REAL.sigma, features=features), EvaluationConfig(metrics=names)


def test_shares_have_the_error_of_independent_images() -> None:
    names = ["precision", "recall", "class_accuracy", "frechet_distance"]
    scored, reference, settings = measured(names)
    found = measure(scored, reference, settings, names)
    found.scores.update(precision=0.8, recall=0.5, class_accuracy=1.0)
    errors = standard_errors(found, {"precision": 40, "recall": 90, "class_accuracy": 40})
    assert set(errors) == set(names)
    assert errors["precision"] == pytest.approx(math.sqrt(34 / 44 * 10 / 44 / 44))  # 32 + 2 of 40 + 4
    assert errors["recall"] == pytest.approx(math.sqrt(0.25 / 94))  # of the 90 real images
    assert errors["class_accuracy"] == pytest.approx(math.sqrt(42 / 44 * 2 / 44 / 44))  # not zero


def test_scores_of_neighbours_are_measured_on_disjoint_parts_and_others_without_groups() -> None:
    names = ["frechet_distance", "mind", "precision", "recall", "class_accuracy"]
    scored, reference, settings = measured(names)
    found = measure(scored, reference, settings, names)
    assert set(found.without) == {"frechet_distance", "mind", "class_accuracy"}
    assert set(found.parts) == {"precision", "recall"}
    assert {len(values) for values in found.parts.values()} == {DISJOINT_PARTS}
    # A fraction of generated images is the mean of those of its parts; recall depends on their number.
    assert np.mean(found.parts["precision"]) == pytest.approx(found.scores["precision"])
    assert scored.group is not None and reference.features is not None
    part = scored.features[scored.group % DISJOINT_PARTS == 3]
    assert found.parts["recall"][3] == covered(torch.from_numpy(reference.features), Manifold(part), 3)
    of_images = math.sqrt(0.25 / 200)
    assert 0 < mean_error(torch.tensor(found.parts["precision"])) < 3 * of_images


def test_few_images_have_scores_without_uncertainty() -> None:
    labels = torch.zeros(20, dtype=torch.long)
    scored = Scored(drawn(0, labels), labels, group=groups_of(labels))
    reference = Statistics(REAL.mu, REAL.sigma)
    found = measure(scored, reference, EvaluationConfig(), ["frechet_distance"])
    assert set(found.scores) == {"frechet_distance"} and not found.without
    assert standard_errors(found, {}) == {}
