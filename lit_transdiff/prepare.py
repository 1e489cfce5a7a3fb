"""What is made once from a data set before training and scoring: cached latents and reference statistics."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import Tensor
from tqdm import tqdm

from lit_transdiff.config import AutoencoderConfig, DataConfig
from lit_transdiff.data.datamodule import DataModule
from lit_transdiff.data.index import ShardIndex, read_index
from lit_transdiff.data.latents import finish_latent_index, write_latent_shards
from lit_transdiff.evaluation.features import FeatureExtractor
from lit_transdiff.evaluation.statistics import Statistics, reference_statistics, save_statistics
from lit_transdiff.models.autoencoder import load_autoencoder


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
    """Write the autoencoder's moments of the image shards ``source`` as latent shards ``dest``, over all ranks of ``fabric``.

    A finished cache of the same autoencoder is left as it is; one of another autoencoder is refused.
    """
    network = load_autoencoder(autoencoder.kind, autoencoder.path, data.image_channels).to(fabric.device)
    if (Path(dest) / "index.json").exists():
        return check_cache(dest, network.fingerprint)
    info = write_latent_shards(
        source,
        dest,
        lambda images: network.encode(images.to(fabric.device)),
        fingerprint=network.fingerprint,
        flips=flips,
        batch_size=batch_size,
        data=data,
        rank=fabric.global_rank,
        world=fabric.world_size,
        progress=fabric.is_global_zero,
    )
    fabric.barrier()
    if fabric.is_global_zero and info is not None:  # the first rank always has a shard
        finish_latent_index(source, dest, info, progress=False)
    fabric.barrier()
    return read_index(dest)


def check_cache(dest: str | Path, fingerprint: str) -> ShardIndex:
    """The index of a finished cache; raises ``ValueError`` when another autoencoder made it."""
    index = read_index(dest)
    made_with = index.latents.fingerprint if index.latents else "no autoencoder: it holds images"
    if made_with != fingerprint:
        raise ValueError(
            f"{dest} was made with another autoencoder ({made_with}; this one is {fingerprint}). Choose another folder."
        )
    return index


def statistics(
    source: str | Path, dest: str | Path, *, data: DataConfig, extractor: FeatureExtractor, batch_size: int = 100
) -> Statistics:
    """Reference statistics of all images of the shards ``source``, written to the file ``dest``."""
    settings = {"image_size": data.image_size, "image_channels": data.image_channels, "crop": data.crop}
    batches = tqdm(
        images_of(source, data, batch_size), desc="statistics", unit="batch", total=-(-len(read_index(source)) // batch_size)
    )
    found = reference_statistics(batches, extractor, source=str(source), settings=settings)
    return save_statistics(found, dest)


def images_of(source: str | Path, data: DataConfig, batch_size: int) -> Iterator[Tensor]:
    """Every image of a folder of shards once, as batches [B, C, H, W] in [-1, 1]."""
    index = read_index(source)
    settings = DataConfig(
        evaluation=str(source),
        image_size=data.image_size,
        image_channels=data.image_channels,
        crop=data.crop,
        horizontal_flip=False,
    )
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
    return (batch.values[:, 0] for batch in loader)
