"""Files: their hashes, writing them whole or not at all, and the room there is for them."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_lines(lines: Iterable[str]) -> str:
    """The SHA-256 of lines of text, in hexadecimal."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def short_hash(path: Path) -> str:
    """The first 16 hexadecimal digits of a file's SHA-256."""
    return sha256_of(path)[:16]


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_space(folder: Path, needed: int) -> None:
    """Raise ``ValueError`` when fewer than ``needed`` bytes are free on the disk of ``folder``."""
    free = free_bytes(folder)
    if needed > free:
        raise ValueError(f"{folder}: {readable(needed)} are to be written, but only {readable(free)} are free on that disk.")


def readable(num_bytes: int) -> str:
    """Bytes for people: ``42.3 GB`` (powers of 1000)."""
    size = float(num_bytes)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"
