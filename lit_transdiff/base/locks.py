"""One process at a time in a folder: a second one waits, or is refused."""

from __future__ import annotations

import logging
import os
import platform
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

LOCK = "lock"  # the file in a folder that is held
# seconds in which a process that is about to end, or to be started again elsewhere, frees the folder
LOCK_PATIENCE = 60.0
log = logging.getLogger(__name__)


class FolderLock:
    """A folder that one process holds, from ``take`` to the end of the block or to its own end."""

    def __init__(self, folder: Path, does: str = "trains this run") -> None:
        self.folder, self.file, self.does = folder, folder / LOCK, does
        self.lock = FileLock(self.file, thread_local=False, poll_interval=0.2, preserve_lock_file=True)

    def take(self) -> bool:
        """Hold the folder, and return whether another process had to be waited for.

        Raises ``ValueError`` with the name of its holder after ``LOCK_PATIENCE`` seconds.
        """
        if self.lock.is_locked:
            return False
        if ", pid " not in (self.holder or ", pid "):
            text = f"holds a file {LOCK!r} of another program, which is left alone: choose another folder."
            raise ValueError(f"{self.folder} {text}")
        waited = not self.taken(0)
        if waited:
            log.warning("%s: %s; waiting %.0f s for it to end", self.folder, self.conflict, LOCK_PATIENCE)
            if not self.taken(LOCK_PATIENCE):
                raise ValueError(f"{self.folder}: {self.conflict}.")
        self.file.write_text(f"{platform.node()}, pid {os.getpid()}\n")
        return waited

    @property
    def holder(self) -> str:
        """Host and process of the present or last holder; empty if the file names none."""
        return self.file.read_text(errors="replace").strip() if self.file.exists() else ""

    @property
    def conflict(self) -> str:
        return f"another process {self.does} ({self.holder or 'it does not say which'})"

    @property
    def is_free(self) -> bool:
        """Whether no process holds the folder, so far as the disk knows."""
        try:
            self.lock.acquire(0)
        except (Timeout, OSError):
            return False
        self.lock.release()
        return True

    def taken(self, patience: float) -> bool:
        """Try for so many seconds. Where the disk has no locks, say so and go on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(patience)
        except Timeout:
            return False
        except FileNotFoundError:  # its holder has removed the folder
            return self.taken(patience)
        except OSError as error:
            if error.filename is not None:  # the file cannot be opened
                raise
            unseen = f"a second process that {self.does} is not noticed"
            log.warning("%s: no locks there (%s): %s", self.folder, error, unseen)
        return True

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lock.release()
