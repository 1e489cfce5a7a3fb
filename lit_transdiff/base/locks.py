"""One process at a time in a folder: what two would do to the same files at once, the second waits for, or is refused."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
import time
from pathlib import Path
from types import TracebackType
from typing import IO

LOCK = "lock"  # the file in a folder that is held
LOCK_PATIENCE = 60.0  # seconds in which a process that is about to end, or to be started again elsewhere, frees the folder
log = logging.getLogger(__name__)


class FolderLock:
    """Held by the one process that ``does`` something in a folder, from ``take`` to the end of the block, or to its own end."""

    def __init__(self, folder: Path, does: str = "trains this run") -> None:
        self.folder, self.does = folder, does
        self.file: IO[str] | None = None

    def take(self) -> bool:
        """Whether another process had to be waited for. ``ValueError`` names its holder after ``LOCK_PATIENCE`` seconds."""
        if self.file is not None:
            return False
        deadline, waited = time.monotonic() + LOCK_PATIENCE, False
        while not self.taken():
            if time.monotonic() >= deadline:
                holder = self.holder()
                self.free()
                raise ValueError(f"{self.folder}: {holder}.")
            if not waited:
                log.warning("%s: %s; waiting %.0f s for it to end", self.folder, self.holder(), LOCK_PATIENCE)
            waited = True
            time.sleep(0.2)
        assert self.file is not None
        self.file.seek(0)
        if ", pid " not in (self.file.read() or ", pid "):
            self.free()
            raise ValueError(
                f"{self.folder} holds a file {LOCK!r} of another program, which is left alone: choose another folder."
            )
        self.file.truncate(0)
        self.file.write(f"{platform.node()}, pid {os.getpid()}\n")
        self.file.flush()
        return waited

    def holder(self) -> str:
        assert self.file is not None
        self.file.seek(0)
        return f"another process {self.does} ({self.file.read().strip() or 'it does not say which'})"

    def taken(self) -> bool:
        """Try once, with the file that is there now: its holder may remove it. Where the disk has no locks, say so and go on."""
        if not self.is_there():
            self.free()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = open(self.folder / LOCK, "a+")  # noqa: SIM115 - held until the block ends
        assert self.file is not None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            log.warning("%s: no locks there (%s): a second process that %s is not noticed", self.folder, error, self.does)
            return True
        return self.is_there()

    def is_there(self) -> bool:
        """Whether the file that is open is the one in the folder."""
        try:
            return self.file is not None and os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.folder / LOCK))
        except FileNotFoundError:
            return False

    def free(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.free()
