"""Files: hashes, atomic writes, checksums and disk space."""

from __future__ import annotations

import atexit
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
# the entry of a JSON file, or the column of metrics.csv, with the CRC-32 of the other entries
SEAL = "checksum"
CHECKSUMS = "checksums.json"  # the CRC-32 of the files beside it, in folders that have no export.json
HARDLY = 1 << 20  # bytes; a disk with less free space counts as full
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota exceeded, file too large


def user_cache(kind: str) -> Path:
    """The folder in which files of a ``kind`` are kept between the runs of a user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lit-transdiff", kind)


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


def crc32_of(path: Path) -> int:
    """The CRC-32 of a file: three times as fast as SHA-256, and sufficient to detect damage."""
    total = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            total = zlib.crc32(chunk, total)
    return total


class NoSpaceError(OSError, ValueError):
    """The disk has too little space for a file that is to be written."""

    def __str__(self) -> str:
        return str(self.strerror)


def partial_name(path: Path) -> Path:
    """The temporary name of ``path`` until it is complete. It is unique to this process."""
    return path.with_name(f"{path.name}.partial-{os.getpid()}")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Write a file or folder completely or not at all: the block writes to a temporary name.

    A file is flushed to disk before it is renamed, so that a power failure leaves no empty file. If the block
    raises, the partial output is removed and ``path`` is unchanged. A folder must not exist yet.
    """
    partial = partial_name(path)
    remove(partial)  # left by an earlier process with the same id
    try:
        with naming_full(path):
            yield partial
            if partial.is_file():
                to_disk(partial)
        os.replace(partial, path)
        to_disk(path.parent)
    finally:
        remove(partial)


def remove(path: Path) -> None:
    """Remove a file, a folder or a link (not its target), if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes) -> None:
    """Write ``content`` to a file completely or not at all."""
    with whole(path) as partial:
        partial.write_bytes(content)


def to_disk(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sealed(content: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON file with a checksum of its own content, which ``read_json`` verifies."""
    return (json.dumps(with_seal(content), indent=1) + "\n").encode()


def with_seal(content: Mapping[str, Any]) -> dict[str, Any]:
    return {**content, SEAL: seal_of(content)}


def seal_of(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content).encode()):08x}"


def unsealed(content: Any) -> Any:
    """The content without its checksum (or that of each list item). ``ValueError`` if it does not match."""
    if isinstance(content, list):
        return [unsealed(item) for item in content]
    if isinstance(content, dict) and content.pop(SEAL, None) not in (None, seal_of(content)):
        raise ValueError(f"its content does not fit its checksum. If you changed it, remove {SEAL!r} from it")
    return content


class Damaged(ValueError):
    """The content of a file is not what was written."""


def json_of(text: str | bytes) -> Any:
    """Parse JSON. Raises ``ValueError`` for invalid or too deeply nested text."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ``Damaged`` if it is not JSON or its checksum does not match."""
    try:
        content = json_of(path.read_text())
    except ValueError as error:
        raise Damaged(f"{path} is damaged: it holds no JSON ({error}).") from error
    try:
        return unsealed(content)
    except ValueError as error:
        raise Damaged(f"{path} is damaged: {error}.") from error


def crc32_of_files(folder: Path) -> dict[str, int]:
    """The CRC-32 of each file in a folder, by file name."""
    return {path.name: crc32_of(path) for path in sorted(folder.iterdir()) if path.is_file()}


def check_file(path: Path) -> None:
    """Raise ``ValueError`` if a file differs from its CRC-32 in ``export.json`` or ``CHECKSUMS``.

    Each file is read once per process. Files without a recorded checksum are not checked.
    """
    for record in (path.with_name("export.json"), path.with_name(CHECKSUMS)):
        content = read_json(record) if record.is_file() else None
        known = content.get("crc32", {}) if isinstance(content, dict) else {}
        if path.name in known and path.is_file():
            stat = path.stat()
            actual = crc32_once(path, stat.st_size, stat.st_mtime_ns)
            if actual != known[path.name]:
                raise ValueError(
                    f"{path} is damaged: its CRC-32 is {actual:08x}, in {record.name} it is "
                    f"{known[path.name]:08x}. Copy it again from where it came, or make it again. "
                    f"If you changed it, remove 'crc32' and {SEAL!r} from {record.name}."
                )
            return


@lru_cache(maxsize=256)
def crc32_once(path: Path, size: int, modified: int) -> int:
    """The CRC-32 of a file, cached for this size and modification time."""
    return crc32_of(path)


def check_zip(path: Path) -> None:
    """Raise ``ValueError`` if a member of a zip archive (``.npz``, ``.pth``) differs from its CRC-32.

    Each file is read once per process.
    """
    stat = path.stat()
    if (damage := damage_once(path, stat.st_size, stat.st_mtime_ns)) is not None:
        raise ValueError(f"{path} is damaged: {damage}")


@lru_cache(maxsize=256)
def damage_once(path: Path, size: int, modified: int) -> str | None:
    """The first damage in a zip archive or None, cached for this size and modification time."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        return str(error)
    return None if damaged is None else f"{damaged} in it differs from its checksum"


def is_full(error: BaseException) -> bool:
    """Whether an error means that the disk or the user's quota is full."""
    return errno_of(error) in NO_ROOM


def errno_of(error: BaseException) -> int | None:
    """The errno of an error or of its context; safetensors gives it only in the message."""
    in_text = re.search(r"\(os error (\d+)\)", str(error))
    number = int(in_text[1]) if in_text else getattr(error, "errno", None)
    return errno_of(error.__context__) if number is None and error.__context__ is not None else number


@contextmanager
def naming_full(path: Path) -> Iterator[None]:
    """Turn any error of a full disk in the block into an ``OSError`` that gives the path and the free space.

    torch does not report why a write failed, so a full disk is assumed when hardly any space is free.
    """
    try:
        yield
    except Exception as error:
        free = free_bytes(path.parent)
        silent = not isinstance(error, OSError | ValueError) and free < HARDLY
        if not (is_full(error) or silent):
            raise
        number = errno_of(error) or errno.ENOSPC
        raise OSError(number, f"{os.strerror(number)} ({format_bytes(free)} free)", str(path)) from error


@contextmanager
def unless_full(path: Path, go_on: bool) -> Iterator[None]:
    """Give up the file ``path`` with a warning if the disk is full in the block, but only with ``go_on``."""
    try:
        yield
    except Exception as error:
        if not (go_on and is_full(error)):
            raise
        log.warning("%s is left out: %s", path, error)
        if path.is_file():  # incomplete; a folder keeps its earlier content
            path.unlink()


def folder_of_this_process(prefix: str) -> Path:
    """Make a temporary folder that is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_space(folder: Path, needed: int) -> None:
    """Raise ``NoSpaceError``, also a ``ValueError``, if the disk of ``folder`` has too few bytes free."""
    free = free_bytes(folder)
    if needed > free:
        space = (
            f"{format_bytes(needed)} are to be written, but only {format_bytes(free)} are free on that disk."
        )
        raise NoSpaceError(errno.ENOSPC, f"{folder}: {space}")


def format_bytes(num_bytes: int) -> str:
    """Format a number of bytes as in ``42.3 GB`` (powers of 1000)."""
    size = float(num_bytes)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"
