"""Planned rows -> batches: reads, decodes and augments the samples of local shards.

Shapes: B rows, R references, C channels; images [B, R, C, H, W] in [-1, 1], latents (moments) [B, R, 2c, h, w].
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_transdiff.config import DataConfig, require
from lit_transdiff.data.decode import crop_to_square, decode_latents, image_tensor, open_image
from lit_transdiff.data.index import ShardIndex
from lit_transdiff.data.plan import Rows, generator
from lit_transdiff.data.shards import ShardReader

log = logging.getLogger(__name__)


@dataclass
class Batch:
    """What a stage is given."""

    values: Tensor  # [B, R, C, H, W] images in [-1, 1], or autoencoder moments [B, R, 2c, h, w]
    labels: Tensor  # [B] int64
    samples: Tensor  # [B, R] int64, index of each sample in the shard index
    positions: Tensor  # [B] int64, position of the row in the run's endless stream (evaluation: index of the first sample)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return Batch(*(tensor.to(device, non_blocking=non_blocking) for tensor in self.tensors()))

    def pin_memory(self) -> Batch:
        return Batch(*(tensor.pin_memory() for tensor in self.tensors()))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.values, self.labels, self.samples, self.positions


def as_is(batch: Batch) -> Batch:
    """The collate function of loaders whose dataset gives whole batches; here, so that workers need not import Lightning."""
    return batch


class SampleDecoder:
    """Bytes of a sample -> values [C, H, W], augmented by (seed, epoch, sample) when training."""

    def __init__(self, index: ShardIndex, data: DataConfig, seed: int, training: bool) -> None:
        if training and index.latents is not None:
            require(
                index.latents.flips == 2 or not data.horizontal_flip,
                "data.horizontal_flip",
                True,
                f"false, because the latents in {index.folder} were cached without flips (or cache them again with flips)",
            )
            require(
                data.crop != "random", "data.crop", data.crop, "'center' or 'none' for cached latents, which cannot be cropped"
            )
        self.index, self.data, self.seed, self.training = index, data, seed, training

    def __call__(self, content: bytes, sample: int, epoch: int) -> Tensor:
        """Raises ``ValueError`` naming shard and key for content that cannot be decoded."""
        rng = generator(self.seed, epoch, sample) if self.training else None
        flip = rng is not None and self.data.horizontal_flip and bool(rng.integers(2))
        try:
            if self.index.latents is not None:
                return decode_latents(content, self.index.latents, flip)
            crop = "center" if self.data.crop == "random" and not self.training else self.data.crop
            image = crop_to_square(open_image(content), self.data.image_size, crop, rng)
        except ValueError as error:
            raise ValueError(f"{self.index.name_of(sample)}: {error}") from error
        values = image_tensor(image, self.data.image_channels)
        return values.flip(-1) if flip else values


class PlannedDataset(Dataset):
    """``dataset[rows]`` is the ``Batch`` of those rows."""

    def __init__(self, index: ShardIndex, data: DataConfig, seed: int = 0, training: bool = False) -> None:
        self.reader = ShardReader(index, max_open=2 * data.shuffle_block)
        self.decode = SampleDecoder(index, data, seed, training)
        self.index = index
        self.skip = data.on_bad_sample == "skip"
        self.num_skipped = 0

    def __getitem__(self, rows: Rows) -> Batch:
        samples = rows.samples.copy()
        values = []
        for row, epoch in enumerate(rows.epochs):
            for r in range(samples.shape[1]):
                samples[row, r], value = self.load(int(samples[row, r]), int(epoch), samples[row])
                values.append(value)
        stacked = torch.stack(values)
        return Batch(
            values=stacked.view(*samples.shape, *stacked.shape[1:]),
            labels=torch.from_numpy(self.index.label[samples[:, 0]].astype(np.int64)),
            samples=torch.from_numpy(samples),
            positions=torch.from_numpy(rows.positions.astype(np.int64)),
        )

    def load(self, sample: int, epoch: int, group: np.ndarray) -> tuple[int, Tensor]:
        """The sample and its values; with ``on_bad_sample: skip`` the next readable one of its class that is not in ``group``."""
        try:
            return sample, self.decode(self.reader.read(sample), sample, epoch)
        except ValueError as error:
            if not self.skip:
                raise
            bad: Optional[ValueError] = error
        self.num_skipped += 1
        for substitute in self.same_class_after(sample):
            if substitute in group:
                continue
            try:
                values = self.decode(self.reader.read(substitute), substitute, epoch)
            except ValueError:
                continue
            name = self.index.name_of(substitute)
            log.warning("bad sample %s; %s is used instead (%d skipped by this process)", bad, name, self.num_skipped)
            return substitute, values
        raise ValueError(f"{self.index.name_of(sample)}: cannot be read, nor can any other sample of its class be used instead.")

    def same_class_after(self, sample: int) -> list[int]:
        """The other samples of the class in index order, beginning after ``sample``."""
        others = np.flatnonzero(self.index.label == self.index.label[sample])
        place = int(np.searchsorted(others, sample))
        return np.concatenate([others[place + 1 :], others[:place]]).tolist()
