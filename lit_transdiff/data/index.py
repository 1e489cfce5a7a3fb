"""The index of a folder of shards: ``index.json`` (readable) and ``index.npz`` for random access.

The sidecar ``index.npz`` has one row per sample, in shard order: ``offset`` (int64, bytes), ``size`` (int32,
bytes), ``label`` (int32), ``key`` (fixed-width bytes) and ``checksum`` (uint32 per part, see ``checksums``;
absent in earlier versions). With it any sample is one ``pread`` away, and any order can be planned. Its
``header`` is the CRC-32 of ``index.json``.
"""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
from tqdm import tqdm

from lit_transdiff.base.arrays import read_arrays
from lit_transdiff.base.files import json_of, replace_file, sha256_of, sha256_of_lines
from lit_transdiff.config import require
from lit_transdiff.data.checksums import checksums_in
from lit_transdiff.data.index_files import (
    FORMAT,
    Folder,
    check_free,
    header_bytes,
    shard_folder,
    sidecar,
    sizes_in,
)
from lit_transdiff.data.processes import in_processes
from lit_transdiff.data.scan import CLS, LABEL_MEMBER, Labels, ScannedSample, require_class_0, scan_shard

INDEX_VERSION = 1
COLUMN_TYPES = {"offset": np.int64, "size": np.int32, "label": np.int32}


@dataclass(frozen=True)
class Shard:
    """One tar file: its number of samples and classes, size in bytes and checksum."""

    name: str
    samples: int
    bytes: int
    sha256: str
    classes: int


@dataclass(frozen=True, eq=False)
class ShardRows:
    """One shard and its rows of the index: arrays of ``COLUMN_TYPES``, ``key`` and ``checksum``."""

    shard: Shard
    columns: dict[str, np.ndarray]


@dataclass(frozen=True)
class LatentInfo:
    """The format of cached latents: per sample ``flips`` arrays of ``shape`` (2 x latent channels, h, w)."""

    shape: tuple[int, int, int]
    flips: int  # 1: the image; 2: the image, then its mirror image
    fingerprint: str  # the autoencoder's fingerprint
    image_size: int  # pixels of the encoded images
    dtype: Literal["float16"] = "float16"

    @property
    def sample_bytes(self) -> int:
        return self.flips * int(np.prod(self.shape)) * 2


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The content of a folder of shards. Arrays have one row per sample, in shard order."""

    folder: Folder
    class_names: tuple[str, ...]
    shards: tuple[Shard, ...]
    offset: np.ndarray  # [N] int64
    size: np.ndarray  # [N] int32
    label: np.ndarray  # [N] int32
    key: np.ndarray  # [N] bytes
    seed: Optional[int] = None  # seed of the shuffle in packing
    latents: Optional[LatentInfo] = None
    checksum: Optional[np.ndarray] = None  # [N, parts] uint32

    def __len__(self) -> int:
        return len(self.label)

    @property
    def kind(self) -> Literal["images", "latents"]:
        return "images" if self.latents is None else "latents"

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def starts(self) -> np.ndarray:
        """[shards + 1] int64: the first sample of each shard, then N."""
        return np.concatenate([[0], np.cumsum([shard.samples for shard in self.shards])]).astype(np.int64)

    @cached_property
    def class_counts(self) -> np.ndarray:
        """[num_classes] int64: samples of each class."""
        return np.bincount(self.label, minlength=self.num_classes)

    @property
    def identity(self) -> str:
        """A hash of the shards' checksums and class names, equal for equal data."""
        lines = [*(f"{shard.name} {shard.sha256}" for shard in self.shards), *self.class_names]
        return sha256_of_lines(lines)[:16]

    def shard_of(self, sample: int) -> int:
        return int(np.searchsorted(self.starts, sample, side="right")) - 1

    def key_of(self, sample: int) -> str:
        return self.key[sample].decode()

    def name_of(self, sample: int) -> str:
        """``shard/key``, for messages."""
        return f"{self.shards[self.shard_of(sample)].name}/{self.key_of(sample)}"

    def save(self) -> None:
        """Write ``index.npz``, then ``index.json``, each under a temporary name first."""
        content = {
            "format": FORMAT,
            "version": INDEX_VERSION,
            "kind": self.kind,
            "samples": len(self),
            "seed": self.seed,
            "classes": dict(zip(self.class_names, self.class_counts.tolist(), strict=True)),
            "latents": None if self.latents is None else asdict(self.latents),
            "shards": [asdict(shard) for shard in self.shards],
        }
        header = (json.dumps(content, indent=1) + "\n").encode()
        self.save_sidecar(header)
        assert isinstance(self.folder, Path)
        replace_file(self.folder / "index.json", header)

    def save_sidecar(self, header: bytes) -> None:
        """Write the ``index.npz`` that belongs to an ``index.json`` with the content ``header``."""
        assert isinstance(self.folder, Path)
        buffer, columns = io.BytesIO(), {name: getattr(self, name) for name in (*COLUMN_TYPES, "key")}
        if self.checksum is not None:
            columns["checksum"] = self.checksum
        np.savez(buffer, header=np.uint32(zlib.crc32(header)), **columns)
        replace_file(self.folder / "index.npz", buffer.getvalue())


def read_index(path: str | Path, check_files: bool = True) -> ShardIndex:
    """The index of a folder or URL (or of an ``index.json``), checked against the sizes of the shards.

    ``check_files=False`` is for shards elsewhere. Raises ``FileNotFoundError`` for a missing folder, index or
    shard, ``RemoteError`` for a URL that cannot be read, and ``ValueError`` for inconsistencies; ``verify``
    also compares the checksums.
    """
    folder, text = shard_folder(path), header_bytes(path)
    arrays = sidecar(folder)
    try:
        header = json_of(text)
        require(header.get("format") == FORMAT, "format", header.get("format"), repr(FORMAT))
        require(header["version"] == INDEX_VERSION, "version", header["version"], f"{INDEX_VERSION}")
        columns = read_arrays(arrays)
        if int(columns.pop("header", zlib.crc32(text))) != zlib.crc32(text):
            raise ValueError("index.json is not what was written with index.npz")
        index = index_from(folder, header, columns)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, OSError) as error:
        again = f"Make it again: lit-transdiff index {folder}"
        problem = f"the index is damaged or of another version ({error})"
        raise ValueError(f"{folder}: {problem}. {again}") from error
    if check_files:
        check_shard_sizes(index)
    return index


def index_from(folder: Folder, header: dict[str, Any], columns: dict[str, np.ndarray]) -> ShardIndex:
    """The index from the content of ``index.json`` and the arrays of its sidecar."""
    latents = header["latents"]
    if latents is not None:
        latents = LatentInfo(**{**latents, "shape": tuple(latents["shape"])})
    index = ShardIndex(
        folder=folder,
        class_names=tuple(header["classes"]),
        shards=tuple(Shard(**shard) for shard in header["shards"]),
        seed=header["seed"],
        latents=latents,
        checksum=columns.get("checksum"),
        **{name: columns[name] for name in (*COLUMN_TYPES, "key")},
    )
    for shard in index.shards:
        plain = isinstance(shard.name, str) and re.fullmatch(r"[^/\0]+\.tar", shard.name) is not None
        require(plain, "shards: name", shard.name, "a .tar of the folder")
    names = [shard.name for shard in index.shards]
    require(len(set(names)) == len(names), "shards: name", "one twice", "names that differ")
    counts = {name: int(count) for name, count in zip(index.class_names, index.class_counts, strict=False)}
    fits = (
        int(index.starts[-1]) == header["samples"]
        and counts == header["classes"]
        and len(index.key) == len(index)
    )
    if not fits or len(index.class_counts) != index.num_classes:
        raise ValueError("index.npz does not belong to index.json")
    check_columns(index)
    return index


def check_columns(index: ShardIndex) -> None:
    """Check that every sample has a row and lies within its shard."""
    for name in (*COLUMN_TYPES, "key"):
        column = getattr(index, name)
        fits = column.shape == (len(index),) and column.dtype.kind in ("S" if name == "key" else "iu")
        allowed = f"one of each of the {len(index)} samples"
        require(fits, name, f"{column.dtype} of shape {column.shape}", allowed)
    if (sums := index.checksum) is not None:
        fits = sums.ndim == 2 and len(sums) == len(index) and sums.dtype.kind == "u"
        allowed = "whole numbers of shape [samples, parts]"
        require(fits, "checksum", f"{sums.dtype} of shape {sums.shape}", allowed)
    ends = np.repeat([shard.bytes for shard in index.shards], [shard.samples for shard in index.shards])
    positive = (index.offset >= 0) & (index.size >= 0)
    within = positive & (index.size <= ends) & (index.offset <= ends - index.size)
    if not within.all():
        first = int(np.flatnonzero(~within)[0])
        raise ValueError(f"a sample lies outside of its shard: {index.name_of(first)}")


def check_shard_sizes(index: ShardIndex) -> None:
    """Check that every shard exists and has the size in the index."""
    sizes = sizes_in(index.folder, [shard.name for shard in index.shards])
    for name, expected in ((shard.name, shard.bytes) for shard in index.shards):
        if name not in sizes:
            raise FileNotFoundError(f"{index.folder}: shard {name} is in index.json but not in the folder.")
        if sizes[name] not in (None, expected):
            text = f"{sizes[name]} bytes, but {expected} in index.json: the shard is damaged or was replaced."
            raise ValueError(f"{index.folder}/{name}: {text}")


def index_shards(
    folder: str | Path,
    class_names: Optional[Sequence[str]] = None,
    seed: Optional[int] = None,
    latents: Optional[LatentInfo] = None,
    workers: int = 0,
    progress: bool = True,
    save: bool = True,
    label: str = LABEL_MEMBER,
) -> ShardIndex:
    """Scan the tars of a folder (in name order, in ``workers`` processes) and ``save`` their index.

    Without ``class_names`` the names are the numbers 0 to the largest label, and class 0 must not be empty if
    class 1 is used; ``label`` is the member with the label (see ``Labels.of``). Raises ``ValueError`` with
    shard and key for anything that ``scan_shard`` refuses, and for a key that occurs in two shards.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise FileNotFoundError(
            f"{folder} has no *.tar (compressed tars cannot be read at an offset; unpack them first)."
        )
    if save:
        check_free(folder)
    tasks = ((path, latents, Labels.of(label, class_names or ())) for path in paths)
    shown = dict(desc="indexing", unit="shard", total=len(paths), disable=not progress)
    rows = tqdm(in_processes(shard_rows, tasks, workers), **shown)
    ordered = sorted(rows, key=lambda shard_row: shard_row.shard.name)
    index = join_rows(folder, ordered, class_names, seed, latents)
    if class_names is None:
        require_class_0(str(folder), index.label.tolist())
    if save:
        index.save()
    return index


def shard_rows(path: Path, latents: Optional[LatentInfo], labels: Labels = CLS) -> ShardRows:
    """Scan one shard for its checksum and samples; ``latents`` is the expected format."""
    scanned, parts = scan_shard(path, labels), latents.flips if latents else 1
    for sample in scanned:
        check_sample(path.name, sample, latents)
    columns = {}
    for name, kind in COLUMN_TYPES.items():
        columns[name] = np.array([getattr(sample, name) for sample in scanned], kind)
    columns["key"] = np.array([sample.key.encode() for sample in scanned], np.bytes_)
    columns["checksum"] = checksums_in(path, ((sample.offset, sample.size) for sample in scanned), parts)
    classes = len({sample.label for sample in scanned})
    return ShardRows(Shard(path.name, len(scanned), path.stat().st_size, sha256_of(path), classes), columns)


def join_rows(
    folder: Path,
    rows: Sequence[ShardRows],
    class_names: Optional[Sequence[str]],
    seed: Optional[int],
    latents: Optional[LatentInfo],
) -> ShardIndex:
    """The index of scanned shards, in their order; shards without samples are omitted."""
    rows = [each for each in rows if each.shard.samples]
    require(len(rows) > 0, str(folder), "shards without a sample", "at least one sample")
    # records of earlier versions have no checksums
    names = set.intersection(*(set(each.columns) for each in rows))
    columns = {name: np.concatenate([each.columns[name] for each in rows]) for name in names}
    highest = int(columns["label"].max())
    classes = tuple(str(c) for c in range(highest + 1)) if class_names is None else tuple(class_names)
    require(highest < len(classes), f"{folder}: label", highest, f"0 to {len(classes) - 1} (class names)")
    shards = tuple(each.shard for each in rows)
    index = ShardIndex(folder, classes, shards, seed=seed, latents=latents, **columns)
    by_key = np.argsort(index.key, kind="stable")
    for place in np.flatnonzero(index.key[by_key[1:]] == index.key[by_key[:-1]]):
        one, other = (index.shards[index.shard_of(sample)].name for sample in by_key[place : place + 2])
        raise ValueError(f"{other}: key {index.key_of(by_key[place])!r} is also in {one}; keys must differ.")
    return index


def check_sample(shard: str, sample: ScannedSample, latents: Optional[LatentInfo]) -> None:
    """Check that a sample is of the indexed kind and not empty, and a latent of the right size."""
    kind = "images" if latents is None else "latents"
    if sample.kind != kind:
        raise ValueError(f"{shard}: sample {sample.key!r} holds {sample.kind}; indexed are {kind}.")
    if latents is None and sample.size == 0:
        raise ValueError(f"{shard}: sample {sample.key!r} is an empty image.")
    if latents is not None and sample.size != latents.sample_bytes:
        raise ValueError(
            f"{shard}: sample {sample.key!r} has {sample.size} bytes; allowed: {latents.sample_bytes}."
        )
