"""Which form run folders, exports and checkpoints have on disk: each says it in a JSON file of its own.

That is ``environment.json`` (in each start), ``export.json`` and ``COMPLETE.json``. Files that say none were written before there
were versions; they are read as those of version 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_transdiff.base.files import Damaged, read_json

VERSION = 1  # one more whenever a program that knows the present form would misread what is written
KEY = "format_version"


def versioned(content: Mapping[str, Any]) -> dict[str, Any]:
    return {KEY: VERSION, **content}


def read_versioned(file: Path) -> dict[str, Any]:
    """What a JSON file says. Raises ``ValueError`` for a newer version, ``Damaged`` for what is not what was written."""
    return checked([read_json(file)], file)[0]


def read_number(file: Path, name: str) -> float:
    """The number that a JSON file gives by a name. Raises as ``read_versioned``."""
    found = read_versioned(file).get(name)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise Damaged(f"{file} is damaged: {name} is {found!r}, no number.")
    return found


def read_starts(file: Path) -> list[dict[str, Any]]:
    """What ``environment.json`` says of each start of a run. Raises as ``read_versioned``."""
    return checked(read_json(file), file)


def checked(parts: Any, file: Path) -> list[dict[str, Any]]:
    """The ``parts`` of a file, each of a version that is known."""
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise Damaged(f"{file} is damaged: its content is of another kind.")
    for part in parts:
        version = part.get(KEY, VERSION)
        if type(version) is not int or version < 1:
            raise Damaged(f"{file} is damaged: {KEY} is {version!r}, no number from 1.")
        if version > VERSION:
            raise ValueError(
                f"{file}: {KEY}: got {version}; allowed: up to {VERSION}, the newest that this lit-transdiff knows. "
                "Use the one that wrote it, or a newer one."
            )
    return parts
