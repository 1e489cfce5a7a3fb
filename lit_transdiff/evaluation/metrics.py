"""The metrics. Each is a function ``(generated, reference, settings) -> float`` (or mean and std) in METRICS.

Shapes: N generated images, M reference images, D features, K classes, S context tokens. All sums are in
float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy
from torchmetrics.image.kid import poly_mmd

from lit_transdiff.config import EvaluationConfig, require, unknown
from lit_transdiff.evaluation.features import EXTRACTORS, check_extractor_weights, check_name
from lit_transdiff.evaluation.moments import Gaussian, frechet, gaussian_of
from lit_transdiff.evaluation.scores import Score
from lit_transdiff.evaluation.statistics import Statistics, reference_tensor
from lit_transdiff.models.tokens import token_similarity

INCEPTION_PART = 5000  # images per split of the inception score, as in the ADM evaluator
DISTANCES = 1 << 26  # the most distances in memory at a time


@dataclass(frozen=True)
class Scored:
    """The outputs of the extractor for the generated images, in the order of their indices."""

    features: Tensor  # [N, D]
    labels: Tensor  # [N], the requested classes
    logits: Tensor | None = None  # [N, K]
    logits_name_classes: bool = False  # whether the logits are over the classes of ``labels``
    # labels [B] -> the model's context tokens [B, S, D]
    semantic_features: Callable[[Tensor], Tensor] | None = None
    spatial: Gaussian | None = None  # statistics of the spatial features


def frechet_distance(generated: Scored, reference: Statistics, settings: EvaluationConfig) -> float:
    """The Frechet distance of features: FID with Inception's (arXiv 1706.08500), FD-DINOv2 with DINOv2's."""
    return frechet(gaussian_of([generated.features]), reference.gaussian)


def spatial_frechet_distance(generated: Scored, reference: Statistics, settings: EvaluationConfig) -> float:
    """The Frechet distance of Inception's spatial features: sFID (arXiv 2103.03841)."""
    assert generated.spatial is not None and reference.spatial is not None
    return frechet(generated.spatial, reference.spatial)


def inception_score(generated: Scored, reference: Statistics | None, settings: EvaluationConfig) -> Score:
    """exp of the mean KL divergence of an image's class distribution from the mean one (arXiv 1606.03498).

    The result is the mean and std over splits of 5,000 images, shuffled because images are in class order;
    fewer images are one split. With the logits of the small classifier it is an analogue that is comparable
    only with scores of the same classifier.
    """
    assert generated.logits is not None
    order = torch.randperm(len(generated.logits), generator=torch.Generator().manual_seed(settings.seed))
    scores = []
    for part in generated.logits.cpu()[order].split(INCEPTION_PART):
        log_p = part.double().log_softmax(dim=1)
        log_mean = torch.logsumexp(log_p, dim=0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(dim=1).mean().exp())
    values = torch.stack(scores)
    return {"mean": float(values.mean()), "std": float(values.std(correction=0))}


def kernel_distance(generated: Scored, reference: Statistics, settings: EvaluationConfig) -> Score:
    """Unbiased squared MMD with a cubic kernel (arXiv 1801.01401); with Inception features, this is KID.

    The mean and std are over 100 random subsets of 1000 images, or of all if fewer; it may be slightly below
    0.
    """
    real, fake = reference_tensor(reference), generated.features.double().cpu()
    size, order = min(1000, len(real), len(fake)), torch.Generator().manual_seed(settings.seed)

    def some(rows: Tensor) -> Tensor:
        return rows[torch.randperm(len(rows), generator=order)[:size]]

    values = torch.stack([poly_mmd(some(real), some(fake)) for _ in range(100)])
    return {"mean": float(values.mean()), "std": float(values.std(correction=0))}


def precision(generated: Scored, reference: Statistics, settings: EvaluationConfig) -> float:
    """The fraction of generated images in the manifold of the real ones (arXiv 1904.06991)."""
    real = reference_tensor(reference).to(generated.features.device)
    return covered(generated.features, real, settings.num_neighbours)


def recall(generated: Scored, reference: Statistics, settings: EvaluationConfig) -> float:
    """The fraction of real images in the manifold of the generated ones (arXiv 1904.06991)."""
    real = reference_tensor(reference).to(generated.features.device)
    return covered(real, generated.features, settings.num_neighbours)


def class_accuracy(generated: Scored, reference: Statistics | None, settings: EvaluationConfig) -> float:
    """The fraction of generated images that the extractor classifies as the requested class."""
    assert generated.logits is not None
    logits = generated.logits.cpu()
    return float(
        multiclass_accuracy(logits, generated.labels.cpu(), num_classes=logits.shape[1], average="micro")
    )


def feature_diversity(generated: Scored, reference: Statistics | None, settings: EvaluationConfig) -> float:
    """Mean cosine similarity over all pairs of an image's semantic features (arXiv 2506.09482).

    The pairs include the diagonal; lower is more diverse. Each class is computed once, because its features
    depend only on the class and, for R > 1, on references sampled with one seed per class.
    """
    assert generated.semantic_features is not None
    labels, counts = generated.labels.unique(return_counts=True)
    similarity = torch.cat([token_similarity(generated.semantic_features(part)) for part in labels.split(64)])
    return float((similarity.cpu() * counts.cpu()).sum() / counts.sum())


def covered(points: Tensor, manifold: Tensor, neighbours: int, chunk: int | None = None) -> float:
    """The fraction of ``points`` [N, D] inside a ball around any row of ``manifold`` [M, D].

    The radius of a row's ball is the distance to its ``neighbours``-th nearest other row. Distances are
    computed in float64, ``chunk`` rows at a time.
    """
    require(
        len(manifold) > neighbours,
        "evaluation.num_neighbours",
        neighbours,
        f"fewer than the {len(manifold)} images of a set",
    )
    chunk = chunk or max(1, DISTANCES // len(manifold))
    manifold = manifold.double()
    centre = manifold.mean(dim=0)  # centring preserves distances and reduces cancellation
    manifold = manifold - centre
    radii = torch.cat(
        [torch.cdist(rows, manifold).kthvalue(neighbours + 1).values for rows in manifold.split(chunk)]
    )
    inside = [
        (torch.cdist(rows.double() - centre, manifold) <= radii).any(dim=1) for rows in points.split(chunk)
    ]
    return float(torch.cat(inside).double().mean())


@dataclass(frozen=True)
class Metric:
    """A row of METRICS, callable like its function: title, whether higher is better, and requirements."""

    function: Callable[..., Score]
    title: str
    higher_is_better: bool
    needs: tuple[str, ...] = ()  # keys of NEEDS

    def __call__(self, generated: Scored, reference: Statistics | None, settings: EvaluationConfig) -> Score:
        self.check(
            there(
                reference,
                logits=generated.logits is not None,
                class_logits=generated.logits_name_classes,
                semantic=generated.semantic_features is not None,
                spatial=generated.spatial is not None,
            )
        )
        return self.function(generated, reference, settings)

    def check(self, have: set[str]) -> None:
        """Raise ``ValueError`` with the setting that provides a requirement missing in ``have``."""
        for need in self.needs:
            if need not in have:
                raise ValueError(f"evaluation.metrics: {self.title} needs {NEEDS[need]}.")


METRICS: dict[str, Metric] = {
    "frechet_distance": Metric(frechet_distance, "Frechet distance", False, ("reference",)),
    "spatial_frechet_distance": Metric(
        spatial_frechet_distance,
        "spatial Frechet distance",
        False,
        ("reference", "reference spatial", "spatial features"),
    ),
    "inception_score": Metric(inception_score, "inception score", True, ("logits",)),
    "kernel_distance": Metric(kernel_distance, "kernel distance", False, ("reference", "reference features")),
    "precision": Metric(precision, "precision", True, ("reference", "reference features")),
    "recall": Metric(recall, "recall", True, ("reference", "reference features")),
    "class_accuracy": Metric(class_accuracy, "class accuracy", True, ("logits", "class logits")),
    "feature_diversity": Metric(feature_diversity, "feature similarity", False, ("semantic features",)),
}

NEEDS: dict[str, str] = {
    "reference": "the statistics of real images: set evaluation.reference to a statistics file (.npz)",
    "reference features": "features of real images, missing in evaluation.reference: make it with "
    "max_features above 0, or use a file with the images themselves (arr_0)",
    "reference spatial": "spatial statistics of real images (mu_s, sigma_s), missing in evaluation.reference",
    "spatial features": "spatial features: set evaluation.extractor to 'inception'",
    "logits": "logits: set evaluation.extractor to a network that has them",
    "class logits": "logits over the model's own classes: set evaluation.extractor to 'classifier' or "
    "'judge', trained on them",
    "semantic features": "a model.paradigm with semantic features (an encoder before its decoder)",
}


def there(
    reference: Statistics | None, *, logits: bool, class_logits: bool, semantic: bool, spatial: bool
) -> set[str]:
    """The NEEDS that are met."""
    have = {
        "reference": reference is not None,
        "reference features": reference is not None and reference.has_features,
        "reference spatial": reference is not None and reference.has_spatial,
        "spatial features": spatial,
        "logits": logits,
        "class logits": class_logits,
        "semantic features": semantic,
    }
    return {need for need, met in have.items() if met}


def needed_by(names: Sequence[str]) -> set[str]:
    """The NEEDS of all these metrics."""
    return {need for name in names for need in METRICS[name].needs}


def check_metrics(names: Sequence[str], have: set[str]) -> None:
    """Raise ``ValueError`` for an unknown metric or one with unmet requirements, before hours of sampling."""
    for name in names:
        if name not in METRICS:
            raise unknown("evaluation.metrics", name, METRICS)
        METRICS[name].check(have)


def check_evaluation(settings: EvaluationConfig, *, scores: bool, semantic: bool = True) -> None:
    """Refuse unknown extractors and metrics and, for a run that ``scores``, settings that do not fit them.

    Files are not checked, because the extractor and the reference may still be made before their use.
    ``semantic`` tells whether the model has semantic features.
    """
    check_name(settings.extractor)
    lacking: set[str] = set()
    if scores:
        check_extractor_weights(settings.extractor, settings.extractor_weights)
        extractor = EXTRACTORS[settings.extractor]
        has = {
            "reference": settings.reference,
            "logits": extractor.gives_logits,
            "spatial features": extractor.num_spatial,
        }
        has["semantic features"] = semantic
        lacking = {need for need, value in has.items() if not value}
    check_metrics(settings.metrics, set(NEEDS) - lacking)


def compute_scores(
    generated: Scored, reference: Statistics | None, settings: EvaluationConfig
) -> dict[str, Score]:
    """Compute all of ``settings.metrics`` by name."""
    return {name: METRICS[name](generated, reference, settings) for name in settings.metrics}
