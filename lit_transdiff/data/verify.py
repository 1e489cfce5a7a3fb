"""Verification of shards against their index, and re-indexing of intact ones."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

from lit_transdiff.base.files import sha256_of
from lit_transdiff.base.remote import is_remote
from lit_transdiff.config import require
from lit_transdiff.data.checksums import damaged_samples
from lit_transdiff.data.index import ShardIndex, index_shards, read_index
from lit_transdiff.data.index_files import Folder
from lit_transdiff.data.processes import in_processes
from lit_transdiff.data.scan import LABEL_MEMBER
from lit_transdiff.data.sources import ClassNames, text_lines

LISTED_SAMPLES = 10  # number of samples in a message
log = logging.getLogger(__name__)


def verify(folder: str | Path, workers: int = 0) -> ShardIndex:
    """Compare every shard's SHA-256 with the index; ``ValueError`` names what differs."""
    index = read_index(folder)
    tasks = ((index.folder, shard.name, shard.bytes) for shard in index.shards)
    sums = set(in_processes(named_sum, tasks, workers))
    differing = [
        number for number, shard in enumerate(index.shards) if (shard.name, shard.sha256) not in sums
    ]
    if differing:
        names = ", ".join(index.shards[number].name for number in differing)
        samples = [sample for number in differing for sample in damaged_in(index, number)]
        raise ValueError(
            f"{folder}: {len(differing)} of {len(index.shards)} shards differ from their SHA-256: {names}."
            f"{listed_samples(index, samples)} Copy them again, or make the shards again."
        )
    return index


def named_sum(folder: Folder, name: str, size: int) -> tuple[str, str]:
    with as_file(folder, name, size) as path:
        return name, sha256_of(path)


@contextmanager
def as_file(folder: Folder, name: str, size: int) -> Iterator[Path]:
    """A shard as a local file, for a URL a temporary one."""
    if isinstance(folder, Path):
        yield folder / name
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder.fetch(name, size, Path(temporary, name))
        yield Path(temporary, name)


def damaged_in(index: ShardIndex, number: int) -> list[int]:
    """The samples of a shard that differ from their checksums."""
    shard = index.shards[number]
    with as_file(index.folder, shard.name, shard.bytes) as path, path.open("rb") as file:
        return damaged_samples(index, number, file.fileno())


def listed_samples(index: ShardIndex, samples: Sequence[int]) -> str:
    """Damaged samples as part of a message."""
    if index.checksum is None:
        return ""
    if not samples:
        return " No sample is damaged: only names, labels or gaps between them."
    listed = [f"{index.name_of(sample)} (byte {index.offset[sample]})" for sample in samples[:LISTED_SAMPLES]]
    return f" Damaged samples: {', '.join(listed)}{', ...' if len(samples) > LISTED_SAMPLES else ''}."


def index_again(
    folder: str | Path, class_names: ClassNames = None, workers: int = 0, label: str = LABEL_MEMBER
) -> ShardIndex:
    """Index the shards of a folder.

    Where they have an index, its class names, seed and latents stay, and it gets what it lacks.

    Raises ``ValueError`` for a shard that is as long as in that index and differs from it: it is damaged, and
    would be indexed as sound.
    """
    allowed = "a local folder, of which you can upload the index and the shards"
    require(not is_remote(folder), "folder", str(folder), allowed)
    folder = Path(folder)
    before = index_of(folder)
    if isinstance(class_names, Path):
        class_names = [line.strip() for line in text_lines(class_names) if line.strip()]
    if before is None:
        return index_shards(folder, class_names, workers=workers, label=label)
    names = class_names or before.class_names
    index = index_shards(folder, names, before.seed, before.latents, workers, save=False, label=label)
    now = {(shard.name, shard.bytes): shard.sha256 for shard in index.shards}
    known = ((shard.name, shard.bytes, shard.sha256) for shard in before.shards)
    differing = [name for name, size, digest in known if now.get((name, size), digest) != digest]
    if differing:
        raise ValueError(
            f"{folder}: {', '.join(differing)}: not what was indexed, and as long: damaged. Copy them again, "
            "or make the shards again. If you replaced them, remove index.json and start this command again."
        )
    if (index.shards, index.class_names) == (before.shards, before.class_names):
        # index.json stays as it is, to the byte, because runs know their data by it
        index.save_sidecar((folder / "index.json").read_bytes())
    else:
        index.save()
    return index


def index_of(folder: Path) -> Optional[ShardIndex]:
    """The index of a folder with or without its shards; None, with a warning, if it is damaged."""
    try:
        return read_index(folder, check_files=False)
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.warning("%s", error)
        return None
