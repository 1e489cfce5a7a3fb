"""Sampled batches of an evaluation as files in a shared folder, from which a stopped evaluation continues.

A batch is a fixed range of image indices, so that its numbers depend neither on the number of ranks nor on
interruptions.
"""

from __future__ import annotations

import os
import secrets
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lit_transdiff.base.arrays import read_arrays
from lit_transdiff.base.endings import RankFailed
from lit_transdiff.base.files import whole
from lit_transdiff.base.locks import LOCK
from lit_transdiff.config import require
from lit_transdiff.config.targets import remove_written
from lit_transdiff.evaluation.images import png

if TYPE_CHECKING:
    from lightning.fabric import Fabric

FAILED, TOKEN, IMAGES = "failed", "token", "images"
PAUSE = 0.2  # seconds between two checks of the folder
SHARED_LIMIT = 20.0  # seconds until a file of one rank must be visible to the others
PART_LIMIT = 3600.0  # seconds without a new batch after which rank 0 gives up
SCORES_LIMIT = 12 * 3600.0  # seconds for which the other ranks wait for the remaining batches and scores


@dataclass(frozen=True)
class BatchFiles:
    """One ``.npz`` file per batch, written atomically, and ``images/`` if images are saved to a folder."""

    folder: Path
    num_images: int
    batch_size: int
    published: Path | None  # the final folder of images, if any: then a batch is complete only with its PNGs

    def batches(self) -> list[range]:
        """The indices of every batch."""
        ends = range(0, self.num_images, self.batch_size)
        return [range(first, min(first + self.batch_size, self.num_images)) for first in ends]

    def path(self, batch: range) -> Path:
        return self.folder / f"{batch.start:08d}.npz"

    def done(self, batch: range) -> bool:
        """Whether the batch has been sampled and its file is complete."""
        if not zipfile.is_zipfile(self.path(batch)):
            return False
        return self.published is None or any(
            png(f, batch[-1]).is_file() for f in (self.images, self.published)
        )

    def missing(self) -> list[range]:
        return [batch for batch in self.batches() if not self.done(batch)]

    @property
    def images(self) -> Path:
        return self.folder / IMAGES

    def write(self, batch: range, arrays: dict[str, np.ndarray]) -> None:
        with whole(self.path(batch)) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def each(self, name: str) -> Iterator[np.ndarray]:
        """The array ``name`` of every batch, in the order of image indices."""
        for batch in self.batches():
            yield read_arrays(self.path(batch), [name])[name]

    def publish_images(self) -> None:
        """Move the images to their final folder, replacing earlier ones of the same settings."""
        if self.published is not None and self.images.is_dir():
            self.published.mkdir(exist_ok=True)
            for image in self.images.iterdir():
                os.replace(image, self.published / image.name)

    def remove(self) -> None:
        remove_written(self.images, ["*.png"])
        remove_written(self.folder, ["*.npz*", TOKEN, FAILED, LOCK])

    def fail(self, why: str) -> None:
        """Report the failure of this rank to the waiting ranks; only the first failure is reported."""
        if self.folder.is_dir() and not (self.folder / FAILED).exists():
            (self.folder / FAILED).write_text(why)

    def check(self) -> None:
        """Raise ``RankFailed`` if a rank has failed."""
        if (self.folder / FAILED).is_file():
            raise RankFailed((self.folder / FAILED).read_text())


def open_batch_files(files: BatchFiles, fabric: Fabric | None) -> list[range]:
    """Create the folder and return the missing batches, the same on every rank.

    Raises ``ValueError`` on every rank if the ranks do not share the folder.
    """
    token, missing = "", []
    if fabric is None or fabric.is_global_zero:
        files.folder.mkdir(parents=True, exist_ok=True)
        (files.folder / FAILED).unlink(missing_ok=True)
        token, missing = secrets.token_hex(8), files.missing()
        (files.folder / TOKEN).write_text(token)
    if fabric is None or fabric.world_size == 1:
        return missing
    token, missing = fabric.broadcast((token, missing))
    file = files.folder / TOKEN
    seen = wait_until(lambda: file.is_file() and file.read_text() == token, SHARED_LIMIT)
    all_see = all(fabric.broadcast(seen, src=rank) for rank in range(fabric.world_size))
    place = str(files.folder.parent)
    allowed = "a folder that the processes of all nodes share; name another with --output"
    require(all_see, "output", place, allowed)
    return missing


def wait_for_batches(files: BatchFiles) -> None:
    """Wait for all batches without a collective, which could time out because ranks differ in speed."""
    remaining, since = files.missing(), time.monotonic()
    while remaining:
        files.check()
        still = [batch for batch in remaining if not files.done(batch)]
        if len(still) < len(remaining):
            remaining, since = still, time.monotonic()
        elif time.monotonic() - since > PART_LIMIT:
            raise RankFailed(f"{len(still)} batches are missing after {PART_LIMIT:.0f} s; start again.")
        else:
            time.sleep(PAUSE)


def wait_for_scores(files: BatchFiles, result: Path) -> None:
    """Wait until rank 0 has written ``result`` and removed the files."""
    failed = files.folder / FAILED
    ended = wait_until(lambda: failed.is_file() or not files.folder.is_dir(), SCORES_LIMIT)
    files.check()
    if not ended:
        raise RankFailed(f"rank 0 wrote no scores to {result} within {SCORES_LIMIT:.0f} s.")


def wait_until(condition: Callable[[], bool], limit: float) -> bool:
    """Poll until ``condition`` is true, for at most ``limit`` seconds; return whether it is."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > limit:
            return False
        time.sleep(PAUSE)
    return True
