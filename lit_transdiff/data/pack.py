"""Packing images of any supported source into shuffled webdataset shards with an index.

Shard k is the k-th piece of the shuffled order, so shards are independent: several processes write them, and
the same command continues a killed one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import PIL
from tqdm import tqdm

from lit_transdiff.base.files import format_bytes, free_bytes, require_space
from lit_transdiff.config import require
from lit_transdiff.config.paths import check_pack_source
from lit_transdiff.data.encode import Encoded, Encoding, encode_sample
from lit_transdiff.data.findings import (
    Findings,
    PackReport,
    in_two_classes,
    joined,
    read_report,
    write_findings,
)
from lit_transdiff.data.idx import idx_source
from lit_transdiff.data.index import join_rows, read_index, shard_rows
from lit_transdiff.data.journal import ShardJournal
from lit_transdiff.data.processes import in_processes
from lit_transdiff.data.shards import ShardWriter, tar_bytes
from lit_transdiff.data.sources import ClassNames, ImageSource, folder_source, list_source

PACKING_PLAN = "packing.json"
AS_THEY_ARE = Encoding()
ESTIMATED_FROM = 64  # number of images encoded for an estimate of the size


@dataclass(frozen=True)
class Cut:
    """The number of shards: given by samples or bytes per shard, or directly. Default: 1000 samples each."""

    samples_per_shard: Optional[int] = None
    shards: Optional[int] = None
    shard_size: Optional[int] = None  # bytes

    def __post_init__(self) -> None:
        options = {name: value for name, value in vars(self).items() if value is not None}
        require(len(options) <= 1, " and ".join(options), tuple(options.values()), "one of them")
        for name, value in options.items():
            require(value >= 1, name, value, "an integer of at least 1")

    def __call__(self, order: np.ndarray, total_bytes: int) -> list[np.ndarray]:
        """Split ``order`` into shards of nearly equal size, or of ``samples_per_shard`` and a rest."""
        if self.shards is None and self.shard_size is None:
            each = self.samples_per_shard or 1000
            return np.split(order, range(each, len(order), each))
        number = self.shards or -(-total_bytes // (self.shard_size or 1))
        require(number <= len(order), "shards", number, f"at most {len(order)}, the number of images")
        return np.array_split(order, number)


@dataclass(frozen=True)
class ShardTask:
    """The input of a process that writes one shard."""

    path: Path
    images: list[tuple[str, int, str, Path | np.ndarray]]  # key, label, name, file or pixels
    encoding: Encoding


@dataclass(frozen=True)
class Packing:
    """The contents of the shards, and the journal of the finished ones."""

    images: ImageSource
    pieces: Sequence[np.ndarray]  # the samples of each shard
    names: list[str]  # names of the shards
    encoding: Encoding
    seed: int
    journal: ShardJournal

    @property
    def num_images(self) -> int:
        return sum(len(piece) for piece in self.pieces)

    @property
    def plan(self) -> dict[str, Any]:
        """All settings that affect the bytes of the shards."""
        return {
            "files": self.images.identity,
            "seed": self.seed,
            **self.encoding.plan,
            "encoder": None if self.encoding.keeps_files else f"Pillow {PIL.__version__}",
            "images": self.num_images,
            "shards": len(self.pieces),
            "images in the first and the last": [len(self.pieces[0]), len(self.pieces[-1])],
            "name of the first": self.names[0],
            "class_names": self.images.class_names,
        }

    def missing(self) -> list[int]:
        """The numbers of the shards that are not yet written."""
        return [number for number, name in enumerate(self.names) if self.journal.finished(name) is None]

    def task(self, number: int) -> ShardTask:
        """The task of writing a shard."""
        images = self.images
        chosen = [
            (images.keys[i], int(images.labels[i]), images.origins[i], images.read(i))
            for i in self.pieces[number].tolist()
        ]
        return ShardTask(self.journal.folder / self.names[number], chosen, self.encoding)


def pack(
    source: str | Path,
    dest: str | Path,
    *,
    split: Optional[str] = None,
    class_names: ClassNames = None,
    limit: Optional[int] = None,
    seed: int = 0,
    encoding: Encoding = AS_THEY_ARE,
    cut: Cut = Cut(),
    name: Optional[str] = None,
    workers: int = 0,
    progress: bool = True,
) -> PackReport:
    """Pack an image folder (``class/image.*``), IDX files (``split``: train or t10k) or a list into ``dest``.

    Samples are shuffled once with ``seed``; ``limit`` selects that many, evenly over the classes. Files are
    stored unchanged unless ``encoding`` says otherwise. Shards are called ``name-000000.tar`` (by default
    with the name of ``dest``) and are written by ``workers`` processes. Every image is decoded; unreadable
    ones are skipped, reported, and listed in ``skipped.txt``; other files and folders are counted in the
    report. The same arguments give the same bytes and continue a killed pack. Raises ``ValueError`` for a
    ``dest`` with other shards or without enough disk space.
    """
    dest = Path(dest)
    images = open_source(source, split, class_names)
    order = choose_samples(images, limit, seed)
    sizes = estimated_sizes(images, order, encoding)
    pieces = cut(order, tar_bytes(sizes[order]))
    names = [f"{name or dest.resolve().name}-{number:06d}.tar" for number in range(len(pieces))]
    packing = Packing(images, pieces, names, encoding, seed, ShardJournal(dest, PACKING_PLAN))
    packing.journal.check(packing.plan)
    if not (dest / "index.json").exists():
        announce(packing, [tar_bytes(sizes[piece]) for piece in pieces], progress)
        with packing.journal.alone(packing.plan) as left:
            if left:
                packing.journal.begin(packing.plan)
                write_missing(packing, workers, progress)
                return finish_packing(packing, str(source))
    return read_report(read_index(dest), encoding, images.passed_over, images.source_names)


def open_source(source: str | Path, split: Optional[str], class_names: ClassNames) -> ImageSource:
    """Open ``source``: a list file, a folder of IDX files (``split``: train or t10k), or class folders."""
    source = Path(source)
    check_pack_source(source)
    if source.is_file():
        images = list_source(source, class_names)
    elif any(source.glob("*-idx3-ubyte*")):
        return idx_source(source, split, class_names)
    else:
        images = folder_source(source, class_names)
    require(split is None, "split", split, "None: only IDX files have splits")
    return images


def announce(packing: Packing, shards: Sequence[int], progress: bool) -> None:
    """Announce the size of the ``shards`` before any is written.

    Raises ``ValueError`` if the disk has too little space for the missing ones.
    """
    images, dest, missing = packing.images, packing.journal.folder, packing.missing()
    left, there = sum(shards[number] for number in missing), len(shards) - len(missing)
    if progress:
        some = f"; {there} of them are there already, {format_bytes(left)} to write" if there else ""
        size = ("" if packing.encoding.keeps_files else "about ") + format_bytes(sum(shards))
        tqdm.write(
            f"{packing.num_images} of {len(images.labels)} images of {len(images.class_names)} classes -> "
            f"{len(shards)} shards in {dest}, {size}{some}; {format_bytes(free_bytes(dest))} are free"
        )
    require_space(dest, left)


def write_missing(packing: Packing, workers: int, progress: bool) -> None:
    """Write the missing shards in ``workers`` processes."""
    missing = packing.missing()
    tasks = ((packing.journal, packing.task(number)) for number in missing)
    with tqdm(total=packing.num_images, desc="packing", unit="image", disable=not progress) as bar:
        bar.update(packing.num_images - sum(len(packing.pieces[number]) for number in missing))
        for done in in_processes(pack_shard, tasks, workers):
            bar.update(done)


def estimated_sizes(images: ImageSource, order: np.ndarray, encoding: Encoding) -> np.ndarray:
    """The size in bytes [N] of each image in a shard: that of its file, or a mean estimate."""
    if encoding.keeps_files and isinstance(images.read(0), Path):
        return images.sizes
    sizes = []
    for i in order[:ESTIMATED_FROM].tolist():
        try:
            sizes.append(len(encode_sample(images.read(i), encoding).content))
        except ValueError:
            continue
    return np.full(len(images.labels), np.mean(sizes) if sizes else 0).astype(np.int64)


def pack_shard(journal: ShardJournal, task: ShardTask) -> int:
    """Write one shard and its record; return the number of images processed."""
    findings = Findings()
    with ShardWriter(task.path) as writer:
        for key, label, sample in encoded_images(task, findings):
            writer.write(key, label, sample.extension, sample.content)
    rows = shard_rows(task.path, None)
    if not rows.shard.samples:
        task.path.unlink()
    journal.add(rows, findings)
    return len(task.images)


def encoded_images(task: ShardTask, findings: Findings) -> Iterator[tuple[str, int, Encoded]]:
    """(key, label, content) of the readable images; others and oddities are added to ``findings``."""
    for key, label, origin, image in task.images:
        try:
            sample = encode_sample(image, task.encoding)
        except ValueError as error:
            findings.skipped.append((origin, str(error)))
            continue
        findings.add(sample.oddities, sample.content)
        yield key, label, sample


def finish_packing(packing: Packing, source: str) -> PackReport:
    """Index the shards and save the findings about the images."""
    journal, images = packing.journal, packing.images
    records = journal.all_finished(packing.names)
    findings = joined([record.findings for record in records])
    findings.skipped[:0] = images.broken
    readable_images = sum(record.rows.shard.samples for record in records)
    allowed = "at least one readable image"
    require(readable_images > 0, source, f"{len(findings.skipped)} unreadable images", allowed)
    rows = [record.rows for record in records]
    index = join_rows(journal.folder, rows, images.class_names, packing.seed, None)
    origins = dict(zip(images.keys, images.origins, strict=True))
    write_findings(journal.folder, findings, in_two_classes(index, findings.digests, origins))
    index.save()
    journal.close()
    return read_report(index, packing.encoding, images.passed_over, images.source_names)


def choose_samples(images: ImageSource, limit: Optional[int], seed: int) -> np.ndarray:
    """The samples [n] to pack, in shuffled order; with ``limit`` balanced over the classes."""
    order = np.random.default_rng(seed).permutation(len(images.labels))
    if limit is None:
        return order
    num_classes = len(images.class_names)
    allowed = f"{num_classes} (one a class) to {len(order)} images"
    require(num_classes <= limit <= len(order), "limit", limit, allowed)
    quota = np.full(num_classes, limit // num_classes) + (np.arange(num_classes) < limit % num_classes)
    counts = np.bincount(images.labels, minlength=num_classes)
    for c in np.flatnonzero(counts < quota):
        name = images.class_names[c]
        raise ValueError(f"limit: got {limit}, which is {quota[c]} a class; class {name!r} has {counts[c]}.")
    labels = images.labels[order]
    chosen = [order[labels == c][: quota[c]] for c in range(num_classes)]
    return order[np.isin(order, np.concatenate(chosen))]
