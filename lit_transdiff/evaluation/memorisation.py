"""Copies of training images: the nearest training image of each sample, against those of held-out images.

Numbers alone do not detect copies (arXiv 2306.04675), so the nearest pairs are shown as pictures. Shapes: N
samples, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_transdiff.evaluation.functions import Scored
from lit_transdiff.evaluation.job import Job, image_seeds
from lit_transdiff.evaluation.neighbours import nearest
from lit_transdiff.evaluation.references import MOST_KEPT, features_of, images_at, images_hash
from lit_transdiff.evaluation.statistics import Statistics
from lit_transdiff.sampling.pictures import grid

SHOWN_PAIRS = 8  # pairs in the picture: those with the smallest distances
QUANTILES = (0.05, 0.5, 0.95)


def held_out_images(job: Job) -> str | None:
    """Real images that are not the training images; None if the settings name none."""
    settings, data = job.settings, job.generator.run.data
    trained = images_hash(settings.training_images, data)
    named = (settings.real_images, settings.reference_images)
    return next((source for source in named if source and images_hash(source, data) != trained), None)


def nearest_training_images(
    job: Job, scored: Scored, folder: Path
) -> tuple[dict[str, Any], Image.Image | None]:
    """How near samples and held-out images are to training images, and a picture of the nearest pairs.

    ``closer`` is the probability that a sample is nearer to its training image than a held-out image to its
    own: about a half without copies. Empty without training or held-out images.
    """
    source = held_out_images(job)
    first = job.representations[0]
    if scored.training is None or first.training is None or source is None:
        return {}, None
    held_out = features_of(source, job.generator.run.data, first.extractor, folder)
    assert held_out.features is not None
    rows = torch.from_numpy(held_out.features).to(scored.features.device)
    samples, others = (nearest(each, scored.training.points) for each in (scored.features, rows))
    found = {
        "samples": quantiles(samples[0]),
        "held_out": quantiles(others[0]),
        "closer": probability_of_less(samples[0], others[0]),
        "held_out_images": source,
    }
    return found, pairs(job, first.training, held_out, source, samples, others)


def quantiles(values: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in np.quantile(values.cpu().numpy(), QUANTILES)]


def probability_of_less(first: Tensor, second: Tensor) -> float:
    """The probability that one of ``first`` is less than one of ``second``; ties count half."""
    order = second.cpu().sort().values
    below, upto = (torch.searchsorted(order, first.cpu(), right=right) for right in (False, True))
    return 1 - float((below + upto).double().mean()) / (2 * len(order))


Found = tuple[Tensor, Tensor]  # distances [N], and the places of the nearest training images [N]


def pairs(
    job: Job, training: Statistics, held_out: Statistics, source: str, samples: Found, others: Found
) -> Image.Image | None:
    """The samples and the held-out images that are nearest to a training image, each above that image."""
    data, trained = job.generator.run.data, job.settings.training_images
    if trained is None or not (is_complete(training) and is_complete(held_out)):
        return None
    count = min(SHOWN_PAIRS, len(samples[0]), len(others[0]))
    chosen = [found[0].topk(count, largest=False).indices.cpu() for found in (samples, others)]
    nearest_ones = [found[1].cpu()[rows] for found, rows in zip((samples, others), chosen, strict=True)]
    of_training = images_at(trained, data, source_places(training, torch.cat(nearest_ones)))
    rows = [
        redrawn(job, chosen[0].tolist()),
        of_training[:count],
        images_at(source, data, source_places(held_out, chosen[1])),
        of_training[count:],
    ]
    labels = ["sample", "nearest in training", "held out", "nearest in training"]
    return grid(torch.cat([row.cpu() for row in rows]), count, row_labels=labels)


def is_complete(statistics: Statistics) -> bool:
    """Whether the places of the features in their source are known."""
    return statistics.places is not None or (statistics.num_images or 0) <= MOST_KEPT


def source_places(statistics: Statistics, rows: Tensor) -> list[int]:
    """The places in the source of features' rows."""
    chosen: list[int] = rows.tolist()
    return chosen if statistics.places is None else statistics.places[chosen].tolist()


def redrawn(job: Job, indices: Sequence[int]) -> Tensor:
    """The sampled images [n, C, H, W] with these indices, drawn again from their seeds."""
    of_row = job.images_of_row
    first = [index - index % of_row for index in indices]
    drawn = job.generator.images(job.labels[first], image_seeds(job.settings, first), job.sampling)
    return torch.stack([row[-of_row:][index % of_row] for row, index in zip(drawn, indices, strict=True)])
