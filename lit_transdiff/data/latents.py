"""Caching the autoencoder's moments of image shards: one latent shard per image shard.

Shapes: images [B, C, H, W] in [-1, 1]; moments [B, 2c, h, w] (mean and log-variance, not yet sampled or
scaled), stored as raw float16, one ``.bin`` per sample: the moments of the image, then with flips those of
its mirror image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from lit_transdiff.base.files import format_bytes, free_bytes, require_space
from lit_transdiff.config import DataConfig, require
from lit_transdiff.data.dataset import Batch, PlannedDataset, loader_options
from lit_transdiff.data.index import LatentInfo, ShardIndex, join_rows, read_index, shard_rows
from lit_transdiff.data.journal import ShardJournal
from lit_transdiff.data.order import Rows
from lit_transdiff.data.processes import ahead
from lit_transdiff.data.shards import ShardWriter, tar_bytes

CACHING_PLAN = "caching.json"
BATCHES_AHEAD = 2  # encoded ahead of writing
EncodeFn = Callable[[Tensor], Tensor]  # images -> moments, on the device


def latent_info(
    encode_fn: EncodeFn, data: DataConfig, *, fingerprint: str, flips: bool, device: torch.device
) -> LatentInfo:
    """The format of the latents, determined with one black image."""
    image = torch.full((1, data.image_channels, data.image_size, data.image_size), -1.0, device=device)
    moments = encode(encode_fn, image)
    _, channels, height, width = moments.shape
    allowed = "moments of shape (B, 2c, h, w), of an autoencoder that encodes: kind identity needs no cache"
    require(channels % 2 == 0, "autoencoder: shape", tuple(moments.shape), allowed)
    return LatentInfo((channels, height, width), 2 if flips else 1, fingerprint, data.image_size)


class LatentCache:
    """The latents of ``source`` in ``dest`` and their state. Every rank has one, with the same arguments.

    One rank calls ``begin``, then each ``write``, then one ``finish``, with barriers in between.
    """

    def __init__(self, source: str | Path, dest: str | Path, info: LatentInfo, data: DataConfig) -> None:
        """Raises ``ValueError`` for a ``dest`` with other latents or other content."""
        self.source, self.dest, self.info = read_index(source), Path(dest), info
        require(self.source.kind == "images", f"{source}: kind", self.source.kind, "images")
        allowed = "'center' or 'none': a cache holds one crop of each image"
        require(not data.crops_at_random, "data.crop", data.crop, allowed)
        self.data = replace(data, on_bad_sample="refuse")  # a substitute would be stored under a wrong key
        self.journal = ShardJournal(self.dest, CACHING_PLAN)
        self.journal.check(self.plan())

    def plan(self) -> dict[str, Any]:
        """All settings that affect the bytes of the shards."""
        return {
            "source": self.source.identity,
            "autoencoder": self.info.fingerprint,
            "image_size": self.data.image_size,
            "image_channels": self.data.image_channels,
            "crop": self.data.crop,
            "exif": self.data.exif,
            "background": self.data.background,
            "flips": self.info.flips,
            "shape": self.info.shape,
            "dtype": self.info.dtype,
        }

    @property
    def is_finished(self) -> bool:
        return (self.dest / "index.json").exists()

    def alone(self, writes: bool) -> AbstractContextManager[bool]:
        """Lock the cache in the block; yields whether there is work left. One rank ``writes`` the plan."""
        return self.journal.alone(self.plan(), writes)

    def begin(self, say: Callable[[str], None] = tqdm.write) -> None:
        """Announce what will be written, check the disk space, and write the plan."""
        shards, sample = self.source.shards, np.array([self.info.sample_bytes])
        sizes = {shard.name: tar_bytes(sample.repeat(shard.samples)) for shard in shards}
        left = [name for name in sizes if self.journal.finished(name) is None]
        some = "" if len(left) == len(shards) else f"; {len(shards) - len(left)} of them are there already"
        say(
            f"{len(self.source)} x {self.info.flips} latents of shape {self.info.shape} in {self.info.dtype} "
            f"-> {len(shards)} shards in {self.dest}, {format_bytes(sum(sizes.values()))}{some}; "
            f"{format_bytes(free_bytes(self.dest))} are free"
        )
        require_space(self.dest, sum(sizes[name] for name in left))
        self.journal.begin(self.plan())

    def write(
        self,
        encode_fn: EncodeFn,
        *,
        batch_size: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        progress: bool = True,
    ) -> None:
        """Write the missing ones of the shards ``rank``, ``rank + world``, ...

        Images are read as in evaluation, by ``data.num_workers`` processes; a thread encodes them while this
        one writes. Raises ``ValueError`` with the sample for moments out of float16's range.
        """
        shards = self.source.shards
        mine = range(rank, len(shards), world)
        left = [shard for shard in mine if self.journal.finished(shards[shard].name) is None]
        encoded = ahead(self.encoded(self.batches(left, batch_size), encode_fn, device), BATCHES_AHEAD)
        total = sum(shards[s].samples for s in mine)
        with tqdm(total=total, desc="encoding", unit="image", disable=not progress) as bar:
            bar.update(bar.total - sum(shards[s].samples for s in left))
            for shard in left:
                with ShardWriter(self.dest / shards[shard].name) as writer:
                    for _ in shard_batches(self.source, shard, batch_size):
                        samples, moments = next(encoded)
                        for sample, array in zip(samples.tolist(), moments, strict=True):
                            key, label = self.source.key_of(sample), int(self.source.label[sample])
                            writer.write(key, label, "bin", array.tobytes())
                        bar.update(len(samples))
                self.journal.add(shard_rows(self.dest / shards[shard].name, self.info))

    def batches(self, shards: list[int], batch_size: int) -> Iterator[Batch]:
        """The images of the shards in order; no batch spans two shards."""
        parts = [part for shard in shards for part in shard_batches(self.source, shard, batch_size)]
        rows = [Rows(part, np.zeros_like(part), part[:, None]) for part in parts]
        options = loader_options(self.data.num_workers)
        return iter(DataLoader(PlannedDataset(self.source, self.data), sampler=rows, **options))

    def encoded(
        self, batches: Iterable[Batch], encode_fn: EncodeFn, device: torch.device
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The samples [B] of each batch and their moments."""
        for batch in batches:
            samples = batch.samples[:, 0].numpy()
            images = batch.values[:, 0].to(device, non_blocking=True)
            yield samples, self.encode_batch(samples, images, encode_fn)

    def encode_batch(self, samples: np.ndarray, images: Tensor, encode_fn: EncodeFn) -> np.ndarray:
        """The moments [B, F, 2c, h, w] float16 of images [B, C, H, W]; F = 2 with flips."""
        views = [images, images.flip(-1)][: self.info.flips]
        moments = torch.stack([encode(encode_fn, view) for view in views], dim=1)
        expected = (len(images), self.info.flips, *self.info.shape)
        require(moments.shape == expected, "encode_fn: shape", tuple(moments.shape), f"{expected}")
        stored = moments.to(torch.float16)
        bad = ~torch.isfinite(stored).flatten(1).all(dim=1)
        for row in torch.nonzero(bad).flatten().tolist():
            name, largest = self.source.name_of(samples[row]), float(moments[row].abs().max())
            raise ValueError(f"{name}: moments up to {largest:g}; float16 holds at most 65504.")
        return stored.cpu().numpy()

    def finish(self) -> ShardIndex:
        """Index the latent shards and check that they have the samples of the source in its order."""
        source, records = self.source, self.journal.all_finished([shard.name for shard in self.source.shards])
        rows = [record.rows for record in records]
        index = join_rows(self.dest, rows, source.class_names, source.seed, self.info)
        if not (np.array_equal(index.key, source.key) and np.array_equal(index.label, source.label)):
            way = "make the latents again in a new folder."
            raise ValueError(f"{self.dest}: keys or labels differ from the source's; {way}")
        index.save()
        self.journal.close()
        return index


@torch.no_grad()
def encode(encode_fn: EncodeFn, images: Tensor) -> Tensor:
    """Encode to float32 moments, without autocast."""
    with torch.autocast(images.device.type, enabled=False):
        return encode_fn(images).float()


def shard_batches(index: ShardIndex, shard: int, batch_size: int) -> list[np.ndarray]:
    """The samples of a shard in order, in batches."""
    samples = np.arange(index.starts[shard], index.starts[shard + 1])
    return np.split(samples, range(batch_size, len(samples), batch_size))
