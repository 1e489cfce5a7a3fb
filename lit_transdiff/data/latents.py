"""Autoencoder moments of a folder of image shards, as shards: one latent shard for each image shard.

Shapes: images [B, C, H, W] in [-1, 1]; moments [B, 2c, h, w] (mean and log-variance, not yet sampled or scaled), stored
as raw float16, one ``.bin`` a sample: the moments of the image and, with flips, those of its mirror image after them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lit_transdiff.config import DataConfig, require
from lit_transdiff.data.dataset import PlannedDataset
from lit_transdiff.data.index import LatentInfo, ShardIndex, index_shards, read_index
from lit_transdiff.data.plan import Rows
from lit_transdiff.data.shards import ShardWriter

EncodeFn = Callable[[Tensor], Tensor]


def write_latent_shards(
    source_folder: str | Path,
    dest: str | Path,
    encode_fn: EncodeFn,
    *,
    fingerprint: str,
    flips: bool,
    batch_size: int,
    data: DataConfig,
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
) -> Optional[LatentInfo]:
    """Write the latent shards ``rank``, ``rank + world``, ...; when all ranks are done, one calls ``finish_latent_index``.

    Images are read as in evaluation (``data.image_size``, ``data.image_channels``, ``data.crop``; never flipped at random).
    ``encode_fn`` takes images and gives moments on any device. A rank that has no shard writes nothing and gives nothing.
    Raises ``ValueError`` naming the sample for moments that float16 cannot hold, and for a ``dest`` that already has an index.
    """
    index, dest = read_index(source_folder), Path(dest)
    require(index.kind == "images", f"{source_folder}: kind", index.kind, "images")
    require(data.crop != "random", "data.crop", data.crop, "'center' or 'none': a cache holds one crop of each image")
    require(not (dest / "index.json").exists(), str(dest), "a folder with an index", "a new folder")
    dest.mkdir(parents=True, exist_ok=True)
    dataset = PlannedDataset(index, replace(data, on_bad_sample="refuse"))  # a substitute would be stored under another's key
    mine = range(rank, len(index.shards), world)
    with tqdm(total=sum(index.shards[s].samples for s in mine), desc="encoding", unit="image", disable=not progress) as bar:
        for shard in mine:
            with ShardWriter(dest / index.shards[shard].name) as writer:
                for samples in batches_of(index, shard, batch_size):
                    moments = encode_batch(dataset, samples, encode_fn, flips)
                    for sample, array in zip(samples.tolist(), moments, strict=True):
                        writer.write(index.key_of(sample), int(index.label[sample]), "bin", array.tobytes())
                    bar.update(len(samples))
    return LatentInfo(moments.shape[2:], 2 if flips else 1, fingerprint, data.image_size) if mine else None


def batches_of(index: ShardIndex, shard: int, batch_size: int) -> list[np.ndarray]:
    """The samples of a shard in order, cut into batches."""
    samples = np.arange(index.starts[shard], index.starts[shard + 1])
    return np.split(samples, range(batch_size, len(samples), batch_size))


@torch.no_grad()
def encode_batch(dataset: PlannedDataset, samples: np.ndarray, encode_fn: EncodeFn, flips: bool) -> np.ndarray:
    """[B, F, 2c, h, w] float16 moments of the samples, F = 2 with flips."""
    images = dataset[Rows(samples, np.zeros_like(samples), samples[:, None])].values[:, 0]  # B C H W
    both = [images, images.flip(-1)] if flips else [images]
    moments = torch.stack([encode_fn(view).to("cpu", torch.float32) for view in both], dim=1)  # B F 2c h w
    require(
        moments.dim() == 5 and len(moments) == len(samples) and moments.shape[2] % 2 == 0,
        "encode_fn: shape",
        tuple(moments.shape[:1] + moments.shape[2:]),
        f"({len(samples)}, 2c, h, w)",
    )
    stored = moments.to(torch.float16)
    bad = ~torch.isfinite(stored).flatten(1).all(dim=1)
    for row in torch.nonzero(bad).flatten().tolist():
        largest = float(moments[row].abs().max())
        raise ValueError(f"{dataset.index.name_of(samples[row])}: moments up to {largest:g}; float16 holds at most 65504.")
    return stored.numpy()


def finish_latent_index(source_folder: str | Path, dest: str | Path, info: LatentInfo, progress: bool = True) -> ShardIndex:
    """Index the latent shards and check that they hold the samples of the source, in its order."""
    source, dest = read_index(source_folder), Path(dest)
    missing = [shard.name for shard in source.shards if not (dest / shard.name).is_file()]
    if missing:
        raise ValueError(f"{dest}: {len(missing)} of {len(source.shards)} latent shards are missing: {', '.join(missing)}.")
    index = index_shards(dest, source.class_names, source.seed, info, progress)
    if not (np.array_equal(index.key, source.key) and np.array_equal(index.label, source.label)):
        (dest / "index.json").unlink()
        raise ValueError(f"{dest}: keys or labels differ from those of {source_folder}; make the latents again in a new folder.")
    return index
