"""Standard errors of scores against repeated samples of the same distribution, and against arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lit_transdiff.evaluation.errors import MOST_FEATURES, error_of_distance, standard_errors
from lit_transdiff.evaluation.moments import Gaussian, frechet, gaussian_of
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


def test_the_jackknife_knows_the_spread_of_the_distance_over_other_draws() -> None:
    labels = torch.arange(600) * 3 // 600
    sets = [drawn(seed, labels) for seed in range(60)]
    spread = np.std([frechet(gaussian_of([features]), REAL) for features in sets], ddof=1)
    errors = [error_of_distance(features, labels, REAL) for features in sets[:20]]
    assert np.mean(errors) == pytest.approx(spread, rel=0.3)  # each of the two is known within about 10 %


def test_an_order_of_the_images_changes_nothing_but_the_groups() -> None:
    labels = torch.arange(400) * 2 // 400
    features = drawn(0, labels)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    assert error_of_distance(features[order], labels[order], REAL) == pytest.approx(
        error_of_distance(features, labels, REAL), rel=0.6
    )


def test_shares_have_the_error_of_independent_images() -> None:
    reference = Statistics(
        REAL.mu, REAL.sigma, features=np.random.default_rng(0).normal(size=(90, 4)).astype(np.float32)
    )
    labels = torch.zeros(40, dtype=torch.long)
    scores = {
        "precision": 0.8,
        "recall": 0.5,
        "class_accuracy": 1.0,
        "frechet_distance": 1.0,
        "inception_score": {"mean": 2.0},
    }
    found = standard_errors(scores, drawn(0, labels), labels, reference)
    assert set(found) == {"precision", "recall", "class_accuracy", "frechet_distance"}
    assert found["precision"] == pytest.approx(math.sqrt(34 / 44 * 10 / 44 / 44))  # 32 + 2 of 40 + 4
    assert found["recall"] == pytest.approx(math.sqrt(0.25 / 94))  # of the 90 real images
    assert found["class_accuracy"] == pytest.approx(math.sqrt(42 / 44 * 2 / 44 / 44))  # not zero


def test_a_distance_of_many_features_or_few_images_has_none() -> None:
    wide = MOST_FEATURES + 1
    reference = Statistics(np.zeros(wide), np.eye(wide))
    labels = torch.zeros(30, dtype=torch.long)
    assert standard_errors({"frechet_distance": 1.0}, torch.randn(30, wide), labels, reference) == {}
    assert (
        standard_errors(
            {"frechet_distance": 1.0}, torch.randn(20, 4), labels[:20], Statistics(REAL.mu, REAL.sigma)
        )
        == {}
    )
