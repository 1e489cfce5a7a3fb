"""Draw images from a trained model, score them, and write the scores with everything that decided them.

Shapes: N images, B images of a batch, R references, C channels, H W pixels, D features, K classes.
Image i has its own seed and label, and batches are fixed ranges of images: the numbers do not depend on how many ranks draw them.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lit_transdiff.config import EvaluationConfig, SamplingConfig, require, unknown
from lit_transdiff.evaluation.features import FeatureExtractor, Features, load_extractor
from lit_transdiff.evaluation.images import write_npz, write_pngs
from lit_transdiff.evaluation.metrics import Score, Scored, check_metrics, compute_scores, needed_by, there
from lit_transdiff.evaluation.moments import gaussian_of
from lit_transdiff.evaluation.parts import Parts, open_parts, wait_for_batches, wait_for_scores
from lit_transdiff.evaluation.results import manifest, result_file, write_result
from lit_transdiff.evaluation.statistics import Statistics, check_extractor, completed, load_statistics
from lit_transdiff.pictures import grid, to_bytes
from lit_transdiff.sampling import Generator, check_sampling

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Array = np.ndarray
SHOWN_CLASSES, SHOWN_IMAGES = 10, 8  # rows and columns of the picture
SHOWN_PIXELS = 96  # smaller images are enlarged towards this size
# What --save-images says -> the files that the images are written to.
SAVE_IMAGES: dict[str, tuple[str, ...]] = {"npz": ("npz",), "folder": ("folder",), "both": ("npz", "folder")}


@dataclass(frozen=True)
class Job:
    """One evaluation, loaded and checked: what draws, what judges, and what it is compared with."""

    generator: Generator
    settings: EvaluationConfig
    sampling: SamplingConfig
    extractor: FeatureExtractor
    reference: Statistics | None
    labels: Tensor  # [N]
    kept: int  # images of a row that are scored
    needs: set[str]  # of the metrics, as in metrics.NEEDS

    @property
    def spatial(self) -> bool:
        return "spatial features" in self.needs


@dataclass(frozen=True)
class Batch:
    """What is known of drawn images."""

    found: Features
    pixels: Tensor  # [B, C, H, W] uint8, as a file holds them
    seconds: float  # spent on drawing and decoding
    evaluations: int  # images that went through the diffusion decoder


def evaluate(
    generator: Generator,
    settings: EvaluationConfig,
    sampling: SamplingConfig,
    *,
    output: Path,
    fabric: Fabric | None = None,
    reuse: bool = False,
    save_images: str | None = None,
) -> dict[str, Any]:
    """Score ``settings.num_images`` images and write ``output/evaluations/<run>-<hash>.json`` and its picture ``.png``.

    The hash is of all settings that decide the scores: the same settings replace the file (with ``reuse`` what it says is
    returned and nothing drawn), others make another. Of an MRAR row (R > 1) the last image is scored, or with
    ``settings.keep`` "all" each: R times as many images for the same work, which are not independent. ``save_images`` (a name in
    SAVE_IMAGES) also keeps the images, as ``<run>-<hash>.npz`` and in ``<run>-<hash>-images/``.

    Every rank of ``fabric`` calls this, with the generator on its device, and gets ``{"scores", "manifest", "file"}``. Finished
    batches wait in a folder beside the result, which all ranks must share: the same call on any number of ranks continues an
    evaluation that was stopped.

    Raises ``ValueError`` before any image is drawn for a metric that lacks what it needs, or a reference made
    with another extractor.
    """
    start = time.time()
    rank, world = (fabric.global_rank, fabric.world_size) if fabric else (0, 1)
    if save_images is not None and save_images not in SAVE_IMAGES:
        raise unknown("save_images", save_images, SAVE_IMAGES)
    saved = SAVE_IMAGES[save_images] if save_images else ()
    job = prepare(generator, settings, sampling)
    record = manifest(generator, settings, sampling, job.extractor, job.reference)
    record |= {
        "spatial_features": job.spatial,
        "images_of_a_class": images_of_a_class(job.labels, generator.run.model.num_classes),
    }
    file = result_file(output, record)
    places = {"npz": file.with_suffix(".npz"), "folder": file.with_name(f"{file.stem}-images")}
    there_already = file.exists() and all(places[kind].exists() for kind in saved)
    if reuse and (fabric.broadcast(there_already) if fabric else there_already):
        return {**json.loads(file.read_text()), "file": str(file)}
    kept = "-spatial" * job.spatial + "".join(f"-{kind}" for kind in saved)
    folder = file.with_name(f"{file.stem}-parts-{settings.batch_size}{kept}")
    parts = Parts(folder, settings.num_images, settings.batch_size, "folder" in saved, places["folder"])
    batches = open_parts(parts, fabric)[rank::world]
    try:
        draw_missing(job, parts, batches, saved, progress=rank == 0)
        if rank > 0:
            wait_for_scores(parts, file)
            return {**json.loads(file.read_text()), "file": str(file)}
        wait_for_batches(parts)
        record |= {"saved_images": [places[kind].name for kind in saved], "num_ranks": world}
        scores = finish(job, parts, file, record, start)
        if "npz" in saved:
            write_npz(places["npz"], parts.each("pixels"), job.labels.numpy())
        parts.publish_images()
    except BaseException as error:
        parts.fail(f"rank {rank}: {type(error).__name__}: {error}")
        raise
    parts.remove()
    return {"scores": scores, "manifest": record, "file": str(file)}


def prepare(generator: Generator, settings: EvaluationConfig, sampling: SamplingConfig) -> Job:
    """Load the extractor and the reference, and refuse whatever could not be scored after the images are drawn."""
    check_sampling(sampling)
    extractor = load_extractor(settings.extractor, settings.extractor_weights, generator.device)
    reference = load_statistics(settings.reference) if settings.reference else None
    if reference is not None:
        check_extractor(reference, extractor)
    num_classes = generator.run.model.num_classes
    have = there(
        reference,
        logits=extractor.gives_logits,
        class_logits=extractor.num_classes == num_classes,
        semantic=True,
        spatial=extractor.num_spatial is not None,
    )
    check_metrics(settings.metrics, have)
    neighbours = settings.num_neighbours
    if reference is not None and {"precision", "recall"} & set(settings.metrics):
        where = f"evaluation.num_neighbours: features of {settings.reference}"
        require(neighbours < reference.num_features, where, reference.num_features, f"more than {neighbours}")
    require(
        neighbours < settings.num_images, "evaluation.num_neighbours", neighbours, f"less than num_images={settings.num_images}"
    )
    kept = generator.run.model.num_references if settings.keep == "all" else 1
    for name in ("num_images", "batch_size"):
        value = getattr(settings, name)
        require(value % kept == 0, f"evaluation.{name}", value, f"a multiple of the {kept} images of a row that are kept")
    rows = choose_labels(dataclasses.replace(settings, num_images=settings.num_images // kept), num_classes)
    return Job(
        generator, settings, sampling, extractor, reference, rows.repeat_interleave(kept), kept, needed_by(settings.metrics)
    )


def draw_missing(job: Job, parts: Parts, batches: Sequence[range], saved: Sequence[str], progress: bool) -> None:
    """Draw ``batches`` and write each to ``parts``: features, numbers, and of the images those that are shown or saved."""
    shown = set(choose_shown(job.labels).flatten().tolist())
    with tqdm(total=sum(map(len, batches)), desc="images", disable=not progress) as bar:
        for batch in batches:
            drawn = draw(job, batch)
            if "folder" in saved:
                write_pngs(parts.images, drawn.pixels, batch)
            keep = [i for i in batch if "npz" in saved or i in shown]
            arrays = {name: value.cpu().numpy() for name, value in drawn.found._asdict().items() if value is not None}
            arrays |= {"kept": np.array(keep, dtype=np.int64), "pixels": drawn.pixels[[i - batch.start for i in keep]].numpy()}
            parts.write(batch, arrays | {"cost": np.array([drawn.seconds, drawn.evaluations])})
            bar.update(len(batch))


def draw(job: Job, batch: Sequence[int]) -> Batch:
    """Draw the images of the indices ``batch`` and extract their features."""
    generator = job.generator
    first = batch[:: job.kept]  # of each row
    with counted_rows(generator.network(job.sampling.precision).decoder) as rows:
        started = clock(generator.device)
        drawn = generator.images(job.labels[list(first)], image_seeds(job.settings, first), job.sampling)
        images = drawn[:, -job.kept :].flatten(0, 1)  # [B, C, H, W]
        seconds = clock(generator.device) - started
    return Batch(job.extractor(images, spatial=job.spatial), to_bytes(images).cpu(), seconds, sum(rows))


def finish(job: Job, parts: Parts, file: Path, record: dict[str, Any], start: float) -> dict[str, Score]:
    """Score all batches and write the result ``file``; ``record`` gets what is known now. Rank 0 alone does this."""
    features = torch.from_numpy(np.concatenate(list(parts.each("features"))))
    logits = torch.from_numpy(np.concatenate(list(parts.each("logits")))) if job.extractor.gives_logits else None
    job = with_reference(job, file.parent)
    scores = score(job, Features(features, logits), map(torch.from_numpy, parts.each("spatial")))
    seconds, evaluations = np.stack(list(parts.each("cost"))).sum(axis=0).tolist()
    record |= {
        "images_per_second": job.settings.num_images / seconds,  # of one device
        "decoder_evaluations_per_image": evaluations / job.settings.num_images,
        "wall_seconds": time.time() - start,  # of this command
    }
    shown = choose_shown(job.labels)
    wanted: list[int] = shown.flatten().tolist()
    pictures: dict[int, Array] = {}
    for kept, pixels in zip(parts.each("kept"), parts.each("pixels"), strict=True):
        pictures |= {i: pixels[place].copy() for place, i in enumerate(kept.tolist()) if i in wanted}
    samples = torch.from_numpy(np.stack([pictures[i] for i in wanted])).float() / 127.5 - 1
    write_result(file, scores, record, sample_picture(samples, job.labels[shown], job.generator.class_names, file.stem))
    return scores


def with_reference(job: Job, folder: Path) -> Job:
    """``job`` with everything that its metrics need of the reference's images (see ``completed``)."""
    if job.reference is None:
        return job
    features = "reference features" in job.needs
    reference = completed(job.reference, job.extractor, folder, features=features, spatial=job.spatial)
    return dataclasses.replace(job, reference=reference)


def score(job: Job, found: Features, spatial: Iterable[Tensor]) -> dict[str, Score]:
    """All scores of drawn images; ``spatial`` gives chunks [B, S] of their spatial features, and is read only where needed."""
    generator = job.generator
    scored = Scored(
        found.features.to(generator.device),
        job.labels,
        found.logits,
        job.extractor.num_classes == generator.run.model.num_classes,
        partial(generator.features, sampling=job.sampling),
        gaussian_of(spatial) if job.spatial else None,
    )
    return compute_scores(scored, job.reference, job.settings)


def choose_labels(settings: EvaluationConfig, num_classes: int) -> Tensor:
    """The class [N] of every image: equally many of each in order of class, or drawn from ``settings.seed``."""
    if settings.label_mode == "balanced":
        return torch.arange(settings.num_images) * num_classes // settings.num_images
    return torch.from_numpy(np.random.default_rng(settings.seed).integers(num_classes, size=settings.num_images))


def images_of_a_class(labels: Tensor, num_classes: int) -> list[int]:
    """Fewest and most images that a class has."""
    counts = labels.bincount(minlength=num_classes)
    return [int(counts.min()), int(counts.max())]


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
