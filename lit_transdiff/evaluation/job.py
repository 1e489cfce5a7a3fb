"""The work of one evaluation: generator, extractor and reference, sampling of batches, and scores.

Shapes: N images, B images of a batch, R references, C channels, H W pixels, D features, K classes. Image i
has its own seed and label, and batches are fixed ranges of images, so that the numbers do not depend on the
number of ranks.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lit_transdiff.config import EvaluationConfig, SamplingConfig, require
from lit_transdiff.data.pixels import to_bytes
from lit_transdiff.evaluation.extractor import FeatureExtractor, Features
from lit_transdiff.evaluation.functions import Scored
from lit_transdiff.evaluation.groups import groups_of
from lit_transdiff.evaluation.measure import Measured
from lit_transdiff.evaluation.representations import (
    Representation,
    measure_all,
    representations_of,
    scored_of,
    with_images,
)
from lit_transdiff.evaluation.statistics import Statistics
from lit_transdiff.models.sizes import FLOAT_BYTES, least_of_drawing, room_here
from lit_transdiff.sampling.generator import Generator
from lit_transdiff.sampling.loop import check_sampling


@dataclass(frozen=True)
class Job:
    """One evaluation, loaded and checked: generator, representations and settings."""

    generator: Generator
    settings: EvaluationConfig
    sampling: SamplingConfig
    representations: list[Representation]  # one for each extractor, the main one first
    labels: Tensor  # [N]
    images_of_row: int  # number of scored images per row

    @property
    def extractor(self) -> FeatureExtractor:
        """The main extractor."""
        return self.representations[0].extractor

    @property
    def reference(self) -> Statistics | None:
        """The reference of the main extractor."""
        return self.representations[0].reference

    @property
    def spatial(self) -> bool:
        """Whether any score needs spatial features."""
        return any(one.spatial for one in self.representations)


@dataclass(frozen=True)
class DrawnBatch:
    """Sampled images with their features by every extractor, and timing."""

    features: list[Features]
    pixels: Tensor  # [B, C, H, W] uint8, as in files
    seconds: float  # for sampling and decoding
    evaluations: int  # number of images evaluated by the network in the solver


def prepare_job(generator: Generator, settings: EvaluationConfig, sampling: SamplingConfig) -> Job:
    """Load the extractors and the reference, and refuse settings under which scoring would fail later."""
    shape = generator.model.condition_shape
    require(shape is None, "a model with conditions of shape", shape, "class labels, which scores need")
    check_sampling(sampling, generator.run.model, generator.run.sampling)
    generator = generator.at(sampling.precision)
    at_once = min(settings.batch_size, settings.num_images)
    room_here(generator.device.type).require(
        least_of_drawing(generator.run, at_once), evaluation__batch_size=settings.batch_size
    )
    semantic = generator.model.has_features
    found = representations_of(settings, generator.run, generator.class_names, semantic, generator.device)
    features = settings.num_images * sum(one.extractor.num_features for one in found) * FLOAT_BYTES
    room_here("cpu").require(
        features, evaluation__num_images=settings.num_images, evaluation__extractor=settings.extractor
    )
    check_neighbours(settings, found[0].reference)
    of_row = generator.run.model.num_references if settings.keep == "all" else 1
    for name in ("num_images", "batch_size"):
        value = getattr(settings, name)
        allowed = f"a multiple of the {of_row} images of a row that are kept"
        require(value % of_row == 0, f"evaluation.{name}", value, allowed)
    rows = dataclasses.replace(settings, num_images=settings.num_images // of_row)
    labels = choose_labels(rows, generator.run.model.num_classes).repeat_interleave(of_row)
    generator = generator.for_images(rows.num_images, sampling)
    return Job(generator, settings, sampling, found, labels, of_row)


def check_neighbours(settings: EvaluationConfig, reference: Statistics | None) -> None:
    """Refuse more neighbours than there are images."""
    neighbours = settings.num_neighbours
    if reference is not None and {"precision", "recall"} & set(settings.metrics):
        where = f"evaluation.num_neighbours: features of {settings.reference}"
        require(neighbours < reference.num_features, where, reference.num_features, f"more than {neighbours}")
    allowed = f"less than num_images={settings.num_images}"
    require(neighbours < settings.num_images, "evaluation.num_neighbours", neighbours, allowed)


def draw_batch(job: Job, batch: Sequence[int]) -> DrawnBatch:
    """Sample the images of the indices ``batch`` and extract their features."""
    generator = job.generator
    first = batch[:: job.images_of_row]  # one per row
    with counted_rows(generator) as rows:
        started = clock(generator.device)
        drawn = generator.images(job.labels[list(first)], image_seeds(job.settings, first), job.sampling)
        images = drawn[:, -job.images_of_row :].flatten(0, 1)  # [B, C, H, W]
        seconds = clock(generator.device) - started
    features = [one.extractor(images, spatial=one.spatial) for one in job.representations]
    return DrawnBatch(features, to_bytes(images).cpu(), seconds, rows())


def with_reference(job: Job, folder: Path) -> Job:
    """``job`` with all features of real images that its metrics need, stored in ``folder`` if need be."""
    run = job.generator.run
    found = [with_images(one, job.settings, run, folder) for one in job.representations]
    return dataclasses.replace(job, representations=found)


def scored_images(job: Job, features: Sequence[Features], spatial: Iterable[Tensor]) -> list[Scored]:
    """Sampled images as every representation sees them; ``spatial`` yields chunks [B, S], read if needed."""
    semantic = partial(job.generator.features, sampling=job.sampling)
    balanced = job.settings.label_mode == "balanced"
    group = groups_of(job.labels, balanced=balanced, rows=job.images_of_row)
    found = []
    for one, own in zip(job.representations, features, strict=True):
        scored = scored_of(one, own, job.labels, spatial if one.spatial else ())
        found.append(
            dataclasses.replace(scored, group=group, semantic_features=None if one.prefix else semantic)
        )
    return found


def score(job: Job, features: Sequence[Features], spatial: Iterable[Tensor]) -> Measured:
    """All scores of sampled images, with the values for their uncertainty."""
    return measure_all(job.representations, scored_images(job, features, spatial), job.settings)


def choose_labels(settings: EvaluationConfig, num_classes: int) -> Tensor:
    """The class [N] of every image: equal numbers in order of class, or random by ``settings.seed``."""
    if settings.label_mode == "balanced":
        return torch.arange(settings.num_images) * num_classes // settings.num_images
    return torch.from_numpy(
        np.random.default_rng(settings.seed).integers(num_classes, size=settings.num_images)
    )


def images_of_a_class(labels: Tensor, num_classes: int) -> list[int]:
    """The smallest and largest number of images of a class."""
    counts = labels.bincount(minlength=num_classes)
    return [int(counts.min()), int(counts.max())]


def image_seeds(settings: EvaluationConfig, indices: Sequence[int]) -> list[int]:
    """One seed per image; different ``settings.seed`` have no common seeds below a million images."""
    return [settings.seed * 1_000_003 + i for i in indices]


def clock(device: torch.device) -> float:
    """The time in seconds, after all queued work of ``device`` is complete."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def counted_rows(generator: Generator) -> Iterator[Callable[[], int]]:
    """A function that says how many rows the solver's network had within the context."""
    network, graphs = generator.network, generator.graphs
    if graphs is not None:  # graphs do not call the module
        before = graphs.rows
        yield lambda: graphs.rows - before
        return
    rows: list[int] = []
    handle = network.evaluated.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    try:
        yield lambda: sum(rows)
    finally:
        handle.remove()
