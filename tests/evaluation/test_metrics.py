"""The metrics against closed forms, and against the same thing computed another way."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

from lit_transdiff.config import EvaluationConfig
from lit_transdiff.evaluation import functions
from lit_transdiff.evaluation.functions import Scored
from lit_transdiff.evaluation.metrics import METRICS, NEEDS, check_metrics
from lit_transdiff.evaluation.moments import Gaussian
from lit_transdiff.evaluation.neighbours import Manifold, covered
from lit_transdiff.evaluation.statistics import Statistics

pytestmark = pytest.mark.numeric
SETTINGS = EvaluationConfig(num_images=10)


def statistics(features: Tensor) -> Statistics:
    array = features.double().numpy()
    return Statistics(
        array.mean(0), np.cov(array, rowvar=False), len(array), features.float().numpy(), path="r.npz"
    )


def scored(features: Tensor, **more: object) -> Scored:
    return Scored(features, torch.zeros(len(features), dtype=torch.long), **more)  # type: ignore[arg-type]


def whitened(count: int, size: int) -> Tensor:
    """Rows whose sample mean is 0 and sample covariance exactly the identity."""
    x = torch.randn(count, size, dtype=torch.float64)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (count - 1))).T


def test_frechet_distance_of_features_in_closed_form() -> None:
    """For N(m, diag(a^2)) and N(0, diag(b^2)): |m|^2 + sum (a - b)^2."""
    a, b, m = (torch.tensor(v).double() for v in ([1.0, 2.0, 0.5], [3.0, 1.0, 0.5], [0.1, -2.0, 0.7]))
    x = whitened(200, 3)
    reference = Statistics(np.zeros(3), np.diag((b**2).numpy()))
    expected = float((m**2).sum() + ((a - b) ** 2).sum())
    assert METRICS["frechet_distance"](scored(x * a + m), reference, SETTINGS) == pytest.approx(
        expected, rel=1e-12
    )


def test_spatial_frechet_distance_is_that_of_the_spatial_statistics() -> None:
    generated, real = (
        Gaussian(np.zeros(2), np.diag([1.0, 4.0])),
        Gaussian(np.array([3.0, 4.0]), np.diag([4.0, 4.0])),
    )
    reference = Statistics(np.zeros(3), np.eye(3), spatial=real)
    given = scored(torch.randn(10, 3), spatial=generated)
    assert METRICS["spatial_frechet_distance"](given, reference, SETTINGS) == pytest.approx(25 + 1)


def test_inception_score_in_closed_form() -> None:
    """Certain and evenly spread over K classes: K. Uncertain everywhere: 1."""
    certain = 100 * torch.eye(4).repeat_interleave(250, 0)
    found = METRICS["inception_score"](scored(certain, logits=certain), None, SETTINGS)
    assert found == {"mean": pytest.approx(4, rel=1e-12), "std": 0.0}
    unsure = torch.zeros(100, 4)
    assert METRICS["inception_score"](scored(unsure, logits=unsure), None, SETTINGS)["mean"] == pytest.approx(
        1
    )  # type: ignore[index]


def test_inception_score_of_parts_as_torch_fidelity_computes_it() -> None:
    """Images in order of class: the parts are of 5,000 and shuffled, else every part
    would hold few classes.
    """
    logits = (torch.randn(15_000, 6) + 4 * torch.eye(6).repeat_interleave(2500, 0)).float()
    found = METRICS["inception_score"](scored(logits, logits=logits), None, SETTINGS)
    order = torch.randperm(15_000, generator=torch.Generator().manual_seed(SETTINGS.seed))
    theirs = isc_features_to_metric(logits[order], splits=3, shuffle=False)
    assert found["mean"] == pytest.approx(theirs["inception_score_mean"], rel=1e-9)  # type: ignore[index]
    assert found["std"] == pytest.approx(theirs["inception_score_std"], rel=1e-6)  # type: ignore[index]
    in_order = isc_features_to_metric(logits, splits=3, shuffle=False)["inception_score_mean"]
    assert found["mean"] > 1.2 * in_order  # type: ignore[index]


def test_precision_and_recall_as_torch_fidelity_computes_them() -> None:
    fake, real = torch.randn(300, 6), torch.randn(400, 6) * 0.8 + 0.3
    theirs = calculate_precision_recall_full(fake.double(), real.double(), neighborhood=3)
    given = scored(fake), statistics(real), SETTINGS
    assert (METRICS["precision"](*given), METRICS["recall"](*given)) == pytest.approx(theirs, abs=1e-6)
    assert 0 < theirs[0] < 1 and 0 < theirs[1] < 1


def test_kernel_distance_of_whole_sets_is_the_unbiased_estimate() -> None:
    fake, real = torch.randn(40, 5).double(), torch.randn(40, 5).double() + 0.5

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / 5 + 1) ** 3

    def off_diagonal(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (40 * 39)

    expected = (
        off_diagonal(kernel(fake, fake)) + off_diagonal(kernel(real, real)) - 2 * kernel(fake, real).mean()
    )
    score = METRICS["kernel_distance"](scored(fake.float()), statistics(real.float()), SETTINGS)
    assert score["mean"] == pytest.approx(float(expected), rel=1e-5)  # type: ignore[index]
    assert score["std"] == pytest.approx(0, abs=1e-12)  # type: ignore[index]


@pytest.mark.parametrize("name", ["kernel_distance", "inception_score"])
def test_scores_with_random_parts_repeat_and_leave_the_global_generator(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functions, "INCEPTION_PART", 50)
    fake, real = torch.randn(200, 4), torch.randn(300, 4)
    given = scored(fake, logits=fake), statistics(real)
    before = torch.random.get_rng_state()
    first = METRICS[name](*given, SETTINGS)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.randn(7)
    assert METRICS[name](*given, SETTINGS) == first
    assert METRICS[name](*given, EvaluationConfig(num_images=10, seed=1)) != first


def test_precision_and_recall_of_constructed_sets() -> None:
    left, right = torch.randn(60, 3), torch.randn(60, 3) + 1000
    half = torch.cat([left[:30], right[:30]])

    def both(fake: Tensor, real: Tensor) -> tuple[object, object]:
        return tuple(
            METRICS[name](scored(fake), statistics(real), SETTINGS) for name in ("precision", "recall")
        )  # type: ignore[return-value]

    assert both(left, left) == (1, 1)
    assert both(left, right) == (0, 0)
    assert both(half, left)[0] == 0.5  # half of the images are far from all real ones
    assert both(left[:30], torch.cat([left[:30], right[:30]])) == (1, 0.5)  # one of two modes is missing


def test_covered_as_a_loop_computes_it() -> None:
    points, manifold = torch.randn(30, 4).double(), torch.randn(25, 4).double()
    # the first is the distance to itself
    radii = [sorted(float((a - b).norm()) for b in manifold)[3] for a in manifold]
    inside = [any(float((p - m).norm()) <= r for m, r in zip(manifold, radii, strict=True)) for p in points]
    assert 0 < sum(inside) < len(inside)
    for chunk in (4, 4096):
        assert covered(points, Manifold(manifold), neighbours=3, chunk=chunk) == pytest.approx(
            sum(inside) / len(inside)
        )


def test_class_accuracy() -> None:
    logits = torch.tensor([[2.0, 0, 0], [0, 3.0, 0], [0, 0, 1.0], [1.0, 0, 0]])
    given = Scored(logits, torch.tensor([0, 1, 2, 2]), logits, logits_name_classes=True)
    assert METRICS["class_accuracy"](given, None, SETTINGS) == 0.75


def test_feature_diversity_is_the_mean_cosine_of_all_pairs() -> None:
    tokens = torch.randn(5, 7, 3)
    slow = [
        np.mean([float(torch.cosine_similarity(a, b, dim=0)) for a in row for b in row]) for row in tokens
    ]
    given = Scored(
        torch.zeros(3, 1), torch.tensor([4, 0, 4]), semantic_features=lambda labels: tokens[labels]
    )
    assert METRICS["feature_diversity"](given, None, SETTINGS) == pytest.approx(
        (slow[0] + 2 * slow[4]) / 3, abs=1e-6
    )
    same = Scored(
        torch.zeros(2, 1),
        torch.tensor([0, 1]),
        semantic_features=lambda labels: torch.ones(len(labels), 6, 2),
    )
    assert METRICS["feature_diversity"](same, None, SETTINGS) == pytest.approx(1)


@pytest.mark.parametrize("name", METRICS)
def test_what_a_metric_lacks_is_named(name: str) -> None:
    given = scored(torch.randn(10, 3))
    assert METRICS[name].needs
    with pytest.raises(ValueError, match=METRICS[name].title):
        METRICS[name](given, None, SETTINGS)
    check_metrics([name], set(NEEDS))
    for need in METRICS[name].needs:
        with pytest.raises(ValueError, match=re.escape(NEEDS[need])):
            check_metrics([name], set(NEEDS) - {need})


def test_an_unknown_metric_and_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'precision'\?"):
        check_metrics(["precison"], set(NEEDS))
    with pytest.raises(ValueError, match=r"num_neighbours: got 3"):
        METRICS["precision"](scored(torch.randn(10, 2)), statistics(torch.randn(3, 2)), SETTINGS)


def test_scores_are_plain_numbers() -> None:
    features = torch.randn(20, 3)
    spatial = Gaussian(np.zeros(2), np.eye(2))
    given = Scored(
        features,
        torch.zeros(20).long(),
        features,
        True,
        lambda labels: torch.randn(len(labels), 4, 2),
        spatial,
    )
    given = dataclasses.replace(given, held_out=features + 1, training=Manifold(features))
    reference = dataclasses.replace(statistics(features), spatial=spatial, labels=np.zeros(20, int))
    for metric in METRICS.values():
        score = metric(given, reference, SETTINGS)
        numbers = score.values() if isinstance(score, dict) else [score]
        assert all(type(number) is float and math.isfinite(number) for number in numbers)
