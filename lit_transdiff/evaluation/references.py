"""Features of real images for any extractor, computed once: references, other real images, training images.

Shapes: N images, B images of a batch, C channels, H W pixels, D features.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lit_transdiff.base.remote import is_remote
from lit_transdiff.config import DataConfig, errors_at, require
from lit_transdiff.config.checks import BUNDLED, roots
from lit_transdiff.data.index import read_index
from lit_transdiff.data.index_files import check_index
from lit_transdiff.evaluation.extractor import FeatureExtractor
from lit_transdiff.evaluation.images import image_batches, images_shape
from lit_transdiff.evaluation.prepare import batches_of, images_of, made_of
from lit_transdiff.evaluation.statistics import (
    Statistics,
    check_extractor,
    load_statistics,
    reference_statistics,
    save_statistics,
)

MOST_KEPT = 50_000  # features of images that are kept; of more images, a uniform sample
BATCH = 100  # images that an extractor sees at once


def check_seen(source: str, what: str, data: DataConfig, extractors: Sequence[FeatureExtractor]) -> None:
    """Refuse a source that holds no images, or images that an extractor cannot see."""
    if source.endswith(".npz"):
        require(Path(source).is_file(), what, source, "a file that exists")
        images_shape(source)
    else:
        check_index(source)
        latents = read_index(source).latents
        require(latents is None, what, source, "shards of images; these hold latents")
    first = next(image_batches_of(source, data, 1))
    for extractor in extractors:
        with errors_at(f"{what}: {source}"):
            extractor(first.to(extractor.device))


def images_hash(source: str | None, data: DataConfig) -> str | None:
    """16 hexadecimal digits of the hash of images and of the settings that affect them; None without any."""
    if source is None:
        return None
    text = json.dumps(made_of(source, data), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def features_of(source: str, data: DataConfig, extractor: FeatureExtractor, folder: Path) -> Statistics:
    """The statistics and features of all images of shards or an ``.npz`` file, with labels if known.

    They are computed once and stored beside the images, or in ``folder`` if nothing is written there. The
    name contains a hash of the images with the settings that affect them, and the fingerprint of the weights.
    """
    name = f"{Path(source).stem}-{images_hash(source, data)}-{extractor.name}-{extractor.fingerprint}.npz"
    file = place_beside(source, folder) / name
    if file.is_file():
        found = load_statistics(file)
        check_extractor(found, extractor)
        return found
    batches, count = labelled_batches(source, data)
    progress = tqdm(batches, desc=f"features of {Path(source).name}", unit="batch", total=count, leave=False)
    about = made_of(source, data)
    made = reference_statistics(progress, extractor, max_features=MOST_KEPT, source=source, settings=about)
    return save_statistics(made, file)


def place_beside(source: str, folder: Path) -> Path:
    """The folder of ``source``, or ``folder`` if that is not writable, part of this program, or a URL."""
    if is_remote(source):
        return folder
    beside = Path(source).resolve().parent
    bundled = any(beside.is_relative_to((root / BUNDLED).resolve()) for root in roots())
    return beside if os.access(beside, os.W_OK) and not bundled else folder


def labelled_batches(source: str, data: DataConfig) -> tuple[Iterator[Tensor | tuple[Tensor, Tensor]], int]:
    """Batches of images [B, C, H, W] in [-1, 1], of shards with labels [B], and the number of batches."""
    if source.endswith(".npz"):
        return image_batches_of(source, data, BATCH), math.ceil(images_shape(source)[0] / BATCH)
    labelled = ((batch.values[:, 0], batch.labels) for batch in batches_of(source, data, BATCH))
    return labelled, math.ceil(len(read_index(source)) / BATCH)


def image_batches_of(source: str, data: DataConfig, batch_size: int) -> Iterator[Tensor]:
    """Batches of images [B, C, H, W] in [-1, 1]; those of an ``.npz`` file are grey if the data is."""
    if source.endswith(".npz"):
        return (images[:, : data.image_channels] for images in image_batches(source, batch_size))
    return images_of(source, data, batch_size)


def in_order_of_class(statistics: Statistics) -> np.ndarray:
    """The features [n, D], in order of class if the classes are known: then even steps are balanced."""
    assert statistics.features is not None
    if statistics.labels is None:
        return statistics.features
    return statistics.features[statistics.labels.argsort(kind="stable")]


def images_at(source: str, data: DataConfig, places: Sequence[int]) -> Tensor:
    """The images [n, C, H, W] in [-1, 1] at these places of a source, in the order of ``places``."""
    batch_size, wanted = 100, set(places)
    found: dict[int, Any] = {}
    for number, images in enumerate(image_batches_of(source, data, batch_size)):
        first = number * batch_size
        found |= {first + i: images[i] for i in range(len(images)) if first + i in wanted}
    return torch.stack([found[place] for place in places])
