"""Whether a folder is the one in which its W&B run was begun, or a copy of that: no two folders may write to one run.

A folder is known by what no copy of its files takes along: the number of one of its folders on its disk (inode), and the time at
which one of its files was last changed as the disk has it (ctime, which nobody can set). Renaming and moving on a disk, and
mounting the disk elsewhere, leave one of them as it was: some network disks number anew, ``chmod`` changes the time. A move to
another disk is a copy of which the original is removed, and cannot be told from one: it counts as a copy.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lit_transdiff.base.files import json_of, replace_file

RECORD = "origin.json"  # in the numbered folder
COPIED_FROM = "copied_from"  # entry of the record, and of the configuration in W&B


def folder_signature(file: Path) -> dict[str, Any]:
    """What no copy of the folder of ``file`` takes along."""
    status = file.stat()
    changed = status.st_ctime_ns if status.st_nlink == 1 else None  # a file may have two names (cp -l)
    return {"inode": file.parent.stat().st_ino, "disk": os.statvfs(file.parent).f_fsid, "changed": changed}


def same_folder(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two signatures are of the same folder."""
    same_place = all(one.get(key) == other.get(key) for key in ("inode", "disk"))
    return same_place or (one.get("changed") is not None and one.get("changed") == other.get("changed"))


def read_record(file: Path) -> dict[str, Any]:
    """The record beside ``file``; empty where there is none, or a damaged one."""
    try:
        found = json_of((file.parent / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def keep_record(file: Path, copied_from: Any) -> None:
    """Note beside ``file`` which folder this is, and what it is a copy of."""
    about = {**folder_signature(file), "folder": str(file.parent.resolve()), COPIED_FROM: copied_from}
    if about != read_record(file):
        replace_file(file.parent / RECORD, json.dumps(about, indent=1).encode())


def is_copy(file: Path) -> bool:
    """Whether the folder of ``file`` is a copy of the one that its record is of; a folder without a record is none."""
    record, now = read_record(file), folder_signature(file)
    if not record:
        return False
    if not same_folder(record, now):
        return True
    there = Path(str(record.get("folder"))) / file.name
    if not there.is_file() or there.samefile(file) or there.read_bytes() != file.read_bytes():
        return False
    return same_folder(record, folder_signature(there))  # a snapshot of the disk: both look like the original


def has_older_sibling(file: Path) -> bool:
    """Whether a run folder beside that of ``file`` holds the same, and longer: without records, the older is the original."""
    here = file.stat()
    for other in file.parents[2].glob(f"*/{file.parent.name}/{file.name}"):
        there = other.stat()
        if there.st_ctime_ns < here.st_ctime_ns and there.st_ino != here.st_ino and other.read_bytes() == file.read_bytes():
            return True
    return False
