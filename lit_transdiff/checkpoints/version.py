"""The format version of run folders, exports and checkpoints, stored in a JSON file of each.

These are ``environment.json`` (in each start), ``export.json`` and ``COMPLETE.json``. Files without a version
are older and are read as version 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_transdiff.base.files import Damaged, read_json

VERSION = 1  # increase when the present program would misread the new format
KEY = "format_version"


def versioned(content: Mapping[str, Any]) -> dict[str, Any]:
    return {KEY: VERSION, **content}


def read_versioned(file: Path) -> dict[str, Any]:
    """Read a JSON file. Raises ``ValueError`` for a newer version, ``Damaged`` for other content."""
    content = read_json(file)
    check_form(file, content, isinstance(content, dict))
    check_version(file, content)
    return content


def read_starts(file: Path) -> list[dict[str, Any]]:
    """Read the entries of ``environment.json``, one per start. Raises as ``read_versioned``."""
    content = read_json(file)
    check_form(file, content, isinstance(content, list) and all(isinstance(start, dict) for start in content))
    for start in content:
        check_version(file, start)
    return content


def read_number(file: Path, name: str) -> float:
    """Read a number by name from a JSON file. Raises as ``read_versioned``."""
    number = read_versioned(file).get(name)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise Damaged(f"{file} is damaged: {name} is {number!r}, no number.")
    return number


def check_form(file: Path, content: Any, fits: bool) -> None:
    if not fits:
        raise Damaged(f"{file}: content: got {str(content)[:80]}; allowed: what this program writes there.")


def check_version(file: Path, content: dict[str, Any]) -> None:
    version = content.get(KEY, VERSION)
    if type(version) is not int or version < 1:
        raise Damaged(f"{file} is damaged: {KEY} is {version!r}, no number from 1.")
    if version > VERSION:
        allowed = f"up to {VERSION}, the newest that this lit-transdiff knows"
        way = "Use the one that wrote it, or a newer one."
        raise ValueError(f"{file}: {KEY}: got {version}; allowed: {allowed}. {way}")
