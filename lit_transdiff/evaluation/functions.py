"""The functions of the metrics: ``(generated, reference, settings) -> float`` (or mean and std, or values).

A smooth score is a tensor [1 + K]: its value, and its values without each of K groups of images, from which
its uncertainty follows. Shapes: N generated images, M reference images, D features, C classes, S context
tokens. All sums are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_transdiff.config import EvaluationConfig
from lit_transdiff.evaluation import kernels, sliced
from lit_transdiff.evaluation.moments import Gaussian, frechet, frechet_by_group, gaussian_of
from lit_transdiff.evaluation.neighbours import Manifold, covered, density_of, is_authentic, is_reached
from lit_transdiff.evaluation.scores import Score
from lit_transdiff.evaluation.statistics import Statistics, reference_tensor
from lit_transdiff.models.tokens import token_similarity

INCEPTION_PART = 5000  # images per split of the inception score, as in the ADM evaluator


@dataclass(frozen=True)
class Scored:
    """The outputs of an extractor for the generated images, in the order of their indices."""

    features: Tensor  # [N, D]
    labels: Tensor  # [N], the requested classes
    logits: Tensor | None = None  # [N, C]
    logits_name_classes: bool = False  # whether the logits are over the classes of ``labels``
    # labels [B] -> the model's context tokens [B, S, D]
    semantic_features: Callable[[Tensor], Tensor] | None = None
    spatial: Gaussian | None = None  # statistics of the spatial features
    group: Tensor | None = None  # [N], groups of images for the jackknife
    held_out: Tensor | None = None  # [H, D], features of other real images, in order of class
    training: Manifold | None = None  # features of training images


def frechet_distance(generated: Scored, reference: Statistics, settings: EvaluationConfig) -> Tensor:
    """The Frechet distance of features: FID with Inception's (arXiv 1706.08500), FD-DINOv2 with DINOv2's."""
    return frechet_values(generated.features, generated.group, reference.gaussian)


def frechet_ratio(generated: Scored, reference: Statistics, settings: EvaluationConfig) -> Tensor:
    """FDr: the Frechet distance relative to that of as many other real images."""
    x, group, real = equal_numbers(generated)
    return frechet_values(x, group, reference.gaussian) / frechet(gaussian_of([real]), reference.gaussian)


def frechet_values(x: Tensor, group: Tensor | None, real: Gaussian) -> Tensor:
    """The Frechet distance of the rows ``x`` [N, D], and those without each group."""
    whole = torch.tensor([frechet(gaussian_of([x]), real)], dtype=torch.float64)
    return whole if group is None else torch.cat([whole, frechet_by_group(x, group, real)])


def equal_numbers(generated: Scored) -> tuple[Tensor, Tensor | None, Tensor]:
    """Generated images, their groups, and as many other real ones, spread evenly over the classes."""
    assert generated.held_out is not None
    count = min(len(generated.features), len(generated.held_out))
    kept = evenly_spread(len(generated.features), count)
    group = None if generated.group is None else generated.group[kept]
    return generated.features[kept], group, generated.held_out[evenly_spread(len(generated.held_out), count)]


def evenly_spread(length: int, count: int) -> Tensor:
    """``count`` of the places 0 to ``length`` - 1 at equal distances."""
    return torch.arange(count) * length // count


def spatial_frechet_distance(generated: Scored, reference: Statistics, settings: EvaluationConfig) -> float:
    """The Frechet distance of Inception's spatial features: sFID (arXiv 2103.03841)."""
    assert generated.spatial is not None and reference.spatial is not None
    return frechet(generated.spatial, reference.spatial)


def mind(generated: Scored, reference: Statistics, settings: EvaluationConfig) -> Tensor:
    """MIND (arXiv 2605.06797): 3 D times the squared sliced Wasserstein distance."""
    return sliced.mind_values(generated.features, real_features(generated, reference), generated.group)


def sliced_ratio(generated: Scored, reference: Statistics, settings: EvaluationConfig) -> Tensor:
    """The sliced Wasserstein distance relative to that of as many other real images (arXiv 2607.02375)."""
    x, group, real = equal_numbers(generated)
    y = real_features(generated, reference)
    return (sliced.mind_values(x, y, group) / sliced.mind_values(real, y)).sqrt()


def cmmd(generated: Scored, reference: Statistics, settings: EvaluationConfig) -> Tensor:
    """1000 times the biased squared MMD with a Gaussian kernel of unit features (arXiv 2401.09603)."""
    return kernels.cmmd_values(generated.features, real_features(generated, reference), generated.group)


def unbiased_cmmd(generated: Scored, reference: Statistics, settings: EvaluationConfig) -> Tensor:
    """CMMD by the unbiased estimator, which does not depend on the number of images."""
    real = real_features(generated, reference)
    return kernels.cmmd_values(generated.features, real, generated.group, biased=False)


def kernel_distance(generated: Scored, reference: Statistics, settings: EvaluationConfig) -> Score:
    """Unbiased squared MMD with a cubic kernel (arXiv 1801.01401); with Inception features, this is KID.

    The mean and std are over 100 random subsets of 1000 images, or of all if fewer; it may be slightly below
    0. The std is not an error of the mean, because the subsets overlap.
    """
    real, fake = reference_tensor(reference), generated.features.double().cpu()
    size, order = min(1000, len(real), len(fake)), torch.Generator().manual_seed(settings.seed)

    def some(rows: Tensor) -> Tensor:
        return rows[torch.randperm(len(rows), generator=order)[:size]]

    values = torch.cat([kernels.kid_values(some(real), some(fake)) for _ in range(100)])
    return {"mean": float(values.mean()), "std": float(values.std(correction=0))}


def whole_kernel_distance(generated: Scored, reference: Statistics, settings: EvaluationConfig) -> Tensor:
    """The kernel distance of all images at once."""
    return kernels.kid_values(generated.features, real_features(generated, reference), generated.group)


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


def real_features(generated: Scored, reference: Statistics) -> Tensor:
    """The features [M, D] of the reference, on the device of the generated ones."""
    return reference_tensor(reference).to(generated.features.device)


def real_manifold(generated: Scored, reference: Statistics) -> Manifold:
    """The features of the reference with balls around them."""
    device = generated.features.device
    if device not in reference.manifolds:
        reference.manifolds[device] = Manifold(real_features(generated, reference))
    return reference.manifolds[device]


def precision(generated: Scored, reference: Statistics, settings: EvaluationConfig) -> float:
    """The fraction of generated images in the manifold of the real ones (arXiv 1904.06991)."""
    return covered(generated.features, real_manifold(generated, reference), settings.num_neighbours)


def recall(generated: Scored, reference: Statistics, settings: EvaluationConfig) -> float:
    """The fraction of real images in the manifold of the generated ones (arXiv 1904.06991)."""
    real = real_manifold(generated, reference)
    return covered(real.points, Manifold(generated.features), settings.num_neighbours)


def density(generated: Scored, reference: Statistics, settings: EvaluationConfig) -> float:
    """How many real images a generated one is near to, relative to k (arXiv 2002.09797)."""
    return density_of(generated.features, real_manifold(generated, reference), settings.num_neighbours)


def coverage(generated: Scored, reference: Statistics, settings: EvaluationConfig) -> float:
    """The fraction of real images with a generated one near them (arXiv 2002.09797)."""
    real = real_manifold(generated, reference)
    return float(is_reached(generated.features, real, settings.num_neighbours).double().mean())


def class_coverage(generated: Scored, reference: Statistics, settings: EvaluationConfig) -> float:
    """The lowest coverage of a class: of its real images by the images that were asked for as that class."""
    assert reference.labels is not None
    real, of_real = real_features(generated, reference), torch.from_numpy(reference.labels)
    found = []
    for c in of_real.unique():
        images, own = generated.features[generated.labels == c], Manifold(real[of_real == c])
        enough = len(images) > 0 and len(own.points) > settings.num_neighbours
        reached = is_reached(images, own, settings.num_neighbours) if enough else torch.zeros(1)
        found.append(float(reached.double().mean()))
    return min(found)


def authenticity(generated: Scored, reference: Statistics | None, settings: EvaluationConfig) -> float:
    """The fraction of generated images that are no copies of training images: AuthPct (arXiv 2102.08921)."""
    assert generated.training is not None
    return float(is_authentic(generated.features, generated.training).double().mean())


def class_accuracy(generated: Scored, reference: Statistics | None, settings: EvaluationConfig) -> Tensor:
    """The fraction of generated images that the extractor classifies as the requested class."""
    assert generated.logits is not None
    right = (generated.logits.cpu().argmax(dim=1) == generated.labels.cpu()).double()
    count = 0 if generated.group is None else int(generated.group.max()) + 1
    without = [right[generated.group != g].mean() for g in range(count)]
    return torch.stack([right.mean(), *without])


def feature_diversity(generated: Scored, reference: Statistics | None, settings: EvaluationConfig) -> float:
    """Mean cosine similarity over all pairs of an image's semantic features (arXiv 2506.09482).

    The pairs include the diagonal; lower is more diverse. Each class is computed once, because its features
    depend only on the class and, for R > 1, on references sampled with one seed per class.
    """
    assert generated.semantic_features is not None
    labels, counts = generated.labels.unique(return_counts=True)
    similarity = torch.cat([token_similarity(generated.semantic_features(part)) for part in labels.split(64)])
    return float((similarity.cpu() * counts.cpu()).sum() / counts.sum())
