"""The representations of an evaluation: each an extractor with the real images that its scores compare with.

Shapes: N images, B images of a batch, D features, K groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_transdiff.config import EvaluationConfig, RunConfig, require, require_classes
from lit_transdiff.config.evaluation import OF_IMAGES
from lit_transdiff.evaluation.extractor import FeatureExtractor, Features
from lit_transdiff.evaluation.features import load_extractor
from lit_transdiff.evaluation.functions import Scored, evenly_spread
from lit_transdiff.evaluation.measure import Measured, measure
from lit_transdiff.evaluation.metrics import METRICS, check_metrics, needed_by, there
from lit_transdiff.evaluation.moments import gaussian_of
from lit_transdiff.evaluation.neighbours import Manifold
from lit_transdiff.evaluation.prepare import made_of
from lit_transdiff.evaluation.references import (
    check_seen,
    features_of,
    images_hash,
    in_order_of_class,
)
from lit_transdiff.evaluation.statistics import Statistics, check_extractor, completed, load_statistics

OF_THE_NETWORK = {"logits", "class logits", "spatial features", "semantic features"}  # NEEDS
OF_REAL_IMAGES = {"reference", "reference features"}  # NEEDS of scores that real images have, too
MEAN_RATIO = "mean_frechet_ratio"  # the only score of several representations


@dataclass(frozen=True)
class Representation:
    """An extractor, the metrics on its features, and the features of real images."""

    extractor: FeatureExtractor
    metrics: list[str]
    prefix: str  # the beginning of its scores' names; empty for the main extractor
    same_classes: bool  # whether its logits are over the classes of the generated images
    reference_hash: str | None = None  # hash of the statistics file, or of the images
    reference: Statistics | None = None  # from images only after ``with_images``
    real: Statistics | None = None  # statistics of other real images
    training: Statistics | None = None

    @property
    def needs(self) -> set[str]:
        return needed_by(self.metrics)

    @property
    def spatial(self) -> bool:
        return "spatial features" in self.needs

    def identity(self) -> dict[str, Any]:
        """The part of a manifest about this representation."""
        return {
            "extractor_fingerprint": self.extractor.fingerprint,
            "num_features": self.extractor.num_features,
            "reference_hash": self.reference_hash,
            "reference_images": self.reference.num_images if self.reference else None,
        }


def representations_of(
    settings: EvaluationConfig,
    run: RunConfig,
    class_names: Sequence[str],
    semantic: bool,
    device: torch.device,
) -> list[Representation]:
    """The representation of every extractor; the main one first. Requirements are checked without images."""
    extractors = {
        name: load_extractor(name, weights, device, settings.extractor)
        for name, weights in settings.all_extractors.items()
    }
    for name in OF_IMAGES:
        if source := getattr(settings, name):
            check_seen(source, f"evaluation.{name}", run.data, list(extractors.values()))
    found = []
    for name, extractor in extractors.items():
        main = name == settings.extractor
        reference = load_statistics(settings.reference) if main and settings.reference else None
        if reference is not None:
            check_extractor(reference, extractor)
        same = extractor.num_classes == run.model.num_classes
        have = abilities(extractor, reference, settings, same, semantic and main)
        if main:
            check_metrics(settings.metrics, have)
        metrics = [
            metric
            for metric in settings.metrics
            if main or (metric != MEAN_RATIO and set(METRICS[metric].needs) & OF_THE_NETWORK <= have)
        ]
        check_metrics(metrics, have)
        if "class logits" in needed_by(metrics):
            where = f"evaluation.extractor_weights: {settings.all_extractors[name]}"
            require_classes(where, extractor.class_names, class_names, "the trained run")
        of_images = images_hash(settings.reference_images, run.data)
        hash_ = of_images if reference is None else reference.hash
        found.append(Representation(extractor, metrics, "" if main else f"{name}/", same, hash_, reference))
    return found


def abilities(
    extractor: FeatureExtractor,
    reference: Statistics | None,
    settings: EvaluationConfig,
    same_classes: bool,
    semantic: bool,
) -> set[str]:
    """The NEEDS that an extractor meets, with the images that ``settings`` name."""
    have = there(
        reference,
        logits=extractor.gives_logits,
        class_logits=same_classes,
        semantic=semantic,
        spatial=extractor.num_spatial is not None,
        held_out=settings.real_images is not None,
        training=settings.training_images is not None,
    )
    if reference is None and settings.reference_images is not None:
        have |= {"reference", "reference features", "reference spatial"}
        have |= {"reference labels"} if not settings.reference_images.endswith(".npz") else set()
    return have


def with_images(
    representation: Representation, settings: EvaluationConfig, run: RunConfig, folder: Path
) -> Representation:
    """``representation`` with the features of all real images that its metrics need."""
    extractor, needs = representation.extractor, representation.needs

    def features(source: str | None, needed: bool) -> Statistics | None:
        return features_of(source, run.data, extractor, folder) if source and needed else None

    reference = representation.reference
    if reference is None:
        reference = features(settings.reference_images, "reference" in needs)
    else:
        wanted = "reference features" in needs
        reference = completed(reference, extractor, folder, features=wanted, spatial=representation.spatial)
    real = features(settings.real_images, "reference" in needs)
    training = features(settings.training_images, True)
    if real is not None and reference is not None and settings.real_images is not None:
        source_hash = made_of(settings.real_images, run.data)["source_hash"]
        same = reference.about.get("settings", {}).get("source_hash") == source_hash
        require(not same, "evaluation.real_images", settings.real_images, "images other than the reference")
    return replace(representation, reference=reference, real=real, training=training)


def scored_of(
    representation: Representation, features: Features, labels: Tensor, spatial: Iterable[Tensor] = ()
) -> Scored:
    """The outputs of the extractor for generated images, beside those for real ones."""
    device = representation.extractor.device

    def rows(statistics: Statistics | None) -> Tensor | None:
        return None if statistics is None else torch.from_numpy(in_order_of_class(statistics)).to(device)

    training = representation.training
    return Scored(
        features.features.to(device),
        labels,
        features.logits,
        representation.same_classes,
        spatial=gaussian_of(spatial) if representation.spatial else None,
        held_out=rows(representation.real),
        training=None if training is None else Manifold(torch.from_numpy(training.features).to(device)),
    )


def measure_all(
    representations: Sequence[Representation], scored: Sequence[Scored], settings: EvaluationConfig
) -> Measured:
    """The scores of all representations, those of further extractors named EXTRACTOR/METRIC."""
    found, ratios = Measured(), []
    for one, generated in zip(representations, scored, strict=True):
        names = [name for name in one.metrics if name != MEAN_RATIO]
        found.update(measure(generated, one.reference, settings, names), one.prefix)
        if MEAN_RATIO in settings.metrics:
            ratios.append(METRICS[MEAN_RATIO].values(generated, one.reference, settings))
    if ratios:
        found.add(MEAN_RATIO, torch.stack(ratios).mean(dim=0))  # type: ignore[arg-type]
    return found


def real_scores(
    representation: Representation, generated: Scored, settings: EvaluationConfig
) -> dict[str, Any]:
    """The scores of as many other real images, which a model reaches but does not pass; empty if too few."""
    count = len(generated.features)
    if generated.held_out is None or len(generated.held_out) < count:
        return {}
    names = [name for name in representation.metrics if set(METRICS[name].needs) <= OF_REAL_IMAGES]
    kept = evenly_spread(len(generated.held_out), count)
    real = replace(generated, features=generated.held_out[kept], group=None)
    found = measure(real, representation.reference, settings, names).scores
    return {f"{representation.prefix}{name}": score for name, score in found.items()}
