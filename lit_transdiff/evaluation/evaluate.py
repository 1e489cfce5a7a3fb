"""Sample images from a trained model, score them, and write the scores with all their conditions.

Shapes: N images, B images of a batch, R references, C channels, H W pixels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lit_transdiff.base.files import read_json, require_space
from lit_transdiff.base.locks import FolderLock
from lit_transdiff.config import EvaluationConfig, SamplingConfig, unknown
from lit_transdiff.data.pixels import from_bytes
from lit_transdiff.evaluation.batch_files import (
    BatchFiles,
    open_batch_files,
    wait_for_batches,
    wait_for_scores,
)
from lit_transdiff.evaluation.errors import uncertainty
from lit_transdiff.evaluation.extractor import Features
from lit_transdiff.evaluation.images import write_npz, write_pngs
from lit_transdiff.evaluation.job import (
    Job,
    draw_batch,
    images_of_a_class,
    prepare_job,
    scored_images,
    with_reference,
)
from lit_transdiff.evaluation.memorisation import nearest_training_images
from lit_transdiff.evaluation.representations import measure_all
from lit_transdiff.evaluation.results import manifest, result_file, write_result
from lit_transdiff.evaluation.scores import nearest_file
from lit_transdiff.sampling.generator import Generator
from lit_transdiff.sampling.pictures import grid, save_picture

if TYPE_CHECKING:
    from lightning.fabric import Fabric

SHOWN_CLASSES, SHOWN_IMAGES = 10, 8  # rows and columns of the picture
# Values of --save-images -> the kinds of files for the images.
SAVE_IMAGES: dict[str, tuple[str, ...]] = {"npz": ("npz",), "folder": ("folder",), "both": ("npz", "folder")}


@dataclass(frozen=True)
class Output:
    """The outputs of an evaluation: its result ``file``, and the images in each of the ``saved`` forms."""

    file: Path
    saved: tuple[str, ...]

    @property
    def places(self) -> dict[str, Path]:
        """The paths of the saved images."""
        all_places = {
            "npz": self.file.with_suffix(".npz"),
            "folder": self.file.with_name(f"{self.file.stem}-images"),
        }
        return {kind: all_places[kind] for kind in self.saved}

    @property
    def is_there(self) -> bool:
        return self.file.exists() and all(place.exists() for place in self.places.values())

    def result(self) -> dict[str, Any]:
        """The scores, the manifest, and the path of the file."""
        return {**read_json(self.file), "file": str(self.file)}

    def batch_files(self, job: Job) -> BatchFiles:
        """The files of the batches, in a folder for this batch size and these outputs."""
        settings = job.settings
        kept = "-spatial" * job.spatial + "".join(f"-{kind}" for kind in self.saved)
        folder = self.file.with_name(f"{self.file.stem}-parts-{settings.batch_size}{kept}")
        return BatchFiles(folder, settings.num_images, settings.batch_size, self.places.get("folder"))


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
    """Score ``settings.num_images`` images; write ``output/evaluations/<run>-<hash>.json`` and ``.png``.

    The hash covers all settings that affect the scores: the same settings replace the file (or, with
    ``reuse``, return its content without sampling), other settings create another file. In an MRAR row (R >
    1) the last image is scored or, with ``settings.keep`` "all", every image: R times as many images for the
    same work, which are not independent. ``save_images`` (a name in SAVE_IMAGES) also saves the images, as
    ``<run>-<hash>.npz`` and in ``<run>-<hash>-images/``.

    Every rank of ``fabric`` calls this, with the generator on its device, and gets ``{"scores", "manifest",
    "file"}``. Completed batches are stored in a folder beside the result, which all ranks must share: the
    same call on any number of ranks continues a stopped evaluation.

    Raises ``ValueError`` before any sampling for a metric without its requirements, a reference made with
    another extractor, or a disk without space for an ``.npz`` of the images.
    """
    start = time.time()
    if save_images is not None and save_images not in SAVE_IMAGES:
        raise unknown("save_images", save_images, SAVE_IMAGES)
    job = prepare_job(generator, settings, sampling)
    record = manifest(generator, settings, sampling, job.representations)
    record |= {
        "spatial_features": job.spatial,
        "images_of_a_class": images_of_a_class(job.labels, generator.run.model.num_classes),
    }
    out = Output(result_file(output, record), SAVE_IMAGES[save_images] if save_images else ())
    if reuse and (fabric.broadcast(out.is_there) if fabric else out.is_there):
        return out.result()
    with FolderLock(out.batch_files(job).folder, "makes this evaluation") as lock:
        waited = (fabric is None or fabric.is_global_zero) and lock.take() and out.is_there
        if not (fabric.broadcast(waited) if fabric else waited):
            draw_and_score(job, out, record, fabric, start)
        elif fabric is None or fabric.is_global_zero:
            out.batch_files(job).remove()
    return out.result()


def draw_and_score(
    job: Job, output: Output, record: dict[str, Any], fabric: Fabric | None, start: float
) -> None:
    """Sample the missing batches on all ranks; then rank 0 writes the result, for which the others wait."""
    rank, world = (fabric.global_rank, fabric.world_size) if fabric else (0, 1)
    files = output.batch_files(job)
    missing = open_batch_files(files, fabric)
    try:
        if "npz" in output.saved:
            require_space(files.folder, bytes_to_write(job, sum(map(len, missing))))
        draw_missing(job, files, missing[rank::world], output.saved, progress=rank == 0)
        if rank > 0:
            return wait_for_scores(files, output.file)
        wait_for_batches(files)
        record |= {"saved_images": [place.name for place in output.places.values()], "num_ranks": world}
        finish_evaluation(job, files, output, record, start)
    except BaseException as error:
        files.fail(f"rank {rank}: {type(error).__name__}: {error}")
        raise
    files.remove()


def bytes_to_write(job: Job, missing: int) -> int:
    """The bytes of an ``.npz`` of all images (three channels), and of the ``missing`` images until then."""
    size = job.generator.run.model.latent_size * job.generator.autoencoder.downsampling
    return size**2 * (3 * job.settings.num_images + job.generator.run.data.image_channels * missing)


def draw_missing(
    job: Job, files: BatchFiles, batches: Sequence[range], saved: Sequence[str], progress: bool
) -> None:
    """Sample ``batches`` and write each to ``files``: features, numbers, and the images to show or save."""
    shown = set(choose_shown(job.labels).flatten().tolist())
    with tqdm(total=sum(map(len, batches)), desc="images", disable=not progress) as bar:
        for batch in batches:
            drawn = draw_batch(job, batch)
            if "folder" in saved:
                write_pngs(files.images, drawn.pixels, batch)
            keep = [i for i in batch if "npz" in saved or i in shown]
            arrays = arrays_of(job, drawn.features) | {
                "kept": np.array(keep, dtype=np.int64),
                "pixels": drawn.pixels[[i - batch.start for i in keep]].numpy(),
            }
            files.write(batch, arrays | {"cost": np.array([drawn.seconds, drawn.evaluations])})
            bar.update(len(batch))


def arrays_of(job: Job, features: Sequence[Features]) -> dict[str, np.ndarray]:
    """The features of a batch as arrays, those of further extractors with the extractor in their name."""
    return {
        f"{one.prefix.replace('/', '-')}{name}": value.cpu().numpy()
        for one, own in zip(job.representations, features, strict=True)
        for name, value in own._asdict().items()
        if value is not None
    }


def features_in(job: Job, files: BatchFiles) -> list[Features]:
    """The features and logits of all batches by every extractor."""

    def rows(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate(list(files.each(name))))

    prefixes = [one.prefix.replace("/", "-") for one in job.representations]
    return [
        Features(rows(f"{prefix}features"), rows(f"{prefix}logits") if one.extractor.gives_logits else None)
        for one, prefix in zip(job.representations, prefixes, strict=True)
    ]


def finish_evaluation(
    job: Job, files: BatchFiles, output: Output, record: dict[str, Any], start: float
) -> None:
    """Score all batches, complete ``record`` and write the result and the images. Only rank 0 does this."""
    job = with_reference(job, output.file.parent)
    scored = scored_images(job, features_in(job, files), map(torch.from_numpy, files.each("spatial")))
    measured = measure_all(job.representations, scored, job.settings)
    memorised, pairs = nearest_training_images(job, scored[0], output.file.parent)
    seconds, evaluations = np.stack(list(files.each("cost"))).sum(axis=0).tolist()
    record |= {
        **uncertainty(measured, scored, job),
        "nearest_training_images": memorised,
        "images_per_second": job.settings.num_images / seconds,  # per device
        "decoder_evaluations_per_image": evaluations / job.settings.num_images,
        "wall_seconds": time.time() - start,  # the time of the whole command
    }
    shown = choose_shown(job.labels)
    picture = sample_picture(
        drawn_images(files, shown), job.labels[shown], job.generator.class_names, output.file.stem
    )
    if pairs is not None:
        save_picture(pairs, nearest_file(output.file))
    write_result(output.file, measured.scores, record, picture)
    if "npz" in output.saved:
        write_npz(output.places["npz"], files.each("pixels"), job.labels.numpy())
    files.publish_images()


def drawn_images(files: BatchFiles, shown: Tensor) -> Tensor:
    """The sampled images of the indices ``shown``, flattened in order: [n, C, H, W] in [-1, 1]."""
    wanted: list[int] = shown.flatten().tolist()
    found: dict[int, np.ndarray] = {}
    for kept, pixels in zip(files.each("kept"), files.each("pixels"), strict=True):
        found |= {i: pixels[place].copy() for place, i in enumerate(kept.tolist()) if i in wanted}
    return from_bytes(torch.from_numpy(np.stack([found[i] for i in wanted])))


def choose_shown(labels: Tensor) -> Tensor:
    """Indices [rows, columns] of the images to show: the first few of up to ten equidistant classes."""
    present = labels.unique()
    classes = present[torch.linspace(0, len(present) - 1, min(SHOWN_CLASSES, len(present))).long()]
    found = [(labels == c).nonzero()[:SHOWN_IMAGES, 0] for c in classes]
    columns = min(len(indices) for indices in found)
    return torch.stack([indices[:columns] for indices in found])


def sample_picture(images: Tensor, labels: Tensor, class_names: Sequence[str], title: str) -> Image.Image:
    """The grid of ``images`` [rows * columns, C, H, W] with ``labels`` [rows, columns], one class per row."""
    rows = [class_names[c] if class_names else str(c) for c in labels[:, 0].tolist()]
    return grid(images, labels.shape[1], row_labels=rows, title=title)
