"""Shards: writing deterministic webdataset tars, and reading single samples by offset."""

from __future__ import annotations

import os
from collections import OrderedDict
from contextlib import nullcontext, suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Optional

import numpy as np
import webdataset as wds

from lit_transdiff.base.files import partial_name
from lit_transdiff.data.checksums import checksum_of, checksums_of
from lit_transdiff.data.index import ShardIndex
from lit_transdiff.data.order import Rows

TAR_BLOCK, TAR_RECORD = 512, 10240  # bytes to which members, and whole tars, are padded


def tar_bytes(sizes: np.ndarray) -> int:
    """The size of a shard written by ``ShardWriter`` for samples of these sizes."""
    blocks = int((-(-sizes.astype(np.int64) // TAR_BLOCK) + 3).sum()) + 2
    return -(-blocks * TAR_BLOCK // TAR_RECORD) * TAR_RECORD


class ShardWriter:
    """Writes one shard under a temporary name and renames it when complete.

    The same samples give the same bytes. The temporary name is unique to this process, so that leftovers of
    others cannot interfere.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = partial_name(path)

    def __enter__(self) -> ShardWriter:
        self.file = self.partial.open("wb")
        self.tar = wds.TarWriter(self.file, encoder=False, mtime=0)  # a fixed mtime gives equal bytes
        return self

    def write(self, key: str, label: int, extension: str, data: bytes) -> None:
        """Append one sample; ``extension`` (``png``, ``jpg``, ``bin``, ...) is the type of ``data``."""
        self.tar.write({"__key__": key, extension: data, "cls": str(label).encode()})

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        try:
            with suppress(OSError) if error else nullcontext():  # on a full disk closing fails as well
                self.tar.close()
            with suppress(OSError) if error else nullcontext():
                self.file.close()
            if error is None:
                os.replace(self.partial, self.path)
        finally:
            self.partial.unlink(missing_ok=True)


class ShardReader:
    """Reads the bytes of any sample of an index; keeps at most ``max_open`` files open.

    ``pread`` has no file position, so that threads and forked workers may share a reader; after pickling it
    opens its files again. Content is compared with its checksum: images at every read, which is cheap
    relative to decoding, latents at the first.
    """

    def __init__(self, index: ShardIndex, max_open: int = 128) -> None:
        self.index = index
        self.max_open = max_open
        self.descriptors: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "unread"}
        return {**state, "descriptors": OrderedDict()}

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.popitem()[1])

    def descriptor(self, shard: int) -> int:
        """The open file of a shard; the least recently used one is closed."""
        if shard not in self.descriptors:
            if len(self.descriptors) >= self.max_open:
                os.close(self.descriptors.popitem(last=False)[1])
            self.descriptors[shard] = self.open(shard)
        self.descriptors.move_to_end(shard)
        return self.descriptors[shard]

    def open(self, shard: int) -> int:
        return os.open(f"{self.index.folder}/{self.index.shards[shard].name}", os.O_RDONLY)

    def expect(self, rows: Rows) -> None:
        """Prepare for the samples of a batch; local files need no preparation."""

    @cached_property
    def unread(self) -> np.ndarray:
        """[N, parts] bool: the parts of latents whose checksums this process has not compared yet."""
        parts = self.index.latents.flips if self.index.latents else 1
        return np.full((len(self.index), parts), self.index.checksum is not None)

    def read(self, sample: int) -> bytes:
        """The image file or raw latents of a sample. Raises ``ValueError`` for damage or a short read."""
        size = int(self.index.size[sample])
        data = os.pread(self.descriptor(self.index.shard_of(sample)), size, int(self.index.offset[sample]))
        if len(data) != size:
            raise ValueError(
                f"{self.index.name_of(sample)}: {len(data)} of {size} bytes read: the shard is truncated."
            )
        check_content(self.index, sample, data)
        return data

    def read_parts(self, samples: np.ndarray, first: np.ndarray, out: np.ndarray) -> None:
        """Read as many bytes of each sample from ``first`` on into ``out`` [n, bytes] uint8, shard by shard.

        Raises ``ValueError`` as ``read`` does.
        """
        length, view = out.shape[1], out.reshape(-1).data
        order = np.argsort(samples, kind="stable")
        samples, first = samples[order], first[order]
        parts = first // length
        new = self.unread[samples, parts]
        shards = np.searchsorted(self.index.starts, samples, side="right") - 1
        columns = (order * length, shards, self.index.offset[samples] + first, new)
        descriptor, current = -1, -1
        checksums = []
        for i, (begin, shard, offset, is_new) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        ):
            if shard != current:
                descriptor, current = self.descriptor(shard), shard
            content = view[begin : begin + length]
            count = os.preadv(descriptor, [content], offset)
            if count != length:
                read = f"{count} of {length} bytes read"
                raise ValueError(f"{self.index.name_of(samples[i])}: {read}: the shard is truncated.")
            if is_new:
                checksums.append(checksum_of(content))  # while it is in the processor's cache
        if checksums:
            self.compare(samples[new], parts[new], checksums)

    def compare(self, samples: np.ndarray, parts: np.ndarray, checksums: list[int]) -> None:
        """Compare and mark parts by their checksums. Raises ``ValueError`` for the first that differs."""
        assert self.index.checksum is not None
        wrong = np.flatnonzero(self.index.checksum[samples, parts] != np.array(checksums, np.uint32))
        if len(wrong):
            raise damaged(self.index, int(samples[wrong[0]]))
        self.unread[samples, parts] = False


def check_content(index: ShardIndex, sample: int, content: bytes) -> None:
    """Raise ``ValueError`` if a sample differs from its checksum (absent in older indexes)."""
    if (
        index.checksum is not None
        and checksums_of(content, index.checksum.shape[1]) != index.checksum[sample].tolist()
    ):
        raise damaged(index, sample)


def damaged(index: ShardIndex, sample: int) -> ValueError:
    """The error for a sample that differs from its checksum."""
    return ValueError(
        f"{index.name_of(sample)}: the sample at byte {index.offset[sample]} of the shard is damaged: its "
        "checksum differs from that in the index. Copy the shard again, or make the shards again. To list "
        f"all damaged samples: lit-transdiff verify {index.folder}"
    )
