"""The best attainable scores: those of real images, and of their reconstructions by the autoencoder.

Distances depend on the number of images, so the number and classes are those of the evaluations.
Shapes: N images, B images of a batch, C channels, H W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lit_transdiff.config import EvaluationConfig, RunConfig, require, require_classes
from lit_transdiff.data.index import ShardIndex, read_index
from lit_transdiff.evaluation.features import FeatureExtractor, Features, load_extractor
from lit_transdiff.evaluation.job import choose_labels
from lit_transdiff.evaluation.metrics import METRICS, Scored, check_metrics, needed_by, there
from lit_transdiff.evaluation.moments import gaussian_of
from lit_transdiff.evaluation.prepare import batches_of, made_of
from lit_transdiff.evaluation.scores import Score
from lit_transdiff.evaluation.statistics import Statistics, check_extractor, completed, load_statistics
from lit_transdiff.models.autoencoder import load_autoencoder


@torch.no_grad()
def best_scores(
    run: RunConfig, source: str | Path, device: torch.device | str = "cpu"
) -> dict[str, dict[str, Score]]:
    """Scores of ``evaluation.num_images`` images of ``source``, as real images and reconstructions.

    Raises ``ValueError`` for too few images of a class, for other classes, and for the images of the
    reference.
    """
    metrics = [name for name in run.evaluation.metrics if "semantic features" not in METRICS[name].needs]
    settings, index = replace(run.evaluation, metrics=metrics), read_index(source)
    extractor = load_extractor(settings.extractor, settings.extractor_weights, device)
    require_classes(str(source), index.class_names, extractor.class_names, "the network that looks at them")
    labels = choose_labels(settings, run.model.num_classes)
    counts = labels.bincount(minlength=run.model.num_classes)
    check_counts(settings.num_images, counts, index)
    same_classes = extractor.num_classes == run.model.num_classes
    reference = reference_of(run, source, settings, extractor, same_classes)
    autoencoder = load_autoencoder(run.autoencoder.kind, run.autoencoder.path, run.data.image_channels)
    autoencoder.to(device)
    found: dict[str, list[Features]] = {"real images": [], "reconstructions": []}
    spatial = "spatial features" in needed_by(metrics)
    shown: list[Tensor] = []
    for images, classes in chosen(run, source, counts):
        images = images.to(device)
        again = autoencoder.decode(autoencoder.sample(autoencoder.encode(images)))
        found["real images"].append(extractor(images, spatial=spatial))
        found["reconstructions"].append(extractor(again, spatial=spatial))
        shown.append(classes)
    asked = torch.cat(shown)
    both = {name: scored(batches, asked, same_classes) for name, batches in found.items()}
    return {
        kind: {name: METRICS[name](images, reference, settings) for name in settings.metrics}
        for kind, images in both.items()
    }


def check_counts(number: int, counts: Tensor, index: ShardIndex) -> None:
    """Refuse shards with too few images of a class."""
    for c, (needed, has) in enumerate(zip(counts.tolist(), index.class_counts.tolist(), strict=True)):
        allowed = f"fewer: {needed} would be of class {c}, which has {has} images"
        require(needed <= has, "evaluation.num_images", number, allowed)


def reference_of(
    run: RunConfig,
    source: str | Path,
    settings: EvaluationConfig,
    extractor: FeatureExtractor,
    same_classes: bool,
) -> Statistics | None:
    """Load the reference with everything that the metrics need; refuse a reference of ``source`` itself."""
    reference = load_statistics(settings.reference) if settings.reference else None
    if reference is not None:
        check_extractor(reference, extractor)
        same = (
            reference.about.get("settings", {}).get("source_hash") == made_of(source, run.data)["source_hash"]
        )
        allowed = f"others than those that {settings.reference} was made of"
        require(not same, "the images", str(source), allowed)
    have = there(
        reference,
        logits=extractor.gives_logits,
        class_logits=same_classes,
        semantic=False,
        spatial=extractor.num_spatial is not None,
    )
    check_metrics(settings.metrics, have)
    if reference is None:
        return None
    needs = needed_by(settings.metrics)
    folder = Path(str(settings.reference)).parent
    features, spatial = "reference features" in needs, "spatial features" in needs
    return completed(reference, extractor, folder, features=features, spatial=spatial)


def chosen(run: RunConfig, source: str | Path, counts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The first ``counts`` [K] images [B, C, H, W] of each class with their classes [B], in shard order."""
    left = counts.clone()
    for batch in batches_of(source, run.data, run.evaluation.batch_size):
        # within its class, in the batch
        rank = torch.stack([(batch.labels[:i] == c).sum() for i, c in enumerate(batch.labels)])
        keep = rank < left[batch.labels]
        left -= batch.labels[keep].bincount(minlength=len(left))
        if keep.any():
            yield batch.values[keep, 0], batch.labels[keep]
        if not left.any():
            return


def scored(batches: list[Features], labels: Tensor, same_classes: bool) -> Scored:
    """Concatenate all batches of an extractor."""
    features = torch.cat([batch.features for batch in batches])
    logits = [batch.logits for batch in batches if batch.logits is not None]
    spatial = [batch.spatial for batch in batches if batch.spatial is not None]
    return Scored(
        features,
        labels,
        logits=torch.cat(logits) if logits else None,
        logits_name_classes=same_classes,
        spatial=gaussian_of(spatial) if spatial else None,
    )
