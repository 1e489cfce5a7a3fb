"""The LightningDataModule of the shards, which resumes at the exact sample."""

from __future__ import annotations

import logging
from functools import partial
from typing import Optional

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_transdiff.config import DataConfig, is_stream, require, require_classes
from lit_transdiff.data.dataset import Batch, PlannedDataset, loader_options
from lit_transdiff.data.index import ShardIndex, read_index
from lit_transdiff.data.loaders import AUGMENTATION, PlanSampler, RowsInOrder, TrainLoader
from lit_transdiff.data.order import BatchLayout, TrainPlan, evaluation_batches
from lit_transdiff.data.references import check_class_sizes, num_groups, read_groups, without_small_classes
from lit_transdiff.data.remote_shards import CachedReader, ShardsAhead
from lit_transdiff.data.stream import StreamDataset

__all__ = ["Batch", "DataModule"]
MOST_EPOCHS, SMALL_BATCH = 10, 4096  # a batch larger than the second has each row at most 10 times
log = logging.getLogger(__name__)


class DataModule(pl.LightningDataModule):
    """Training batches in the order of the plan, and evaluation batches with each sample once.

    The whole run is one Lightning epoch of ``max_steps`` x accumulation batches. The start is computed from
    ``trainer.global_step`` alone, so that a resumed run reads the same samples as an uninterrupted one.
    Without a trainer the module acts as rank 0 of 1 at step 0.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        num_references: int,
        num_classes: int,
        global_batch_size: int,
        micro_batch_size: Optional[int] = None,
        max_steps: int,
        seed: int,
        evaluation_batch_size: int = 64,
        num_validation_samples: Optional[int] = None,
        autoencoder_fingerprint: Optional[str] = None,
        uses_labels: bool = True,
    ) -> None:
        """Batches count rows (groups for R > 1), ``num_validation_samples`` images (None: all; 0: none).

        Without ``uses_labels`` the held-out images may be of other classes.
        """
        super().__init__()
        self.data, self.num_references, self.num_classes = data, num_references, num_classes
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.max_steps, self.seed = max_steps, seed
        self.evaluation_batch_size = evaluation_batch_size
        self.num_validation_samples = num_validation_samples
        self.autoencoder_fingerprint, self.uses_labels = autoencoder_fingerprint, uses_labels
        self.train_index: Optional[ShardIndex] = None
        self.evaluation_index: Optional[ShardIndex] = None
        self.plan: Optional[TrainPlan] = None

    def setup(self, stage: Optional[str] = None) -> None:
        """Read and check the indexes. Raises for anything that would fail during training."""
        data = self.data
        if self.train_index is None and data.train:
            stream = is_stream(data.train)
            self.check_source(stream)
            index = read_index((data.index or "") if stream else data.train, check_files=not stream)
            self.train_index = self.checked(index, "data.train")
        if self.evaluation_index is None and data.evaluation is not None:
            allowed = "a folder of shards, or the URL of one"
            require(not is_stream(data.evaluation), "data.evaluation", data.evaluation, allowed)
            self.evaluation_index = self.checked(read_index(data.evaluation), "data.evaluation")
        if self.train_index is not None and self.evaluation_index is not None:
            kind, expected = self.evaluation_index.kind, self.train_index.kind
            require(kind == expected, "data.evaluation", kind, f"{expected}, as in data.train")
        self.check_sizes()

    def check_sizes(self) -> None:
        """Refuse training classes below R images, validation without a class of R, a batch of many epochs."""
        if self.train_index is not None and self.data.groups is None:
            check_class_sizes(self.train_index, self.num_references)
            rows = num_groups(self.train_index.class_counts, self.num_references)
            most, size = max(SMALL_BATCH, MOST_EPOCHS * rows), self.global_batch_size
            allowed = f"at most {most:,} with the {rows:,} rows of {self.num_references} in {self.data.train}"
            require(size <= most, "training.global_batch_size", size, allowed)
        if self.evaluation_index is not None and self.num_validation_samples != 0:
            without_small_classes(self.evaluation_index, self.num_references)

    def check_source(self, stream: bool) -> None:
        """Check the settings that belong to a stream, or to a folder, in ``data.train``."""
        data = self.data
        if stream:
            allowed = "the index.json of data.train, which is a stream"
            require(data.index is not None, "data.index", None, allowed)
            require(data.groups is None, "data.groups", data.groups, "null when data.train is a stream")
        else:
            allowed = "null when data.train is a folder, which has its own"
            require(data.index is None, "data.index", data.index, allowed)

    def checked(self, index: ShardIndex, field: str) -> ShardIndex:
        """The index, checked against the model, the autoencoder and the training data."""
        if field == "data.evaluation" and self.train_index is not None and self.uses_labels:
            known = self.train_index.class_names
            require_classes(f"{field}: {index.folder}", index.class_names, known, "data.train")
        allowed = f"model.num_classes={self.num_classes}"
        fits = index.num_classes == self.num_classes
        require(fits, f"{field}: classes in {index.folder}", index.num_classes, allowed)
        if index.latents is not None and index.latents.fingerprint != self.autoencoder_fingerprint:
            raise ValueError(
                f"{field}: the latents in {index.folder} were made with another autoencoder "
                f"(fingerprint {index.latents.fingerprint}, this run's is {self.autoencoder_fingerprint})."
            )
        if index.latents is not None:
            size = index.latents.image_size
            allowed = f"{size}, of the latents in {index.folder}"
            require(size == self.data.image_size, "data.image_size", self.data.image_size, allowed)
        return index

    def index_of(self, field: str) -> ShardIndex:
        """The index of ``data.train`` or ``data.evaluation``, read on demand."""
        self.setup()
        index = self.train_index if field == "data.train" else self.evaluation_index
        if index is None:
            allowed = "a folder of shards (make one with: lit-transdiff pack SRC DEST)"
            raise ValueError(f"{field}: got None; allowed: {allowed}.")
        return index

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.index_of("data.train" if self.data.train else "data.evaluation").class_names

    def layout(self) -> BatchLayout:
        """The division of global batches among the trainer's ranks."""
        size, (rank, world) = self.global_batch_size, self.rank_and_world()
        require(size % world == 0, "training.global_batch_size", size, f"a multiple of the {world} devices")
        passes = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        allowed = f"a divisor of training.global_batch_size={size} / {world} devices"
        require(size % (world * passes) == 0, "Trainer(accumulate_grad_batches)", passes, allowed)
        return BatchLayout(size, self.micro_batch_size or size // (world * passes), rank, world)

    def rank_and_world(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def train_dataloader(self) -> DataLoader:
        index = self.index_of("data.train")
        layout = self.layout()
        self.check_trainer(layout)
        identity = {
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "num_references": self.num_references,
            "shuffle_block": self.data.shuffle_block,
            "number of samples": len(index),
        }
        identity |= AUGMENTATION if self.data.horizontal_flip or self.data.crops_at_random else {}
        total, options = self.num_steps() * layout.accumulation, loader_options(self.data.num_workers)
        start = partial(self.start, layout)
        if is_stream(self.data.train):
            stream = StreamDataset(index, self.data, self.seed, layout, total, self.num_references)
            identity |= dict(world=layout.world, micro_batch_size=layout.micro_batch)
            identity |= dict(num_workers=self.data.num_workers)
            return TrainLoader(stream, start, identity, **options)
        given, block = self.data.groups, self.data.shuffle_block
        groups = None if given is None else read_groups(given, index, self.num_references)
        plan = TrainPlan(index, self.seed, num_references=self.num_references, block=block, groups=groups)
        self.plan = plan
        identity["number of groups"] = plan.num_items
        dataset = PlannedDataset(index, self.data, self.seed, training=True)
        ahead = None
        if isinstance(dataset.reader, CachedReader):
            ahead = ShardsAhead(plan, dataset.reader.cache.limit)
            dataset.reader.cache.require_limit(ahead.at_once(), "the shards that are read at a time")
        sampler = PlanSampler(plan, layout, total, start, ahead)
        return TrainLoader(dataset, start, identity, sampler=sampler, **options)

    def check_trainer(self, layout: BatchLayout) -> None:
        """Check that the trainer's steps agree with this module."""
        if self.trainer is not None:
            passes, steps = self.trainer.accumulate_grad_batches, self.trainer.max_steps
            allowed = f"{layout.accumulation}"
            require(passes == layout.accumulation, "Trainer(accumulate_grad_batches)", passes, allowed)
            allowed = f"at most {self.max_steps}, for which data is planned"
            require(steps <= self.max_steps, "Trainer(max_steps)", steps, allowed)

    def num_steps(self) -> int:
        """The optimizer steps of the run; fewer if the trainer stops earlier."""
        planned = -1 if self.trainer is None else self.trainer.max_steps
        return self.max_steps if planned < 0 else min(planned, self.max_steps)

    def start(self, layout: BatchLayout) -> int:
        """The micro-step at which reading starts; with ``Trainer(overfit_batches=...)`` always the first."""
        if self.trainer is None or self.trainer.overfit_batches:  # type: ignore[attr-defined]
            return 0
        return self.trainer.global_step * layout.accumulation

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        if self.num_validation_samples == 0 or self.data.evaluation is None:
            return []
        index = self.index_of("data.evaluation")
        rank, world = self.rank_and_world()
        batches = evaluation_batches(
            index,
            num_references=self.num_references,
            batch_size=self.evaluation_batch_size,
            rank=rank,
            world=world,
            seed=self.seed,
            num_samples=self.num_validation_samples,
        )
        dataset = PlannedDataset(index, self.data, few=self.num_validation_samples is not None)
        options = loader_options(self.data.num_workers) | {"persistent_workers": self.data.num_workers > 0}
        return DataLoader(dataset, sampler=RowsInOrder(batches), **options)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Copy from pinned memory without waiting."""
        return batch.to(device, non_blocking=True)

    def planned_keys(self, micro_step: int) -> list[str]:
        """``shard/key`` of this rank's samples in a micro-step, for messages; [] for a stream."""
        if self.plan is None:
            return []
        layout = self.layout()
        first = layout.start(micro_step)
        return self.keys(torch.from_numpy(self.plan.rows(first, first + layout.micro_batch).samples))

    def keys(self, samples: Tensor) -> list[str]:
        """``shard/key`` of each training sample (any shape, flattened), for messages."""
        index = self.index_of("data.train")
        return [index.name_of(sample) for sample in samples.flatten().tolist()]
