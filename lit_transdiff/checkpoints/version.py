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


def read_versioned(file: Path) -> Any:
    """What a JSON file holds. Raises ``ValueError`` for a newer version, ``Damaged`` for what is not what was written."""
    content = read_json(file)
    for part in content if isinstance(content, list) else [content]:
        version = part.get(KEY, VERSION) if isinstance(part, dict) else VERSION
        if type(version) is not int or version < 1:
            raise Damaged(f"{file} is damaged: {KEY} is {version!r}, no number from 1.")
        if version > VERSION:
            raise ValueError(
                f"{file}: {KEY}: got {version}; allowed: up to {VERSION}, the newest that this lit-transdiff knows. "
                "Use the one that wrote it, or a newer one."
            )
    return content
