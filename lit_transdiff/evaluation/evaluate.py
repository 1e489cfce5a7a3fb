"""Draw images from a trained model, score them, and write the scores with everything that decided them.

Shapes: N images, R references, C channels, H W pixels, D features, K classes; W ranks, M images of one rank.
Image i has its own seed and label and rank i mod W draws it: the scores do not depend on W or on the batch size.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lit_transdiff.config import EvaluationConfig, SamplingConfig, require
from lit_transdiff.evaluation.features import FeatureExtractor, load_extractor
from lit_transdiff.evaluation.metrics import Scored, check_metrics, compute_scores, there
from lit_transdiff.evaluation.results import manifest, result_file, write_result
from lit_transdiff.evaluation.statistics import Statistics, check_extractor, load_statistics
from lit_transdiff.pictures import grid
from lit_transdiff.sampling import Generator, check_sampling

if TYPE_CHECKING:
    from lightning.fabric import Fabric

SHOWN_CLASSES, SHOWN_IMAGES = 10, 8  # rows and columns of the picture
SHOWN_PIXELS = 96  # smaller images are enlarged towards this size


@dataclass(frozen=True)
class Share:
    """What one rank drew, and after ``gather`` what all drew."""

    features: Tensor  # [M, D]
    logits: Tensor | None  # [M, K]
    samples: Tensor  # [rows * columns, C, H, W], zero where another rank drew the image
    seconds: float  # spent on drawing and decoding
    evaluations: float  # images that went through the diffusion decoder


def evaluate(
    generator: Generator,
    settings: EvaluationConfig,
    sampling: SamplingConfig,
    *,
    output: Path,
    fabric: Fabric | None = None,
    reuse: bool = False,
) -> dict[str, Any]:
    """Score ``settings.num_images`` images and write ``output/evaluations/<run>-<hash>.json`` and its picture ``.png``.

    The hash is of all settings that decide the scores: the same settings replace the file (with ``reuse`` what it says is
    returned and nothing drawn), others make another. Of an MRAR row (R > 1) the last image is scored. Every rank of
    ``fabric`` calls this, with the generator on its device, and gets ``{"scores", "manifest", "file"}``.

    Raises ``ValueError`` before any image is drawn for a metric that lacks what it needs, or a reference made
    with another extractor.
    """
    start = time.time()
    rank, world = (fabric.global_rank, fabric.world_size) if fabric else (0, 1)
    extractor, reference = prepare(generator, settings, sampling, world)
    record = manifest(generator, settings, sampling, extractor, reference)
    file = result_file(output, record)
    if reuse and (fabric.broadcast(file.exists()) if fabric else file.exists()):
        return {**json.loads(file.read_text()), "file": str(file)}
    num_classes = generator.run.model.num_classes
    labels = choose_labels(settings, num_classes)
    shown = choose_shown(labels)
    share = gather(draw(generator, extractor, settings, sampling, labels, shown, rank, world), settings.num_images, fabric)
    result: dict[str, Any] = {}
    if rank == 0:
        features, semantic = share.features.to(generator.device), partial(generator.features, sampling=sampling)
        generated = Scored(features, labels, share.logits, extractor.num_classes == num_classes, semantic)
        scores = compute_scores(generated, reference, settings)
        record |= {
            "images_per_second": settings.num_images / share.seconds,
            "decoder_evaluations_per_image": share.evaluations / settings.num_images,
            "wall_seconds": time.time() - start,
            "num_ranks": world,
        }
        picture = sample_picture(share.samples, labels[shown], generator.class_names, file.stem)
        file = write_result(output, scores, record, picture)
        result = {"scores": scores, "manifest": record, "file": str(file)}
    return fabric.broadcast(result) if fabric else result


def prepare(
    generator: Generator, settings: EvaluationConfig, sampling: SamplingConfig, world: int
) -> tuple[FeatureExtractor, Statistics | None]:
    """Load the extractor and the reference, and refuse whatever could not be scored after the images are drawn."""
    check_sampling(sampling)
    require(
        settings.num_images >= world, "evaluation.num_images", settings.num_images, f"at least one for each of {world} processes"
    )
    extractor = load_extractor(settings.extractor, settings.extractor_weights, generator.device)
    reference = load_statistics(settings.reference) if settings.reference else None
    if reference is not None:
        check_extractor(reference, extractor)
    names_classes = extractor.num_classes == generator.run.model.num_classes
    check_metrics(settings.metrics, there(reference, logits=True, class_logits=names_classes, semantic=True))
    neighbours = settings.num_neighbours
    require(
        neighbours < settings.num_images, "evaluation.num_neighbours", neighbours, f"less than num_images={settings.num_images}"
    )
    return extractor, reference


def choose_labels(settings: EvaluationConfig, num_classes: int) -> Tensor:
    """The class [N] of every image: equally many of each in order of class, or drawn from ``settings.seed``."""
    if settings.label_mode == "balanced":
        return torch.arange(settings.num_images) * num_classes // settings.num_images
    return torch.from_numpy(np.random.default_rng(settings.seed).integers(num_classes, size=settings.num_images))


def image_seeds(settings: EvaluationConfig, indices: Sequence[int]) -> list[int]:
    """One seed an image; evaluations with different ``settings.seed`` share none below a million images."""
    return [settings.seed * 1_000_003 + i for i in indices]


def choose_shown(labels: Tensor) -> Tensor:
    """Indices [rows, columns] of the images in the picture: the first few of up to ten classes at equal distances."""
    present = labels.unique()
    classes = present[torch.linspace(0, len(present) - 1, min(SHOWN_CLASSES, len(present))).long()]
    found = [(labels == c).nonzero()[:SHOWN_IMAGES, 0] for c in classes]
    columns = min(len(indices) for indices in found)
    return torch.stack([indices[:columns] for indices in found])


def sample_picture(samples: Tensor, labels: Tensor, class_names: Sequence[str], title: str) -> Image.Image:
    """The grid of ``samples`` [rows * columns, C, H, W] with ``labels`` [rows, columns], one class a row."""
    rows = [class_names[c] if class_names else str(c) for c in labels[:, 0].tolist()]
    scale = max(1, SHOWN_PIXELS // samples.shape[-1])
    return grid(samples, labels.shape[1], row_labels=rows, scale=scale, title=title)


def draw(
    generator: Generator,
    extractor: FeatureExtractor,
    settings: EvaluationConfig,
    sampling: SamplingConfig,
    labels: Tensor,
    shown: Tensor,
    rank: int = 0,
    world: int = 1,
) -> Share:
    """Draw the images ``rank``, ``rank + world``, ... in batches; keep their features, not the images (but for ``shown``)."""
    mine = list(range(rank, settings.num_images, world))
    place = {index: i for i, index in enumerate(shown.flatten().tolist())}
    features, logits, samples, seconds = [], [], torch.empty(0), 0.0
    with counted_rows(generator.model.decoder) as rows, tqdm(total=len(mine), desc="images", disable=rank != 0) as progress:
        for first in range(0, len(mine), settings.batch_size):
            indices = mine[first : first + settings.batch_size]
            started = clock(generator.device)
            images = generator.images(labels[indices], image_seeds(settings, indices), sampling)[:, -1]  # [B, C, H, W]
            seconds += clock(generator.device) - started
            found = extractor(images)
            features.append(found.features.cpu())
            logits.append(found.logits.cpu() if found.logits is not None else None)
            if first == 0:
                samples = torch.zeros(len(place), *images.shape[1:])
            for index, image in zip(indices, images, strict=True):
                if index in place:
                    samples[place[index]] = image.float().cpu()
            progress.update(len(indices))
    kept = [part for part in logits if part is not None]
    return Share(torch.cat(features), torch.cat(kept) if kept else None, samples, seconds, float(sum(rows)))


def gather(share: Share, num_images: int, fabric: Fabric | None) -> Share:
    """The shares of all ranks as one, rows in the order of the images' indices; the time is that of the slowest rank."""
    if fabric is None or fabric.world_size == 1:
        return share
    totals = of_all_ranks(torch.tensor([share.seconds, share.evaluations], dtype=torch.float64), fabric)
    return Share(
        features=in_order(share.features, num_images, fabric),
        logits=None if share.logits is None else in_order(share.logits, num_images, fabric),
        samples=of_all_ranks(share.samples, fabric).sum(dim=0),
        seconds=float(totals[:, 0].max()),
        evaluations=float(totals[:, 1].sum()),
    )


def in_order(rows: Tensor, num_images: int, fabric: Fabric) -> Tensor:
    """[M, D] of each rank -> [N, D]: row m of rank w is image m W + w; shorter shares are padded, and that lies at the end."""
    longest = math.ceil(num_images / fabric.world_size)
    padded = torch.nn.functional.pad(rows, (0, 0, 0, longest - len(rows)))
    return rearrange(of_all_ranks(padded, fabric), "w m d -> (m w) d")[:num_images]


def of_all_ranks(tensor: Tensor, fabric: Fabric) -> Tensor:
    """A tensor of one shape on every rank -> [W, ...] on the CPU."""
    gathered = fabric.all_gather(tensor)
    assert isinstance(gathered, Tensor)
    return gathered.cpu()


def clock(device: torch.device) -> float:
    """Seconds, after all work given to ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def counted_rows(module: torch.nn.Module) -> Iterator[list[int]]:
    """A list that gets the batch size of every call of ``module`` while the context is open."""
    rows: list[int] = []
    handle = module.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    try:
        yield rows
    finally:
        handle.remove()
