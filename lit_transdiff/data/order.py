"""The order of samples: a pure function of (seed, epoch), divided among ranks by position.

The items of an epoch (samples, or groups of R) follow those of the previous epoch without end: position p is
item ``p % n`` of epoch ``p // n``. Every item is used exactly once per epoch (the last group of a class may
share images with another); a batch may span two epochs. Global batch k has the positions [k G, (k + 1) G),
for any number of ranks, workers and micro-batches.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Optional

import numpy as np

from lit_transdiff.base.randomness import mix
from lit_transdiff.config import require, some
from lit_transdiff.data.index import ShardIndex
from lit_transdiff.data.references import (
    check_class_sizes,
    group_references,
    num_groups,
    without_small_classes,
)

log = logging.getLogger(__name__)
MASK = 2**64 - 1


class Rows(NamedTuple):
    """The rows of a batch before reading."""

    positions: np.ndarray  # [B] int64
    epochs: np.ndarray  # [B] int64
    samples: np.ndarray  # [B, R] int64
    # shards at a URL that are read from now on, () if these are as before, None if in their order
    ahead: Optional[tuple[int, ...]] = None


@dataclass(frozen=True)
class BatchLayout:
    """The division of a global batch: ``accumulation`` x ``world`` x ``micro_batch`` rows."""

    global_batch: int
    micro_batch: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        allowed = f"a divisor of training.global_batch_size={self.global_batch} / {self.world} devices"
        fits = self.micro_batch >= 1 and self.global_batch % (self.world * self.micro_batch) == 0
        require(fits, "training.micro_batch_size", self.micro_batch, allowed)

    @property
    def accumulation(self) -> int:
        return self.global_batch // (self.world * self.micro_batch)

    def start(self, micro_step: int) -> int:
        """The first position of this rank in forward pass ``micro_step`` of the run."""
        step, part = divmod(micro_step, self.accumulation)
        return step * self.global_batch + (part * self.world + self.rank) * self.micro_batch


def generator(seed: int, epoch: int, sample: int = -1) -> np.random.Generator:
    """The random generator of an epoch's order, or of one sample's crop; all are independent."""
    key, counter = np.array([seed & MASK, epoch], np.uint64), np.array([0, 0, 0, sample + 1], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@lru_cache(maxsize=2)
def coin_flips(seed: int, epoch: int, count: int) -> np.ndarray:
    """[count] bool: one coin flip for each sample of an epoch."""
    return np.random.default_rng(mix("flips", seed, epoch)).integers(2, size=count, dtype=bool)


def epoch_order(starts: np.ndarray, seed: int, epoch: int, block: int) -> np.ndarray:
    """The samples [N] int64 in the order of an epoch: permuted shards, then shuffled blocks of shards.

    ``starts`` [shards + 1]: the first sample of each shard, then N. At most ``block`` shards are open at a
    time.
    """
    rng = generator(seed, epoch)
    shards = rng.permutation(len(starts) - 1)
    parts = []
    for first in range(0, len(shards), block):
        samples = [np.arange(starts[s], starts[s + 1]) for s in shards[first : first + block]]
        parts.append(rng.permutation(np.concatenate(samples)))
    return np.concatenate(parts).astype(np.int64)


class TrainPlan:
    """The endless stream of training items.

    ``groups`` [n, R] fixes the groups; otherwise each epoch has new ones.
    """

    def __init__(
        self,
        index: ShardIndex,
        seed: int,
        *,
        num_references: int = 1,
        block: int = 64,
        groups: Optional[np.ndarray] = None,
    ) -> None:
        if groups is None:
            check_class_sizes(index, num_references)
        self.index = index
        self.seed = seed
        self.num_references = num_references
        self.block = block
        self.groups = groups
        self.num_items = num_groups(index.class_counts, num_references) if groups is None else len(groups)
        repeated = 0 if groups is not None else self.num_items * num_references - len(index)
        if repeated:
            text = "%d groups of %d images; %d fill up the last groups and are used twice an epoch"
            log.info(text, self.num_items, num_references, repeated)
        self.epoch_items: Callable[[int], np.ndarray] = lru_cache(maxsize=2)(self.make_epoch)

    def make_epoch(self, epoch: int) -> np.ndarray:
        """The items [n, R] int64 of an epoch in order."""
        if self.groups is not None:
            return generator(self.seed, epoch).permutation(self.groups)
        order = epoch_order(self.index.starts, self.seed, epoch, self.block)
        return group_references(self.index.label, order, self.num_references)[0]

    def rows(self, start: int, stop: int) -> Rows:
        """The items at positions [start, stop)."""
        positions = np.arange(start, stop)
        epochs, places = np.divmod(positions, self.num_items)
        samples = np.concatenate([self.epoch_items(int(e))[places[epochs == e]] for e in np.unique(epochs)])
        return Rows(positions, epochs, samples)


def evaluation_batches(
    index: ShardIndex,
    *,
    num_references: int,
    batch_size: int,
    rank: int,
    world: int,
    seed: int,
    num_samples: Optional[int],
) -> list[Rows]:
    """The evaluation batches of a rank: each item on one rank, no padding, equally many batches everywhere.

    All samples in index order or, with ``num_samples``, the first ones of a permutation that depends only on
    ``seed``. The position is the number of the (first) sample. Classes with fewer than R samples are omitted
    with a warning. Only for ``batch_size`` 1 may a batch have one row more than requested.
    """
    large = without_small_classes(index, num_references)
    small = [index.class_names[c] for c in np.flatnonzero(~large & (index.class_counts > 0))]
    if small and rank == 0:
        text = "data.evaluation: %d classes with fewer than %d images are left out of validation: %s"
        log.warning(text, len(small), num_references, some(small))
    order = np.arange(len(index)) if num_samples is None else generator(seed, 0).permutation(len(index))
    items, _ = group_references(index.label, order, num_references, fill_up=False)
    if num_samples is not None:
        items = items[: max(1, num_samples // num_references)]
    allowed = f"at least one for each of {world} ranks"
    require(len(items) >= world, "data.evaluation", f"{len(items)} items", allowed)
    most = math.ceil(len(items) / world)  # maximum over ranks
    batches = min(math.ceil(most / batch_size), len(items) // world)
    mine = items[rank::world]
    return [Rows(part[:, 0], np.zeros(len(part), np.int64), part) for part in np.array_split(mine, batches)]
