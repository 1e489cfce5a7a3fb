"""Shards read as a stream: exact order and resuming for the same number of ranks and workers.

Each reader (worker of a rank) has its own endless stream: of every epoch's permutation of the shards it takes
each n-th one, for n readers in total, and shuffles them in a buffer that is emptied at the end of the epoch.
Samples then wait, as bytes, until there are R of their class. The stream is thus a pure function of (seed,
epoch, reader), and the position in it follows from the micro-step. Resuming reads the current epoch's shards
again up to that position, without decoding.
"""

from __future__ import annotations

import logging
import math
import random
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Optional
from urllib.parse import urlsplit

import numpy as np
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.shardlists import expand_urls
from webdataset.tariterators import tarfile_samples

from lit_transdiff.config import DataConfig, require
from lit_transdiff.data.dataset import Batch, SampleDecoder
from lit_transdiff.data.index import ShardIndex
from lit_transdiff.data.order import BatchLayout, generator
from lit_transdiff.data.references import check_class_sizes, num_groups
from lit_transdiff.data.scan import IMAGE_MEMBERS, LATENT_MEMBER, PICKLE_MEMBERS
from lit_transdiff.data.shards import check_content

log = logging.getLogger(__name__)
SHUFFLE_BUFFER = 1000  # samples in a reader's shuffle buffer


class StreamedSample(NamedTuple):
    """A sample of the index with its bytes, or with the reason for their absence."""

    sample: int
    content: Optional[bytes]
    problem: str = ""


class StreamDataset(IterableDataset):
    """Whole batches of this rank, from ``first_micro_step`` on; ``index`` describes the shards."""

    def __init__(
        self,
        index: ShardIndex,
        data: DataConfig,
        seed: int,
        layout: BatchLayout,
        total: int,
        num_references: int = 1,
    ) -> None:
        """Raises ``ValueError`` for URLs other than the index's shards, and where ``share`` would fail."""
        self.urls: list[str] = expand_urls(data.train)
        names = [shard.name for shard in index.shards]
        allowed = f"{len(names)}, the shards in {index.folder}/index.json"
        require(len(self.urls) == len(names), "data.train: URLs", len(self.urls), allowed)
        # not from brace expansion
        schemes = ("", "http", "https", *(["pipe"] if data.train.startswith("pipe:") else []))
        for url, name in zip(self.urls, names, strict=True):
            allowed = "http://, https://, a path, or pipe:COMMAND"
            require(urlsplit(url).scheme in schemes, "data.train", url, allowed)
            require(name in url, "data.train", url, f"the URL of {name}, which comes here in index.json")
        readers = layout.world * max(1, data.num_workers)
        allowed = f"at most {len(names)} shards / {layout.world} ranks"
        require(readers <= len(names), "data.num_workers", data.num_workers, allowed)
        self.index = index
        self.seed = seed
        self.layout = layout
        self.total = total
        self.num_references = num_references
        self.skip = data.on_bad_sample == "skip"
        self.decode = SampleDecoder(index, data, seed, training=True)
        self.first_micro_step = 0
        check_class_sizes(index, num_references)
        if num_references > 1:
            self.check_shares(readers, math.ceil(total / max(1, data.num_workers)) * layout.micro_batch)

    def __len__(self) -> int:
        """The micro-batches of the whole run, also on resuming."""
        return self.total

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        place, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        first = self.first_micro_step + place  # workers alternate, starting with place 0
        reader = self.layout.rank * workers + first % workers
        done = first // workers * self.layout.micro_batch  # rows that this reader has already given
        rows = self.decoded(self.stream(reader, self.layout.world * workers, done))
        for micro_step in range(first, self.total, workers):
            yield self.batch(micro_step, list(islice(rows, self.layout.micro_batch)))

    def batch(self, micro_step: int, rows: list[tuple[list[int], Tensor]]) -> Batch:
        samples = np.array([group for group, _ in rows], np.int64)
        start = self.layout.start(micro_step)
        return Batch(
            values=torch.stack([values for _, values in rows]),
            labels=torch.from_numpy(self.index.label[samples[:, 0]].astype(np.int64)),
            samples=torch.from_numpy(samples),
            positions=torch.arange(start, start + len(rows)),
        )

    def share(self, epoch: int, reader: int, readers: int) -> tuple[list[int], np.ndarray]:
        """The shards of a reader in an epoch, and the number of samples that it takes of each class.

        Classes with fewer than R samples are skipped in this epoch. Raises ``ValueError`` if nothing remains.
        """
        shards = generator(self.seed, epoch).permutation(len(self.urls))[reader::readers].tolist()
        starts = self.index.starts
        labels = np.concatenate([self.index.label[starts[shard] : starts[shard + 1]] for shard in shards])
        counts = np.bincount(labels, minlength=self.index.num_classes)
        counts[counts < self.num_references] = 0
        if not counts.any():
            raise ValueError(
                f"model.num_references: got {self.num_references}, but no class is as often in {len(shards)} "
                f"of {len(self.urls)} shards, which each of {readers} readers (ranks times data.num_workers) "
                "has in an epoch; allowed: fewer readers."
            )
        return shards, counts

    def check_shares(self, readers: int, rows: int) -> None:
        """Raise the errors of ``share`` within ``rows`` rows per reader; warn of skipped samples."""
        taken = total = 0
        for reader in range(readers):
            done = epoch = 0
            while done < rows:
                shards, counts = self.share(epoch, reader, readers)
                done += num_groups(counts, self.num_references)
                taken += int(counts.sum())
                total += sum(self.index.shards[shard].samples for shard in shards)
                epoch += 1
        if taken < total:
            share = 100 * (1 - taken / total)
            reason = f"one of {readers} readers has fewer than {self.num_references} of a class"
            log.warning("data.train: %.2g%% of the images are left out of an epoch: %s", share, reason)

    def stream(self, reader: int, readers: int, done: int) -> Iterator[tuple[int, list[StreamedSample]]]:
        """Endless (epoch, row of R samples) after the first ``done``; bad samples count as indexed."""
        epoch = 0
        while True:
            shards, counts = self.share(epoch, reader, readers)
            length = num_groups(counts, self.num_references)
            if done < length:
                shuffle = wds.shuffle(
                    SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=random.Random(f"{self.seed}/{epoch}/{reader}")
                )
                grouped = partial(self.grouped, counts=counts)
                pipeline = wds.DataPipeline(
                    partial(iter, shards), self.read_shards, shuffle, grouped, wds.slice(done, None)
                )
                for row in pipeline:
                    yield epoch, row
            done = max(0, done - length)
            epoch += 1

    def grouped(
        self, samples: Iterator[StreamedSample], counts: np.ndarray
    ) -> Iterator[list[StreamedSample]]:
        """Rows of R samples of one class, in order of completion; ``counts`` are the samples of each class.

        The last row of a class is completed with samples of its previous row.
        """
        waiting, fillers = defaultdict[int, list[StreamedSample]](list), {}
        for sample in samples:
            c = int(self.index.label[sample.sample])
            if not counts[c]:
                continue
            waiting[c].append(sample)
            if len(waiting[c]) == self.num_references:
                row = waiting.pop(c)
                fillers[c] = row[: -counts[c] % self.num_references]
                yield row
        for c, row in waiting.items():
            yield row + fillers[c]

    def read_shards(self, shards: Iterator[int]) -> Iterator[StreamedSample]:
        """Exactly the indexed samples of each shard; missing ones carry the reason."""
        for shard in shards:
            first, end = (int(start) for start in self.index.starts[shard : shard + 2])
            name, sample, reason = self.index.shards[shard].name, first, ""
            samples = tarfile_samples(iter([{"url": self.urls[shard]}]))
            while sample < end:
                try:
                    raw: dict[str, Any] = next(samples, {})
                except (tarfile.TarError, OSError, EOFError, ValueError) as error:
                    raw, reason = {}, f" ({error})"
                content = payload(raw, name)
                if raw and content is None:  # members separated from their image
                    continue
                if (
                    content is None
                    or raw["__key__"] != self.index.key_of(sample)
                    or len(content) != self.index.size[sample]
                ):
                    break
                yield self.checked(sample, content)
                sample += 1
            if sample < end:
                count = f"only {sample - first} of {end - first} samples are as in the index"
                problem = f"{name}: {count}{reason}: truncated, damaged or replaced"
                if not self.skip:
                    raise ValueError(problem)
                yield from (StreamedSample(missing, None, problem) for missing in range(sample, end))

    def checked(self, sample: int, content: bytes) -> StreamedSample:
        """A sample with its bytes; for a damaged one the reason instead, or ``ValueError``."""
        try:
            check_content(self.index, sample, content)
        except ValueError as error:
            if not self.skip:
                raise
            return StreamedSample(sample, None, str(error))
        return StreamedSample(sample, content)

    def decoded(self, rows: Iterator[tuple[int, list[StreamedSample]]]) -> Iterator[tuple[list[int], Tensor]]:
        """(samples, values [R, ...]).

        With ``on_bad_sample: skip`` the next readable row replaces a bad one.
        """
        bad, skipped = 0, 0
        for epoch, row in rows:
            try:
                values = torch.stack([self.values(sample, epoch) for sample in row])
            except ValueError as error:
                if not self.skip or bad > len(self.index):  # in the latter case nothing is readable
                    raise
                bad, skipped = bad + 1, skipped + 1
                log.warning(
                    "bad sample %s; the next row is used instead (%d skipped by this process)", error, skipped
                )
                continue
            for _ in range(bad + 1):
                yield [sample for sample, _, _ in row], values
            bad = 0

    def values(self, streamed: StreamedSample, epoch: int) -> Tensor:
        """The values of a sample; raises ``ValueError`` if it is unreadable."""
        sample, content, problem = streamed
        if content is None:
            raise ValueError(
                f"{self.index.name_of(sample)}: got {problem}; allowed: a sample that can be read."
            )
        return self.decode(content, sample, epoch)


def payload(raw: dict[str, Any], shard: str) -> Optional[bytes]:
    """The image or latents of a webdataset sample.

    Raises ``ValueError`` for a pickle, whatever ``on_bad_sample`` says.
    """
    for member in raw:
        if member.rpartition(".")[2] in PICKLE_MEMBERS:
            raise ValueError(
                f"{shard}: sample {raw['__key__']!r} has a pickle (.{member}), which could run any code; "
                "refused."
            )
    return next((raw[member] for member in (*IMAGE_MEMBERS, LATENT_MEMBER) if member in raw), None)
