"""Who reads which sample when: a pure function of (seed, epoch), cut by position.

The items of an epoch (samples, or groups of R) follow those of the epoch before, without end: position p is item
``p % n`` of epoch ``p // n``. Every item is used exactly once an epoch and none is dropped; a batch may straddle two
epochs. Global batch k is positions [k G, (k + 1) G), whatever the number of ranks, workers and accumulated micro-batches.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Optional

import numpy as np

from lit_transdiff.config import require
from lit_transdiff.data.index import ShardIndex
from lit_transdiff.data.references import check_class_sizes, group_references

log = logging.getLogger(__name__)
MASK = 2**64 - 1


class Rows(NamedTuple):
    """Rows of a batch that are still to be read."""

    positions: np.ndarray  # [B] int64
    epochs: np.ndarray  # [B] int64
    samples: np.ndarray  # [B, R] int64


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch is cut: ``accumulation`` x ``world`` x ``micro_batch`` rows."""

    global_batch: int
    micro_batch: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        require(
            self.micro_batch >= 1 and self.global_batch % (self.world * self.micro_batch) == 0,
            "training.micro_batch_size",
            self.micro_batch,
            f"a divisor of training.global_batch_size={self.global_batch} / {self.world} devices",
        )

    @property
    def accumulation(self) -> int:
        return self.global_batch // (self.world * self.micro_batch)

    def start(self, micro_step: int) -> int:
        """The first position that this rank reads in its ``micro_step``-th forward pass of the run."""
        step, part = divmod(micro_step, self.accumulation)
        return step * self.global_batch + (part * self.world + self.rank) * self.micro_batch


def generator(seed: int, epoch: int, sample: int = -1) -> np.random.Generator:
    """Random numbers of an epoch (its order), or of one sample in it (its augmentation); all independent of each other."""
    key, counter = np.array([seed & MASK, epoch], np.uint64), np.array([0, 0, 0, sample + 1], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def epoch_order(starts: np.ndarray, seed: int, epoch: int, block: int) -> np.ndarray:
    """[N] int64: the samples in the order of an epoch: shards permuted, then samples inside blocks of ``block`` shards.

    ``starts`` [shards + 1]: the first sample of each shard, then N. At most ``block`` shards are read at a time.
    """
    rng = generator(seed, epoch)
    shards = rng.permutation(len(starts) - 1)
    parts = []
    for first in range(0, len(shards), block):
        samples = [np.arange(starts[s], starts[s + 1]) for s in shards[first : first + block]]
        parts.append(rng.permutation(np.concatenate(samples)))
    return np.concatenate(parts).astype(np.int64)


class TrainPlan:
    """The endless stream of training items. ``groups`` [n, R] fixes the groups; else they are made anew each epoch."""

    def __init__(
        self, index: ShardIndex, seed: int, *, num_references: int = 1, block: int = 64, groups: Optional[np.ndarray] = None
    ) -> None:
        if groups is None:
            check_class_sizes(index, num_references)
        self.index, self.seed, self.num_references, self.block, self.groups = index, seed, num_references, block, groups
        counts = index.class_counts // num_references
        self.num_items = int(counts.sum()) if groups is None else len(groups)
        self.epoch_items: Callable[[int], np.ndarray] = lru_cache(maxsize=2)(self.make_epoch)

    def make_epoch(self, epoch: int) -> np.ndarray:
        """[n, R] int64: the items of an epoch in order."""
        if self.groups is not None:
            return generator(self.seed, epoch).permutation(self.groups)
        order = epoch_order(self.index.starts, self.seed, epoch, self.block)
        items, left_over = group_references(self.index.label, order, self.num_references)
        if left_over:
            log.info("epoch %d: %d groups of %d images; %d images left over", epoch, len(items), self.num_references, left_over)
        return items

    def rows(self, start: int, stop: int) -> Rows:
        """The items at positions [start, stop)."""
        positions = np.arange(start, stop)
        epochs, places = np.divmod(positions, self.num_items)
        samples = np.concatenate([self.epoch_items(int(e))[places[epochs == e]] for e in np.unique(epochs)])
        return Rows(positions, epochs, samples)

    def items(self, start: int, stop: int) -> list[tuple[int, tuple[int, ...]]]:
        """(epoch, samples of the item) at positions [start, stop)."""
        rows = self.rows(start, stop)
        return [(int(epoch), tuple(samples.tolist())) for epoch, samples in zip(rows.epochs, rows.samples, strict=True)]


def evaluation_batches(
    index: ShardIndex, *, num_references: int, batch_size: int, rank: int, world: int, seed: int, num_samples: Optional[int]
) -> list[Rows]:
    """The batches that a rank evaluates: each item on exactly one rank, none padded, equally many batches on every rank.

    All samples in index order, or with ``num_samples`` the first ones of a permutation that depends on ``seed`` only.
    Position is the index of the (first) sample. Only when ``batch_size`` is 1 may a batch be one larger than asked for.
    """
    check_class_sizes(index, num_references)
    order = np.arange(len(index)) if num_samples is None else generator(seed, 0).permutation(len(index))
    items, _ = group_references(index.label, order, num_references)
    if num_samples is not None:
        items = items[: max(1, num_samples // num_references)]
    require(len(items) >= world, "data.evaluation", f"{len(items)} items", f"at least one for each of {world} ranks")
    most = math.ceil(len(items) / world)  # of any rank
    batches = min(math.ceil(most / batch_size), len(items) // world)
    mine = items[rank::world]
    return [Rows(part[:, 0], np.zeros(len(part), np.int64), part) for part in np.array_split(mine, batches)]
