"""Checksums of samples, 32 bits of XXH3: of each image, or of each part of latents (image, mirror image).

Latents are read at gigabytes per second, which only XXH3 keeps up with. It misses one damaged sample in four
billion.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from xxhash import xxh3_64_intdigest

if TYPE_CHECKING:
    from lit_transdiff.data.index import ShardIndex


def checksum_of(content: bytes | memoryview) -> int:
    return xxh3_64_intdigest(content) & 0xFFFFFFFF


def checksums_of(content: bytes, parts: int) -> list[int]:
    """The checksums of the ``parts`` of equal size of a sample."""
    size, view = len(content) // parts, memoryview(content)
    return [checksum_of(view[part * size : (part + 1) * size]) for part in range(parts)]


def checksums_in(path: Path, places: Iterable[tuple[int, int]], parts: int) -> np.ndarray:
    """The checksums [n, parts] uint32 of the samples at ``places`` (offset, size) of a shard."""
    with path.open("rb") as file:
        return checksums_at(file.fileno(), places, parts)


def checksums_at(descriptor: int, places: Iterable[tuple[int, int]], parts: int) -> np.ndarray:
    """``checksums_in`` an open file."""
    sums = [checksums_of(os.pread(descriptor, size, offset), parts) for offset, size in places]
    return np.array(sums, np.uint32).reshape(-1, parts)


def damaged_samples(index: ShardIndex, shard: int, descriptor: int) -> list[int]:
    """The samples of an open shard that differ from their checksums, if the index has some."""
    if index.checksum is None:
        return []
    mine = slice(index.starts[shard], index.starts[shard + 1])
    places = zip(index.offset[mine].tolist(), index.size[mine].tolist(), strict=True)
    sums = checksums_at(descriptor, places, index.checksum.shape[1])
    return (np.flatnonzero((sums != index.checksum[mine]).any(axis=1)) + mine.start).tolist()
