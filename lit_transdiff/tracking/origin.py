"""Telling the original folder of a W&B run from its copies: two folders must never write to the same run.

A folder is identified by two properties that do not survive copying: the inode of one of its subfolders, and
the ctime of one of its files, which users cannot set. Renaming, moving within a disk and mounting the disk
elsewhere preserve at least one of the two (some network disks change inodes, ``chmod`` changes the ctime). A
move to another disk cannot be distinguished from a copy and counts as one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lit_transdiff.base.files import json_of, replace_file

RECORD = "origin.json"  # in the subfolder whose inode is recorded
COPIED_FROM = "copied_from"  # entry of the record, and of the configuration in W&B


def folder_signature(file: Path) -> dict[str, Any]:
    """The properties of the folder of ``file`` that do not survive copying."""
    status = file.stat()
    changed = status.st_ctime_ns if status.st_nlink == 1 else None  # hard links (cp -l) share the ctime
    return {"inode": file.parent.stat().st_ino, "disk": os.statvfs(file.parent).f_fsid, "changed": changed}


def same_folder(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two signatures belong to the same folder."""
    same_place = all(one.get(key) == other.get(key) for key in ("inode", "disk"))
    return same_place or (one.get("changed") is not None and one.get("changed") == other.get("changed"))


def read_record(file: Path) -> dict[str, Any]:
    """The record beside ``file``; empty if it is missing or damaged."""
    try:
        found = json_of((file.parent / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def keep_record(file: Path, copied_from: Any) -> None:
    """Record beside ``file`` the signature of this folder and the run that it is a copy of."""
    about = {**folder_signature(file), "folder": str(file.parent.resolve()), COPIED_FROM: copied_from}
    if about != read_record(file):
        replace_file(file.parent / RECORD, json.dumps(about, indent=1).encode())


def is_copy(file: Path) -> bool:
    """Whether the folder of ``file`` is a copy of the recorded one; a folder without a record is not."""
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
    """Whether an older run folder beside that of ``file`` has the same id and so counts as the original."""
    here = file.stat()
    for other in file.parents[2].glob(f"*/{file.parent.name}/{file.name}"):
        there = other.stat()
        if (
            there.st_ctime_ns < here.st_ctime_ns
            and there.st_ino != here.st_ino
            and other.read_bytes() == file.read_bytes()
        ):
            return True
    return False
