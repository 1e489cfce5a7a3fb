"""The one process that may write to a mirror, although buckets have no locks.

Its file there names it, and is written again every ``HOLDER_REFRESH`` seconds. Another process takes the
mirror if there is no such file, if the process that it names has ended on this machine, or after it has not
been written for ``HOLDER_STALE`` seconds. The file is compared before and read after it is written: a process
that finds another's file, or none, uploads no more.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

from lit_transdiff.base.files import json_of
from lit_transdiff.base.remote import RemoteFolder
from lit_transdiff.base.remote_errors import RemoteError

HOLDER = "mirror.json"
HOLDER_REFRESH = 30.0
HOLDER_STALE = 300.0
HOLDER_PATIENCE = 60.0  # seconds in which a process that is about to end frees the mirror
HOLDER_POLL = 1.0
log = logging.getLogger(__name__)


class MirrorTaken(ValueError):
    """Another process writes to the mirror."""


def machine() -> str:
    """The scope within which process numbers are unique: this start of the machine, and its container."""
    parts = [platform.node()]
    for read in (Path("/proc/sys/kernel/random/boot_id").read_text, lambda: os.readlink("/proc/self/ns/pid")):
        with suppress(OSError):
            parts.append(read().strip())
    return " ".join(parts)


def start_of(pid: int) -> int | None:
    """The start of a process of this machine in Linux's ticks (0 elsewhere); None if it has ended."""
    import psutil

    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0 if not Path("/proc/self").exists() and psutil.pid_exists(pid) else None
    return None if state in "ZX" else int(numbers[18])


@dataclass(frozen=True)
class MirrorHolder:
    """A process that writes to a mirror, and when it last said so."""

    run: str  # its folder
    host: str = field(default_factory=platform.node)
    pid: int = field(default_factory=os.getpid)
    machine: str = field(default_factory=machine)
    started: int | None = field(default_factory=lambda: start_of(os.getpid()))
    number: str = field(default_factory=lambda: secrets.token_hex(8))  # this start of the mirror
    time: float = field(default_factory=time.time)  # in seconds since 1970

    def __str__(self) -> str:
        last = datetime.fromtimestamp(self.time, timezone.utc).isoformat(" ", "seconds")
        return f"{self.host}, pid {self.pid}, run {self.run}, last seen {last}"

    @property
    def is_near(self) -> bool:
        """Whether this machine knows if the process exists."""
        return self.machine == machine()

    @property
    def has_ended(self) -> bool:
        """Whether the process is known to have ended, or is this one."""
        return self.is_near and (self.pid == os.getpid() or self.started != start_of(self.pid))


def holder_of(content: bytes) -> MirrorHolder | None:
    """The holder that a file names; None for a file of an earlier version."""
    try:
        return MirrorHolder(**json_of(content))
    except (ValueError, TypeError):
        return None


class Hold:
    """The right of this process to write to a mirror, from ``take`` to ``release``."""

    def __init__(self, remote: RemoteFolder, folder: Path) -> None:
        self.remote = remote
        self.own = MirrorHolder(run=str(folder.resolve()))
        self.tag: str | None = None
        self.lost = ""  # why it is no longer ours
        self.confirmed = 0.0  # the time.monotonic() at which it was ours
        self.released = threading.Event()
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None

    def take(self, patience: float | None = None) -> None:
        """Wait until nobody holds the mirror, and hold it.

        ``MirrorTaken`` names a process that is alive after ``patience`` (``HOLDER_PATIENCE``) seconds. One
        without a sign of life is waited for until its file is ``HOLDER_STALE`` seconds old. Raises
        ``RemoteError`` and ``FileNotFoundError`` if the mirror cannot be written.
        """
        if self.thread is not None:
            return
        self.wait_for_others(HOLDER_PATIENCE if patience is None else patience)
        self.write()
        if self.lost:
            there = self.there()
            raise MirrorTaken(self.lost if there is None else self.refusal(there))
        self.thread = threading.Thread(target=self.refresh, name="mirror holder", daemon=True)
        self.thread.start()

    def wait_for_others(self, patience: float) -> None:
        start, first = time.monotonic(), self.there()
        there, told = first, False
        while there is not None and not there.has_ended:
            waited = time.monotonic() - start
            alive = there.is_near or there != first
            if alive and waited >= patience:
                raise MirrorTaken(self.refusal(there))
            if not alive and max(waited, time.time() - there.time) >= HOLDER_STALE:
                log.warning("%s: %s gives no sign of life; this process goes on", self.remote, there)
                return
            if not told:
                log.warning("%s: another process writes to it (%s); waiting for it", self.remote, there)
                told = True
            time.sleep(HOLDER_POLL)
            there = self.there()

    def refusal(self, there: MirrorHolder) -> str:
        return (
            f"checkpoint.mirror: another process writes to {self.remote} ({there}). Only one may train a run "
            f"at a time. If it has ended, start again in {HOLDER_STALE / 60:.0f} minutes; to take its place "
            f"now, remove {self.remote}/{HOLDER}."
        )

    def there(self) -> MirrorHolder | None:
        """The holder now; None if there is none. Its file's tag is kept for ``write``."""
        try:
            self.tag = self.remote.tag(HOLDER)
            return holder_of(self.remote.read(HOLDER))
        except FileNotFoundError:
            self.tag = None
            return None

    def write(self) -> None:
        """Write the file in place of the one that was read last, and see whether it is there."""
        self.own = replace(self.own, time=time.time())
        self.remote.replace(HOLDER, json.dumps(asdict(self.own)).encode(), self.tag)
        self.confirm(self.there())

    def confirm(self, there: MirrorHolder | None) -> None:
        """Note whether the mirror is still ours."""
        if there is not None and there.number == self.own.number:
            self.confirmed = time.monotonic()
        elif not self.lost:
            now = f"is now that of {there}" if there is not None else "has been removed"
            self.lost = f"{self.remote}/{HOLDER} {now}: this process uploads no more"
            log.warning("checkpoint.mirror: %s", self.lost)

    def keep(self) -> None:
        """Write the file again, unless it is another's by now."""
        with self.lock:
            if not self.released.is_set() and not self.lost:
                self.confirm(self.there())
            if not self.released.is_set() and not self.lost:
                self.write()

    def refresh(self) -> None:
        """The thread's function."""
        while not self.released.wait(HOLDER_REFRESH) and not self.lost:
            with suppress(OSError):  # uploads fail as well, and say so
                self.keep()

    def check(self) -> None:
        """Raise ``RemoteError`` if the mirror is no longer ours; before each change of it."""
        if self.thread is None:
            return
        if not self.lost and time.monotonic() > self.confirmed + HOLDER_STALE / 2:
            self.keep()  # it was out of reach, or this machine has slept
        if self.lost:
            raise RemoteError(self.lost)

    def release(self) -> None:
        """Let others write to the mirror."""
        if self.thread is None:
            return
        self.released.set()
        with self.lock, suppress(OSError):  # otherwise others wait until the file is old
            there = self.there()
            if there is not None and there.number == self.own.number:
                self.remote.remove(HOLDER)
        self.thread = None
