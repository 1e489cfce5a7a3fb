"""Preparation of a data set for training and scoring: cached latents and reference statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor
from tqdm import tqdm

from lit_transdiff.base.files import short_hash
from lit_transdiff.config import AutoencoderConfig, DataConfig, require, require_classes
from lit_transdiff.data.datamodule import Batch, DataModule
from lit_transdiff.data.index import ShardIndex, read_index
from lit_transdiff.data.index_files import header_hash
from lit_transdiff.data.latents import LatentCache, latent_info
from lit_transdiff.evaluation.extractor import FeatureExtractor
from lit_transdiff.evaluation.images import image_batches, images_shape
from lit_transdiff.evaluation.statistics import (
    Statistics,
    check_extractor,
    check_statistics_file,
    load_statistics,
    reference_statistics,
    save_statistics,
)
from lit_transdiff.models.autoencoder import Autoencoder, load_autoencoder
from lit_transdiff.models.sizes import bytes_of_images, room_here

PICTURE = ("image_size", "image_channels", "crop", "exif", "background")  # settings that affect pixels


def cache(
    source: str | Path,
    dest: str | Path,
    *,
    autoencoder: AutoencoderConfig,
    data: DataConfig,
    fabric: Fabric,
    flips: bool,
    batch_size: int = 64,
) -> ShardIndex:
    """Encode the image shards ``source`` on all ranks and write the moments as latent shards ``dest``.

    An interrupted cache is continued on any number of ranks, and a complete one is left unchanged. A cache
    with a different autoencoder, images, crop, size or number of flips is refused.
    """
    at_once = min(batch_size, max((shard.samples for shard in read_index(source).shards), default=1))
    require(batch_size >= 1, "--batch-size", batch_size, "an integer of at least 1")
    needed = bytes_of_images(data, at_once)
    room_here(fabric.device.type).require(
        needed, **{"--batch-size": batch_size}, data__image_size=data.image_size
    )
    network = load_autoencoder(autoencoder.kind, autoencoder.path, data.image_channels).to(fabric.device)
    info = latent_info(
        network.encode, data, fingerprint=network.fingerprint, flips=flips, device=fabric.device
    )
    work = LatentCache(source, dest, info, data)
    if work.is_finished:
        return read_index(dest)
    with work.alone(fabric.is_global_zero) as left:
        if fabric.broadcast(left):
            write_all(work, network, fabric, batch_size)
    return read_index(dest)


def write_all(work: LatentCache, network: Autoencoder, fabric: Fabric, batch_size: int) -> None:
    """Write the missing part of a cache, distributed over the ranks."""
    if fabric.is_global_zero:
        work.begin()
    fabric.barrier()
    work.write(
        network.encode,
        batch_size=batch_size,
        device=fabric.device,
        rank=fabric.global_rank,
        world=fabric.world_size,
        progress=fabric.is_global_zero,
    )
    fabric.barrier()
    if fabric.is_global_zero:
        work.finish()
    fabric.barrier()


def statistics(
    source: str | Path,
    dest: str | Path,
    *,
    data: DataConfig,
    extractor: FeatureExtractor,
    batch_size: int = 100,
) -> Statistics:
    """Compute reference statistics of all images of the shards ``source`` and write them to ``dest``.

    ``source`` may also be an ``.npz`` file of images in the ADM evaluator's layout, which are used unchanged.
    """
    check_statistics_file(dest)
    if Path(source).suffix != ".npz":
        require_classes(
            str(source),
            read_index(source).class_names,
            extractor.class_names,
            "the classifier that looks at them",
        )
    batches, count = batches_and_count(source, data, batch_size)
    progress = tqdm(batches, desc="statistics", unit="batch", total=math.ceil(count / batch_size))
    found = reference_statistics(progress, extractor, source=str(source), settings=made_of(source, data))
    return save_statistics(found, dest)


def batches_and_count(source: str | Path, data: DataConfig, batch_size: int) -> tuple[Iterator[Tensor], int]:
    """Batches [B, C, H, W] in [-1, 1] of the images of shards or an ``.npz`` file, and their number."""
    if Path(source).suffix == ".npz":
        return image_batches(source, batch_size), images_shape(source)[0]
    return images_of(source, data, batch_size), len(read_index(source))


def made_of(source: str | Path, data: DataConfig) -> dict[str, Any]:
    """The source and settings that identify the images behind statistics."""
    if Path(source).suffix == ".npz":
        return {"source_hash": short_hash(Path(source))}
    settings = {name: getattr(data, name) for name in PICTURE}
    return {**settings, "source_hash": header_hash(source)}


def check_statistics(
    source: str | Path, dest: str | Path, *, data: DataConfig, extractor: FeatureExtractor
) -> Statistics:
    """Load an existing statistics file. Raises ``ValueError`` if it is of other images or another extractor.

    A file in a public layout does not record its source and is accepted.
    """
    found = load_statistics(dest)
    check_extractor(found, extractor)
    said, wanted = found.about.get("settings", {}), made_of(source, data)
    different = [name for name in wanted if said.get(name, wanted[name]) != wanted[name]]
    other = [f"{name}: {said[name]!r} there, {wanted[name]!r} wanted" for name in different]
    if different:
        why = "; ".join(other)
        way = "Choose another name, or remove that file."
        raise ValueError(f"evaluation.reference: {dest} was made of other images ({why}). {way}")
    return found


def images_of(source: str | Path, data: DataConfig, batch_size: int) -> Iterator[Tensor]:
    """All images of a folder of shards once, as batches [B, C, H, W] in [-1, 1]."""
    return (batch.values[:, 0] for batch in batches_of(source, data, batch_size))


def batches_of(source: str | Path, data: DataConfig, batch_size: int) -> Iterator[Batch]:
    """All images of a folder of shards once, with labels: ``values`` [B, 1, C, H, W]."""
    index = read_index(source)
    room_here("cpu").require(
        bytes_of_images(data, min(batch_size, len(index))), data__image_size=data.image_size
    )
    picture = {name: getattr(data, name) for name in (*PICTURE, "cache_dir", "cache_gb")}
    settings = DataConfig(evaluation=str(source), horizontal_flip=False, **picture)
    module = DataModule(
        settings,
        num_references=1,
        num_classes=index.num_classes,
        global_batch_size=1,
        max_steps=1,
        seed=0,
        evaluation_batch_size=batch_size,
    )
    module.setup()
    loader = module.val_dataloader()
    assert isinstance(loader, torch.utils.data.DataLoader)
    return iter(loader)
