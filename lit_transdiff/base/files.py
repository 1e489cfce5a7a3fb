"""Files: their hashes, writing them whole or not at all, and the room there is for them."""

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
SEAL = "checksum"  # the entry of a JSON file, or the column of metrics.csv, that holds the CRC-32 of the others
CHECKSUMS = "checksums.json"  # the CRC-32 of the files beside it, where there is no export.json that holds them
HARDLY = 1 << 20  # bytes free, on a disk that is as good as full
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the share of a user of it, the largest file of a process


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
    """The CRC-32 of a file: three times as fast as its SHA-256, and enough against damage."""
    total = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            total = zlib.crc32(chunk, total)
    return total


class NoSpaceError(OSError, ValueError):
    """A disk has too little room for what is to be written."""

    def __str__(self) -> str:
        return str(self.strerror)


def partial_name(path: Path) -> Path:
    """What ``path`` is called until it is whole: a name of this process's own, so that no two processes write the same."""
    return path.with_name(f"{path.name}.partial-{os.getpid()}")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Write a file or folder whole or not at all: to the name given here, which becomes ``path`` at the end of the block.

    A file is on disk before it has its name, so that a machine that loses its power leaves none that is empty. When the block
    fails, what was written is removed and ``path`` stays as it was. A folder must not exist yet.
    """
    partial = partial_name(path)
    remove(partial)  # left behind by an earlier process of the same number
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
    """Remove a file or a folder, if it is there; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file of a known content whole or not at all."""
    with whole(path) as partial:
        partial.write_bytes(content)


def to_disk(path: Path) -> None:
    """Return when a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sealed(content: Mapping[str, Any]) -> bytes:
    """A JSON file that holds a checksum of its own content, which ``read_json`` looks at."""
    return (json.dumps(with_seal(content), indent=1) + "\n").encode()


def with_seal(content: Mapping[str, Any]) -> dict[str, Any]:
    return {**content, SEAL: seal_of(content)}


def seal_of(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content).encode()):08x}"


def unsealed(content: Any) -> Any:
    """What was sealed, or the items of a list were. Raises ``ValueError`` when it is not that any more."""
    if isinstance(content, list):
        return [unsealed(item) for item in content]
    if isinstance(content, dict) and content.pop(SEAL, None) not in (None, seal_of(content)):
        raise ValueError(f"its content does not fit its checksum. If you changed it, remove {SEAL!r} from it")
    return content


class Damaged(ValueError):
    """A file is not what was written."""


def json_of(text: str | bytes) -> Any:
    """The value of a JSON text; raises ``ValueError`` when it is none, or nested beyond all bounds."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises ``Damaged`` naming the file when it is none, or not what was sealed."""
    try:
        content = json_of(path.read_text())
    except ValueError as error:
        raise Damaged(f"{path} is damaged: it holds no JSON ({error}).") from error
    try:
        return unsealed(content)
    except ValueError as error:
        raise Damaged(f"{path} is damaged: {error}.") from error


def crc32_of_files(folder: Path) -> dict[str, int]:
    """The CRC-32 of each file in a folder, by its name."""
    return {path.name: crc32_of(path) for path in sorted(folder.iterdir()) if path.is_file()}


def check_file(path: Path) -> None:
    """Raise ``ValueError`` when a file is not what was written, by the CRC-32 that ``export.json`` beside it holds, or else
    ``checksums.json``.

    A file is read once a process. Nothing is known of files of earlier versions and of others.
    """
    for record in (path.with_name("export.json"), path.with_name(CHECKSUMS)):
        content = read_json(record) if record.is_file() else None
        known = content.get("crc32", {}) if isinstance(content, dict) else {}
        if path.name in known and path.is_file():
            stat = path.stat()
            found = crc32_once(path, stat.st_size, stat.st_mtime_ns)
            if found != known[path.name]:
                raise ValueError(
                    f"{path} is damaged: its CRC-32 is {found:08x}, in {record.name} it is {known[path.name]:08x}. Copy it again "
                    f"from where it came, or make it again. If you changed it, remove 'crc32' and {SEAL!r} from {record.name}."
                )
            return


@lru_cache(maxsize=256)
def crc32_once(path: Path, size: int, modified: int) -> int:
    """The CRC-32 of a file that has this size and was last modified then."""
    return crc32_of(path)


def check_zip(path: Path) -> None:
    """Raise ``ValueError`` for a zip archive (``.npz``, ``.pth``) with a part that differs from the CRC-32 in the archive.

    A file is read once a process.
    """
    stat = path.stat()
    if (damage := damage_once(path, stat.st_size, stat.st_mtime_ns)) is not None:
        raise ValueError(f"{path} is damaged: {damage}")


@lru_cache(maxsize=256)
def damage_once(path: Path, size: int, modified: int) -> str | None:
    """What is wrong in a zip archive that has this size and was last modified then."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        return str(error)
    return None if damaged is None else f"{damaged} in it differs from its checksum"


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk is full, or what one may use of it."""
    return errno_of(error) in NO_ROOM


def errno_of(error: BaseException) -> int | None:
    """The operating system's number of an error, or of the one behind it; safetensors gives it in its text."""
    said = re.search(r"\(os error (\d+)\)", str(error))
    number = int(said[1]) if said else getattr(error, "errno", None)
    return errno_of(error.__context__) if number is None and error.__context__ is not None else number


@contextmanager
def naming_full(path: Path) -> Iterator[None]:
    """A full disk in the block, whatever error says so, is an ``OSError`` that names ``path`` and the room there is.

    torch does not say why it could not write: it is believed to be the room where there is hardly any.
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
    """With ``go_on``, a full disk in the block costs what it writes to ``path``, with a warning, and does not raise."""
    try:
        yield
    except Exception as error:
        if not (go_on and is_full(error)):
            raise
        log.warning("%s is left out: %s", path, error)
        if path.is_file():  # half of it; a folder keeps what it had
            path.unlink()


def folder_of_this_process(prefix: str) -> Path:
    """A new folder among the temporary ones, which goes when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_space(folder: Path, needed: int) -> None:
    """Raise ``NoSpaceError``, also a ``ValueError``, when fewer than ``needed`` bytes are free on the disk of ``folder``."""
    free = free_bytes(folder)
    if needed > free:
        text = f"{folder}: {format_bytes(needed)} are to be written, but only {format_bytes(free)} are free on that disk."
        raise NoSpaceError(errno.ENOSPC, text)


def format_bytes(num_bytes: int) -> str:
    """Bytes for people: ``42.3 GB`` (powers of 1000)."""
    size = float(num_bytes)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"
