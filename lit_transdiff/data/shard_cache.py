"""Shards from URLs as local files of bounded total size, shared by all processes of a machine.

A file is named by the SHA-256 of its shard, so that shards of equal content are stored once and a changed one
is another file. It is written under the name ``.partial``, whose lock the downloading process holds: a shard
is downloaded once at a time, and what a killed process leaves has no lock and is removed. It gets its name
after its samples have been compared with their checksums. The least recently opened shards give way to new
ones; a process that still reads one keeps its content until it closes it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lit_transdiff.base.files import NoSpaceError, format_bytes, free_bytes, is_full
from lit_transdiff.base.locks import LOCK
from lit_transdiff.base.remote import RemoteFolder
from lit_transdiff.base.remote_errors import RemoteError
from lit_transdiff.config import DataConfig, require
from lit_transdiff.data.checksums import damaged_samples
from lit_transdiff.data.index import ShardIndex

SUFFIX, UNFINISHED = ".tar", ".partial"
OURS = re.compile(rf"[0-9a-f]{{64}}({SUFFIX}|{UNFINISHED})")  # other files of the folder are left alone
DOWNLOADS = 3  # downloads of a shard that arrives damaged
DOWNLOAD_POLL = 0.05  # seconds between looks at what another process downloads
log = logging.getLogger(__name__)


class ShardCache:
    """The shards of an index at a URL, as local files."""

    def __init__(self, index: ShardIndex, data: DataConfig) -> None:
        """``ValueError`` if the disk has no locks or the limit is too low, ``NoSpaceError`` if it is full."""
        assert isinstance(index.folder, RemoteFolder)
        self.index, self.remote = index, index.folder
        self.folder, self.limit = data.cache_folder, round(data.cache_gb * 1e9)
        self.damaged: set[int] = set()  # at their source
        largest = max(shard.bytes for shard in index.shards)
        self.require_limit(largest, f"the largest shard of {self.remote}")
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.alone():
            self.check_disk()

    def require_limit(self, needed: int, what: str) -> None:
        """Refuse a limit of fewer than ``needed`` bytes."""
        least = f"at least {needed / 1e9:.3g}, {what}"
        require(self.limit >= needed, "data.cache_gb", self.limit / 1e9, least)

    def check_disk(self) -> None:
        """Refuse a disk that cannot hold as much as the cache may."""
        sizes = {path.name: stat.st_size for path, stat in self.files()}
        missing = sum(s.bytes for s in self.index.shards if s.sha256 + SUFFIX not in sizes)
        wanted, free = min(missing, self.limit - sum(sizes.values())), free_bytes(self.folder)
        if wanted > free:
            raise NoSpaceError(
                errno.ENOSPC,
                f"data.cache_gb: got {self.limit / 1e9:g}, but on the disk of {self.folder} only "
                f"{format_bytes(free)} are free for {format_bytes(wanted)} of {self.remote}; choose a "
                "smaller one, or another data.cache_dir.",
            )

    def files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """The files of the cache; other processes may remove some meanwhile."""
        for name in sorted(os.listdir(self.folder)):
            with suppress(FileNotFoundError):
                if OURS.fullmatch(name):
                    yield self.folder / name, (self.folder / name).stat()

    def path(self, shard: int) -> Path:
        return self.folder / f"{self.index.shards[shard].sha256}{SUFFIX}"

    def holds(self, shard: int) -> bool:
        return self.path(shard).exists()

    def open(self, shard: int) -> int:
        """The open file of a shard, which is downloaded if it is not there."""
        while True:
            try:
                descriptor: int | None = os.open(self.path(shard), os.O_RDONLY)
            except FileNotFoundError:
                descriptor = self.fetch(shard)
            if descriptor is None:
                time.sleep(DOWNLOAD_POLL)
            elif os.fstat(descriptor).st_size != self.index.shards[shard].bytes:  # not written by us
                os.close(descriptor)
                self.forget(shard)
            else:
                mark_used(descriptor)
                return descriptor

    def keeps(self, shard: int) -> bool:
        """Whether a shard is there; it then counts as recently opened, because it will be soon."""
        try:
            mark_used(self.path(shard))
        except FileNotFoundError:
            return False
        return True

    def forget(self, shard: int) -> None:
        """Remove a shard that was damaged here."""
        self.path(shard).unlink(missing_ok=True)

    def fetch(self, shard: int) -> int | None:
        """Download a shard and return its open file; None if another process does, or there is no room now.

        A shard that is damaged at its source is not kept: only this file holds it, and its samples are
        compared when they are read.
        """
        descriptor = self.claim(shard)
        if descriptor is None:
            return None
        partial = self.path(shard).with_suffix(UNFINISHED)
        try:
            there_is_room = self.make_room(descriptor, self.index.shards[shard].bytes)
            if there_is_room and self.download(shard, descriptor):
                os.replace(partial, self.path(shard))
            else:
                partial.unlink()
        except BaseException as error:
            partial.unlink(missing_ok=True)  # while it is locked
            os.close(descriptor)
            if is_full(error):
                raise self.full() from error
            raise
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        if not there_is_room:
            os.close(descriptor)
        return descriptor if there_is_room else None

    def full(self) -> RemoteError:
        free = format_bytes(free_bytes(self.folder))
        return RemoteError(
            f"data.cache_dir: the disk of {self.folder} is full ({free} free). "
            f"Choose a smaller data.cache_gb ({self.limit / 1e9:g}), or another folder."
        )

    def claim(self, shard: int) -> int | None:
        """An open and locked file for a shard; None if another process has it, or has just completed it."""
        partial = self.path(shard).with_suffix(UNFINISHED)
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
        if locked(descriptor):
            if is_at(descriptor, partial) and not self.holds(shard):
                return descriptor
            if is_at(descriptor, partial):
                partial.unlink(missing_ok=True)
        os.close(descriptor)
        return None

    def make_room(self, descriptor: int, size: int) -> bool:
        """Reserve ``size`` bytes for ``descriptor`` by removing old shards; False if others need them."""
        with self.alone():
            shards, total = [], size
            for path, stat in self.files():
                if path.suffix == UNFINISHED and removed_as_abandoned(path):
                    continue
                total += stat.st_size
                if path.suffix == SUFFIX:
                    shards.append((stat.st_mtime_ns, stat.st_size, path))
            for _, bytes_there, path in sorted(shards):
                if total <= self.limit:
                    break
                path.unlink(missing_ok=True)
                total -= bytes_there
            if total <= self.limit:
                os.ftruncate(descriptor, size)
            return total <= self.limit

    def download(self, shard: int, descriptor: int) -> bool:
        """Write a shard into a file; whether it is as in the index after at most ``DOWNLOADS`` attempts."""
        described = self.index.shards[shard]
        where = f"{self.remote}/{described.name}"
        problem = ""
        for _ in range(DOWNLOADS):
            place, digest = 0, hashlib.sha256()
            for content in self.remote.chunks(described.name, described.bytes):
                write_at(descriptor, content, place)
                place += len(content)
                if self.index.checksum is None:
                    digest.update(content)
            if self.index.checksum is None:
                problem = "" if digest.hexdigest() == described.sha256 else "its SHA-256 differs from"
            else:
                bad = damaged_samples(self.index, shard, descriptor)
                names = ", ".join(self.index.name_of(sample) for sample in bad[:3])
                problem = f"{len(bad)} samples ({names}) differ from" if bad else ""
            if not problem:
                self.damaged.discard(shard)
                return True
            log.info("%s: %s the index; it is downloaded again", where, problem)
        if self.index.checksum is None:  # nothing would notice it later
            raise RemoteError(
                f"{where}: {problem} that in the index after {DOWNLOADS} downloads: damaged or replaced. "
                "Upload the shard and its index again."
            )
        self.damaged.add(shard)
        log.warning("%s: %s the index after %d downloads: damaged at its source", where, problem, DOWNLOADS)
        return False

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock of the folder in the block."""
        descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                allowed = f"a folder on a disk with locks ({error}), best a local one"
                require(False, "data.cache_dir", str(self.folder), allowed)
            yield
        finally:
            os.close(descriptor)


def mark_used(file: int | Path) -> None:
    """Note that a shard is read now."""
    now = time.time_ns()
    with suppress(PermissionError):  # a file of another user
        os.utime(file, ns=(now, now))


def locked(descriptor: int) -> bool:
    """Lock an open file, unless another one has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return there.st_ino == os.fstat(descriptor).st_ino


def write_at(descriptor: int, content: bytes, place: int) -> None:
    """Write all of ``content``: a disk that is almost full first takes a part without an error."""
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, place)
        view, place = view[written:], place + written


def removed_as_abandoned(partial: Path) -> bool:
    """Remove a download whose process has died."""
    try:
        descriptor = os.open(partial, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        if not locked(descriptor):
            return False
        partial.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)
