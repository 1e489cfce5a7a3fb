"""Resumable packing and caching: a plan written before the first shard, and a record of each shard.

The plan (``packing.json``, ``caching.json``) contains everything that affects the bytes of the shards and
stays beside them; the records, in the folder ``finished``, contain the shards' rows of the index and are
removed at the end.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from lit_transdiff.base.arrays import read_arrays
from lit_transdiff.base.files import json_of, read_json, replace_file
from lit_transdiff.base.locks import LOCK, FolderLock
from lit_transdiff.config.targets import contents, remove_written
from lit_transdiff.data.findings import Findings
from lit_transdiff.data.index import Shard, ShardRows

RECORDS = "finished"
NEWER = ("exif", "background")  # settings introduced later: earlier versions took images as stored
NO_FINDINGS = Findings()
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard and the findings about its images."""

    rows: ShardRows
    findings: Findings


class ShardJournal:
    """The plan and the records of the shards in ``folder``."""

    def __init__(self, folder: Path, plan_file: str) -> None:
        self.folder, self.plan_file = folder, plan_file

    def check(self, plan: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` unless the folder is new or has this plan; the error lists the differences."""
        path = self.folder / self.plan_file
        if not path.exists():
            ignored = (".", f"{self.plan_file}.")
            present = [name for name in contents(self.folder) if not name.startswith(ignored)]
            if present == [RECORDS] and set(contents(self.folder / RECORDS)) <= {LOCK}:  # just created
                present = []
            if present and not path.exists():  # another process may have written it since
                raise ValueError(
                    f"{self.folder} already holds {present[0]} ({len(present)} files and folders) but no "
                    f"{self.plan_file}, which says how shards in it were made; choose an empty folder."
                )
            if not path.exists():
                return
        before, now = read_json(path), json.loads(json.dumps(plan))
        different = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
        unknown = [name for name in different if name in NEWER and name not in before]
        if different == unknown != [] and (self.folder / "index.json").exists():
            text = "%s was made by an earlier version, without %s; it is left as it is"
            log.warning(text, self.folder, " and ".join(unknown))
            return
        if different:
            told = (f"{name} was {brief(before.get(name))}, now {brief(now.get(name))}" for name in different)
            raise ValueError(
                f"{self.folder} was made with other settings ({'; '.join(told)}); choose an empty "
                f"folder, or go on with the settings in {self.plan_file}."
            )

    @contextmanager
    def alone(self, plan: Mapping[str, Any], writes: bool = True) -> Iterator[bool]:
        """Lock the folder in the block; yields whether work is left that no other process has done.

        Of several ranks one ``writes`` the plan and holds the lock for the others; it lies beside the
        records.
        """
        with FolderLock(self.folder / RECORDS, f"writes to {self.folder}") as lock:
            waited = writes and lock.take()
            left = not (self.folder / "index.json").exists()
            if writes and not left:
                self.close()
            if waited:
                self.check(plan)
            yield left

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Write the plan, if missing, and remove unfinished files of a killed process."""
        (self.folder / RECORDS).mkdir(parents=True, exist_ok=True)
        for partial in [*self.folder.glob("*.tar.partial-[0-9]*"), *self.folder.glob("*.npz.partial-[0-9]*")]:
            partial.unlink()
        if not (self.folder / self.plan_file).exists():
            replace_file(self.folder / self.plan_file, (json.dumps(plan, indent=1) + "\n").encode())

    def add(self, rows: ShardRows, findings: Findings = NO_FINDINGS) -> None:
        """Record a finished shard; to be called after it has its final name."""
        buffer = io.BytesIO()
        about = json.dumps({"shard": asdict(rows.shard), **asdict(findings)})
        columns: dict[str, Any] = {**rows.columns, "about": np.array(about)}
        np.savez(buffer, **columns)
        replace_file(self.record_path(rows.shard.name), buffer.getvalue())

    def finished(self, name: str) -> Optional[ShardRecord]:
        """The record of an intact finished shard, or None; a shard without samples has no file.

        A shard whose record cannot be read is made again, with the same bytes.
        """
        record = self.record_path(name)
        if not record.exists():
            return None
        try:
            columns = read_arrays(record)
            about = json_of(str(columns.pop("about")))
            shard = Shard(**about["shard"])
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s is damaged (%s): the shard is made again", record, error)
            record.unlink()
            return None
        path = self.folder / name
        if shard.samples and not (path.exists() and path.stat().st_size == shard.bytes):
            return None
        return ShardRecord(ShardRows(shard, columns), Findings.of(about))

    def all_finished(self, names: Sequence[str]) -> list[ShardRecord]:
        """The records of these shards; raises ``ValueError`` for missing ones."""
        records = {name: record for name in names if (record := self.finished(name)) is not None}
        missing = [name for name in names if name not in records]
        if missing:
            some = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
            raise ValueError(f"{self.folder}: {len(missing)} of {len(names)} shards are missing: {some}.")
        return list(records.values())

    def close(self) -> None:
        """Remove the records, after the index was written."""
        remove_written(self.folder / RECORDS, ["*.npz", "*.npz.partial-*", LOCK])

    def record_path(self, name: str) -> Path:
        return self.folder / RECORDS / f"{name}.npz"


def brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
