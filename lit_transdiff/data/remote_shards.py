"""Reading samples of shards at URLs: from whole shards in the cache, or each by a range request."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np

from lit_transdiff.base.remote import THREADS, RemoteFolder
from lit_transdiff.base.remote_errors import one_line
from lit_transdiff.config import DataConfig
from lit_transdiff.data.checksums import checksum_of
from lit_transdiff.data.index import ShardIndex
from lit_transdiff.data.order import Rows, TrainPlan
from lit_transdiff.data.shard_cache import ShardCache, log
from lit_transdiff.data.shards import ShardReader, check_content

DOWNLOADS_AT_ONCE = 4  # by each process that reads


class CachedReader(ShardReader):
    """Reads from the shards of a cache, which the rows of a batch say in advance."""

    def __init__(self, index: ShardIndex, cache: ShardCache, max_open: int = 128) -> None:
        super().__init__(index, max_open)
        self.cache = cache
        self.prefetch = Prefetch(cache)
        self.reached = -1

    def expect(self, rows: Rows) -> None:
        """Start downloading the shards that this batch and the next ones read."""
        ahead = self.following(rows) if rows.ahead is None else rows.ahead
        if ahead:
            self.prefetch.want(ahead)

    def following(self, rows: Rows) -> tuple[int, ...]:
        """The shard of the last sample and the next ones, if the batch is the first to reach it."""
        shard = self.index.shard_of(int(rows.samples.max())) if rows.samples.size else self.reached
        if shard == self.reached:
            return ()
        self.reached = shard
        sizes = np.cumsum([part.bytes for part in self.index.shards[shard : shard + DOWNLOADS_AT_ONCE]])
        return tuple(range(shard, shard + int((sizes <= self.cache.limit).sum())))

    def open(self, shard: int) -> int:
        """Open a shard, after closing those that have left the cache, whose space is free only then."""
        gone = [one for one, file in self.descriptors.items() if os.fstat(file).st_nlink == 0]
        for one in set(gone) - self.cache.damaged:
            os.close(self.descriptors.pop(one))
        return self.cache.open(shard)

    def read(self, sample: int) -> bytes:
        try:
            return super().read(sample)
        except ValueError:
            if not self.forgets([sample]):
                raise
            return super().read(sample)

    def read_parts(self, samples: np.ndarray, first: np.ndarray, out: np.ndarray) -> None:
        try:
            super().read_parts(samples, first, out)
        except ValueError:
            if not self.forgets(samples.tolist()):
                raise
            super().read_parts(samples, first, out)

    def forgets(self, samples: Sequence[int]) -> bool:
        """Drop the shards of damaged samples from the cache; whether downloading them again may help."""
        again = False
        for shard in {self.index.shard_of(sample) for sample in samples} - self.cache.damaged:
            if (file := self.descriptors.pop(shard, None)) is not None:
                os.close(file)
            self.cache.forget(shard)
            again = True
        return again


class Prefetch:
    """Downloads the shards that are wanted soon, in the background and in their order.

    A failure here is left to the reader of that shard, which tries again and reports it.
    """

    def __init__(self, cache: ShardCache) -> None:
        self.cache = cache
        self.wanted: deque[int] = deque()
        self.failed: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {"cache": self.cache, "wanted": deque(), "failed": set()}

    def want(self, shards: Sequence[int]) -> None:
        """Replace what is wanted."""
        self.wanted = deque(shards)
        self.wake.release(min(len(shards), DOWNLOADS_AT_ONCE))

    @cached_property
    def wake(self) -> threading.Semaphore:
        for number in range(DOWNLOADS_AT_ONCE):
            threading.Thread(target=self.run, daemon=True, name=f"shards {number}").start()
        return threading.Semaphore(0)

    def run(self) -> None:
        while True:
            self.wake.acquire()
            while (shard := self.next()) is not None:
                try:
                    if (file := self.cache.fetch(shard)) is not None:
                        os.close(file)
                except Exception as error:
                    self.failed.add(shard)
                    log.info("%s", one_line(error))

    def next(self) -> int | None:
        """The next wanted shard that is not there."""
        while True:
            try:
                shard = self.wanted.popleft()
            except IndexError:
                return None
            if shard not in self.failed and not self.cache.keeps(shard):
                return shard


class RangeReader:
    """Reads single samples by range requests: for few of many, as in validation."""

    def __init__(self, index: ShardIndex) -> None:
        assert isinstance(index.folder, RemoteFolder)
        self.index, self.remote = index, index.folder
        self.coming: dict[int, Future[bytes]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "remote": self.remote, "coming": {}}

    @cached_property
    def threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(THREADS)

    def expect(self, rows: Rows) -> None:
        """Request all images of a batch at once; ``read_parts`` requests latents."""
        if self.index.latents is None:
            samples = rows.samples.reshape(-1).tolist()
            self.coming = {sample: self.threads.submit(self.content, sample) for sample in samples}

    def read(self, sample: int) -> bytes:
        """The image file or raw latents of a sample. Raises ``ValueError`` for damage."""
        coming = self.coming.pop(sample, None)
        content = self.content(sample) if coming is None else coming.result()
        check_content(self.index, sample, content)
        return content

    def content(self, sample: int) -> bytes:
        return self.part(sample, 0, int(self.index.size[sample]))

    def part(self, sample: int, first: int, length: int) -> bytes:
        """``length`` bytes of a sample from byte ``first`` on."""
        start = int(self.index.offset[sample]) + first
        name = self.index.shards[self.index.shard_of(sample)].name
        return self.remote.read_range(name, start, start + length)

    def read_parts(self, samples: np.ndarray, first: np.ndarray, out: np.ndarray) -> None:
        """Read into ``out`` as ``ShardReader`` does. Raises ``ValueError`` for a part that is damaged."""
        length = out.shape[1]
        parts = partial(self.part, length=length)
        contents = self.threads.map(parts, samples.tolist(), first.tolist())
        for row, (sample, start, content) in enumerate(zip(samples, first, contents, strict=True)):
            sums = self.index.checksum
            if sums is not None and checksum_of(content) != sums[sample, start // length]:
                check_content(self.index, sample, self.content(sample))
            out[row] = np.frombuffer(content, np.uint8)


class ShardsAhead:
    """The shards that training reads at a position of a plan and after it, as many as fit into a cache."""

    def __init__(self, plan: TrainPlan, limit: int) -> None:
        self.plan, self.limit = plan, limit
        self.sizes = np.array([shard.bytes for shard in plan.index.shards])
        self.uses = lru_cache(maxsize=2)(self.uses_in)
        self.last: tuple[int, ...] = ()

    def uses_in(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The shards of an epoch in the order of their first use, with the items of their first and last."""
        items = self.plan.epoch_items(epoch)
        shards = np.searchsorted(self.plan.index.starts, items.reshape(-1), side="right") - 1
        used, first = np.unique(shards, return_index=True)
        last = len(shards) - 1 - np.unique(shards[::-1], return_index=True)[1]
        order, references = np.argsort(first), items.shape[1]
        return used[order], first[order] // references, last[order] // references

    def at_once(self) -> int:
        """The bytes of the shards that the first epoch reads at a time, at most."""
        shards, first, last = self.uses(0)
        changes = np.zeros(self.plan.num_items + 1, np.int64)
        np.add.at(changes, first, self.sizes[shards])
        np.add.at(changes, last + 1, -self.sizes[shards])
        return int(changes.cumsum().max())

    def __call__(self, position: int) -> tuple[int, ...]:
        """The shards to download from this position on; () if they are those of the last call."""
        epoch, item = divmod(position, self.plan.num_items)
        shards, _, last = self.uses(epoch)
        wanted = shards[last >= item]
        room = self.limit - int(self.sizes[wanted].sum())
        if room > 0 and self.sizes.sum() > self.limit:
            wanted = np.concatenate([wanted, self.uses(epoch + 1)[0]])
        ahead = tuple(dict.fromkeys(wanted[self.sizes[wanted].cumsum() <= self.limit].tolist()))
        if ahead == self.last:
            return ()
        self.last = ahead
        return ahead


def reader_of(
    index: ShardIndex, data: DataConfig, max_open: int, few: bool = False
) -> ShardReader | RangeReader:
    """The reader of an index; with ``few``, for a small part of its samples."""
    if not isinstance(index.folder, RemoteFolder):
        return ShardReader(index, max_open)
    return RangeReader(index) if few else CachedReader(index, ShardCache(index, data), max_open)
