"""The work of one evaluation: generator, extractor and reference, sampling of batches, and scores.

Shapes: N images, B images of a batch, R references, C channels, H W pixels, D features, K classes. Image i
has its own seed and label, and batches are fixed ranges of images, so that the numbers do not depend on the
number of ranks.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lit_transdiff.config import EvaluationConfig, SamplingConfig, require, require_classes
from lit_transdiff.data.pixels import to_bytes
from lit_transdiff.evaluation.features import FeatureExtractor, Features, load_extractor
from lit_transdiff.evaluation.metrics import Scored, check_metrics, compute_scores, needed_by, there
from lit_transdiff.evaluation.moments import gaussian_of
from lit_transdiff.evaluation.scores import Score
from lit_transdiff.evaluation.statistics import Statistics, check_extractor, completed, load_statistics
from lit_transdiff.models.sizes import FLOAT_BYTES, least_of_drawing, room_here
from lit_transdiff.sampling.generator import Generator, check_sampling


@dataclass(frozen=True)
class Job:
    """One evaluation, loaded and checked: generator, extractor, reference and settings."""

    generator: Generator
    settings: EvaluationConfig
    sampling: SamplingConfig
    extractor: FeatureExtractor
    reference: Statistics | None
    labels: Tensor  # [N]
    images_of_row: int  # number of scored images per row
    needs: set[str]  # requirements of the metrics, as in metrics.NEEDS

    @property
    def spatial(self) -> bool:
        return "spatial features" in self.needs


@dataclass(frozen=True)
class DrawnBatch:
    """Sampled images with their features and timing."""

    features: Features
    pixels: Tensor  # [B, C, H, W] uint8, as in files
    seconds: float  # for sampling and decoding
    evaluations: int  # number of images evaluated by the network in the solver


def prepare_job(generator: Generator, settings: EvaluationConfig, sampling: SamplingConfig) -> Job:
    """Load the extractor and the reference, and refuse settings under which scoring would fail later."""
    shape = generator.model.condition_shape
    require(shape is None, "a model with conditions of shape", shape, "class labels, which scores need")
    check_sampling(sampling, generator.run.model)
    generator = generator.at(sampling.precision)
    at_once = min(settings.batch_size, settings.num_images)
    room_here(generator.device.type).require(
        least_of_drawing(generator.run, at_once), evaluation__batch_size=settings.batch_size
    )
    extractor = load_extractor(settings.extractor, settings.extractor_weights, generator.device)
    features = settings.num_images * extractor.num_features * FLOAT_BYTES
    room_here("cpu").require(
        features, evaluation__num_images=settings.num_images, evaluation__extractor=settings.extractor
    )
    reference = load_statistics(settings.reference) if settings.reference else None
    if reference is not None:
        check_extractor(reference, extractor)
    num_classes = generator.run.model.num_classes
    have = there(
        reference,
        logits=extractor.gives_logits,
        class_logits=extractor.num_classes == num_classes,
        semantic=generator.model.has_features,
        spatial=extractor.num_spatial is not None,
    )
    check_metrics(settings.metrics, have)
    if "class logits" in needed_by(settings.metrics):
        where = f"evaluation.extractor_weights: {settings.extractor_weights}"
        require_classes(where, extractor.class_names, generator.class_names, "the trained run")
    neighbours = settings.num_neighbours
    if reference is not None and {"precision", "recall"} & set(settings.metrics):
        where = f"evaluation.num_neighbours: features of {settings.reference}"
        require(neighbours < reference.num_features, where, reference.num_features, f"more than {neighbours}")
    require(
        neighbours < settings.num_images,
        "evaluation.num_neighbours",
        neighbours,
        f"less than num_images={settings.num_images}",
    )
    of_row = generator.run.model.num_references if settings.keep == "all" else 1
    for name in ("num_images", "batch_size"):
        value = getattr(settings, name)
        require(
            value % of_row == 0,
            f"evaluation.{name}",
            value,
            f"a multiple of the {of_row} images of a row that are kept",
        )
    rows = choose_labels(dataclasses.replace(settings, num_images=settings.num_images // of_row), num_classes)
    return Job(
        generator,
        settings,
        sampling,
        extractor,
        reference,
        rows.repeat_interleave(of_row),
        of_row,
        needed_by(settings.metrics),
    )


def draw_batch(job: Job, batch: Sequence[int]) -> DrawnBatch:
    """Sample the images of the indices ``batch`` and extract their features."""
    generator = job.generator
    first = batch[:: job.images_of_row]  # one per row
    with counted_rows(generator.network.evaluated) as rows:
        started = clock(generator.device)
        drawn = generator.images(job.labels[list(first)], image_seeds(job.settings, first), job.sampling)
        images = drawn[:, -job.images_of_row :].flatten(0, 1)  # [B, C, H, W]
        seconds = clock(generator.device) - started
    return DrawnBatch(job.extractor(images, spatial=job.spatial), to_bytes(images).cpu(), seconds, sum(rows))


def with_reference(job: Job, folder: Path) -> Job:
    """``job`` with all statistics that its metrics need from the reference's images (see ``completed``)."""
    if job.reference is None:
        return job
    features = "reference features" in job.needs
    reference = completed(job.reference, job.extractor, folder, features=features, spatial=job.spatial)
    return dataclasses.replace(job, reference=reference)


def score(job: Job, features: Features, spatial: Iterable[Tensor]) -> dict[str, Score]:
    """All scores of sampled images; ``spatial`` yields chunks [B, S] of spatial features, read if needed."""
    generator = job.generator
    scored = Scored(
        features.features.to(generator.device),
        job.labels,
        features.logits,
        job.extractor.num_classes == generator.run.model.num_classes,
        partial(generator.features, sampling=job.sampling),
        gaussian_of(spatial) if job.spatial else None,
    )
    return compute_scores(scored, job.reference, job.settings)


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
def counted_rows(module: torch.nn.Module) -> Iterator[list[int]]:
    """A list that records the batch size of every call of ``module`` within the context."""
    rows: list[int] = []
    handle = module.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    try:
        yield rows
    finally:
        handle.remove()
