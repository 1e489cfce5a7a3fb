"""From planned rows to batches: reading, decoding and augmenting samples.

Shapes: B rows, R references, C channels; images [B, R, C, H, W] float32 in [-1, 1], latents (moments) [B, R,
2c, h, w] float16 as stored, which halves the traffic; the stages compute in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_transdiff.config import DataConfig, require
from lit_transdiff.data.decode import crop_to_square, decode_latents, drawing_from, image_tensor, open_image
from lit_transdiff.data.index import ShardIndex
from lit_transdiff.data.order import Rows, coin_flips, generator
from lit_transdiff.data.processes import clean_context, exit_with_parent
from lit_transdiff.data.remote_shards import reader_of

log = logging.getLogger(__name__)


@dataclass
class Batch:
    """The batch that any data module gives to a stage.

    ``positions`` determine a row's noise, times and label dropout; in a global batch they differ modulo its
    size.
    """

    # [B, R, C, H, W] float32 images in [-1, 1], or float16 autoencoder moments [B, R, 2c, h, w]
    values: Tensor
    labels: Tensor  # [B] int64
    samples: Tensor  # [B, R] int64, number of each sample in the shard index
    # [B] int64, position of the row in the run's endless stream (evaluation: index of the first sample)
    positions: Tensor
    conditions: Tensor | None = None  # [B, ...], conditions in place of labels: vectors or tokens

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return self.each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self.each(Tensor.pin_memory)

    def each(self, act: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with ``act`` applied to its tensors."""
        fields: dict[str, Any] = {name: z if z is None else act(z) for name, z in vars(self).items()}
        return Batch(**fields)


def as_is(batch: Batch) -> Batch:
    """The collate function for datasets of whole batches; here so that workers need not import Lightning."""
    return batch


def end_with_trainer(worker: int) -> None:
    """End a worker whose trainer was killed, because its own parent is the server process."""
    exit_with_parent()


def loader_options(num_workers: int) -> dict[str, Any]:
    """The options of every DataLoader here: whole batches, and workers from a clean server process."""
    return {
        "batch_size": None,
        "collate_fn": as_is,
        "num_workers": num_workers,
        "multiprocessing_context": clean_context() if num_workers else None,
        "worker_init_fn": end_with_trainer,
        "pin_memory": torch.cuda.is_available(),
    }


class SampleDecoder:
    """Decode a sample to values [C, H, W], in training with augmentation by (seed, epoch, sample)."""

    def __init__(self, index: ShardIndex, data: DataConfig, seed: int, training: bool) -> None:
        if training and index.latents is not None:
            allowed = f"false, as {index.folder} was cached without flips; or cache it again with flips"
            fits = index.latents.flips == 2 or not data.horizontal_flip
            require(fits, "data.horizontal_flip", True, allowed)
            allowed = "'center' or 'none' for cached latents, which cannot be cropped"
            require(not data.crops_at_random, "data.crop", data.crop, allowed)
        self.index, self.data, self.seed, self.training = index, data, seed, training

    def flips(self, epoch: int, samples: Any) -> Any:
        """Whether each of ``samples``, a number or an array, is mirrored in an epoch."""
        if not (self.training and self.data.horizontal_flip):
            return np.zeros_like(samples, bool)
        return coin_flips(self.seed, epoch, len(self.index))[samples]

    def __call__(self, content: bytes, sample: int, epoch: int) -> Tensor:
        """Decode ``content``; raises ``ValueError`` with shard and key if that fails."""
        data, flip = self.data, bool(self.flips(epoch, sample))
        try:
            if self.index.latents is not None:
                return decode_latents(content, self.index.latents, flip)
            image = open_image(content, data.exif, data.background).image
            image = image.convert("L" if data.image_channels == 1 else "RGB")  # before resizing
            at_random = self.training and data.crops_at_random
            draw = drawing_from(generator(self.seed, epoch, sample)) if at_random else None
            image = crop_to_square(image, data.image_size, data.crop, draw)
        except ValueError as error:
            raise ValueError(f"{self.index.name_of(sample)}: {error}") from error
        values = image_tensor(image)
        return values.flip(-1) if flip else values


class PlannedDataset(Dataset):
    """A dataset with ``dataset[rows]`` as the ``Batch`` of those rows; ``few`` if not many are read."""

    def __init__(
        self, index: ShardIndex, data: DataConfig, seed: int = 0, training: bool = False, few: bool = False
    ) -> None:
        self.reader = reader_of(index, data, max_open=2 * data.shuffle_block, few=few)
        self.decode = SampleDecoder(index, data, seed, training)
        self.index = index
        self.skip = data.on_bad_sample == "skip"
        self.num_skipped = 0

    def __getitem__(self, rows: Rows) -> Batch:
        self.reader.expect(rows)
        samples, values = self.read_latents(rows) if self.index.latents else self.read_one_by_one(rows)
        return Batch(
            values=values.view(*samples.shape, *values.shape[1:]),
            labels=torch.from_numpy(self.index.label[samples[:, 0]].astype(np.int64)),
            samples=torch.from_numpy(samples),
            positions=torch.from_numpy(rows.positions.astype(np.int64)),
        )

    def read_one_by_one(self, rows: Rows) -> tuple[np.ndarray, Tensor]:
        """The samples [B, R] and their values [B R, ...]."""
        samples = rows.samples.copy()
        values = []
        for row, epoch in enumerate(rows.epochs):
            for r in range(samples.shape[1]):
                samples[row, r], value = self.load(int(samples[row, r]), int(epoch), samples[row])
                values.append(value)
        return samples, torch.stack(values)

    def read_latents(self, rows: Rows) -> tuple[np.ndarray, Tensor]:
        """The samples and values of latents, read directly into the batch, shard by shard."""
        info = self.index.latents
        assert info is not None
        length = info.sample_bytes // info.flips
        flips = np.empty(rows.samples.shape, bool)
        for epoch in np.unique(rows.epochs):
            of_epoch = rows.epochs == epoch
            flips[of_epoch] = self.decode.flips(int(epoch), rows.samples[of_epoch])
        samples, first = rows.samples.reshape(-1), flips.reshape(-1) * np.int64(length)
        content = np.empty((len(samples), length), np.uint8)
        try:
            self.reader.read_parts(samples, first, content)
        except ValueError:
            return self.read_one_by_one(rows)  # reports the error or substitutes samples
        return rows.samples, torch.from_numpy(content.view(np.float16)).view(-1, *info.shape)

    def load(self, sample: int, epoch: int, group: np.ndarray) -> tuple[int, Tensor]:
        """The sample and its values; with ``on_bad_sample: skip`` a readable substitute outside ``group``."""
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
            text = "bad sample %s; %s is used instead (%d skipped by this process)"
            log.warning(text, bad, self.index.name_of(substitute), self.num_skipped)
            return substitute, values
        text = "cannot be read, nor can any other sample of its class be used instead."
        raise ValueError(f"{self.index.name_of(sample)}: {text}")

    def same_class_after(self, sample: int) -> list[int]:
        """The other samples of the class in index order, starting after ``sample``."""
        others = np.flatnonzero(self.index.label == self.index.label[sample])
        place = int(np.searchsorted(others, sample))
        return np.concatenate([others[place + 1 :], others[:place]]).tolist()
