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
    content = read_json(file)
    check_form(file, content, isinstance(content, dict))
    check_version(file, content)
    return content


def read_starts(file: Path) -> list[dict[str, Any]]:
    """What ``environment.json`` says of each start of a run. Raises as ``read_versioned``."""
    content = read_json(file)
    check_form(file, content, isinstance(content, list) and all(isinstance(start, dict) for start in content))
    for start in content:
        check_version(file, start)
    return content


def read_number(file: Path, name: str) -> float:
    """The number that a JSON file gives by a name. Raises as ``read_versioned``."""
    found = read_versioned(file).get(name)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise Damaged(f"{file} is damaged: {name} is {found!r}, no number.")
    return found


def check_form(file: Path, content: Any, fits: bool) -> None:
    if not fits:
        raise Damaged(f"{file}: content: got {str(content)[:80]}; allowed: what this program writes there.")


def check_version(file: Path, content: dict[str, Any]) -> None:
    version = content.get(KEY, VERSION)
    if type(version) is not int or version < 1:
        raise Damaged(f"{file} is damaged: {KEY} is {version!r}, no number from 1.")
    if version > VERSION:
        raise ValueError(
            f"{file}: {KEY}: got {version}; allowed: up to {VERSION}, the newest that this lit-transdiff knows. "
            "Use the one that wrote it, or a newer one."
        )
