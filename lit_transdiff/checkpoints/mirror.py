"""A copy of a run folder at a URL, made beside training and read where the folder is lost.

A checkpoint there counts once its marker is there, which is uploaded last and removed first; the same holds
for the ``export.json`` of an export. Checkpoints that the run folder no longer keeps are removed after newer
ones are complete. One process writes to a mirror.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lit_transdiff.base.files import Damaged, crc32_of, json_of, remove, unsealed
from lit_transdiff.base.remote import RemoteFolder
from lit_transdiff.checkpoints.export import INFO
from lit_transdiff.checkpoints.format import (
    DAMAGED,
    MARKER,
    PARTIAL,
    WRITTEN,
    Checkpoint,
    complete_checkpoints,
)
from lit_transdiff.config.targets import below, remove_written

MIRROR_POLL = 5.0  # seconds between looks at the run folder
MIRROR_RETRY = 60.0  # seconds after a failure
MIRROR_PATIENCE = 600.0  # seconds in which a run that ends still uploads without success
STAGED = ".mirror"  # links to the files of the checkpoint that is being uploaded
WRITER = "mirror.json"  # the last process that wrote to the mirror
LEFT_OUT = ("lock", "wandb", "checkpoints", STAGED, WRITER)
LIVE = ("config.yaml", "environment.json", "metrics.csv")  # grow or change without a new name
CHECKPOINT_FILE = re.compile(r"checkpoints/(step-\d+)/([^/]+)")
log = logging.getLogger(__name__)


class Mirror:
    """The mirror of a run folder. ``start`` begins to upload in the background, ``finish`` ends it."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.remote = folder, RemoteFolder(url)
        self.there: dict[str, int] = {}  # files of the mirror and their sizes
        self.sent: dict[str, tuple[int, int]] = {}  # size and time of the local files that are there
        self.problem = ""
        self.wake, self.ends = threading.Event(), False
        self.thread: threading.Thread | None = None

    def look(self) -> None:
        """List the mirror. Raises ``RemoteError`` if that is impossible."""
        self.there = self.remote.files()

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints there, oldest first."""
        found = (CHECKPOINT_FILE.fullmatch(name) for name in self.there)
        return sorted(int(match[1][5:]) for match in found if match is not None and match[2] == MARKER)

    def fetch(self) -> int | None:
        """Download the newest complete checkpoint and the other files of the run; its step, or None.

        A damaged checkpoint is put aside, with a warning, and the one before it is used.
        """
        for name in sorted(self.others(), key=marks_complete):
            self.remote.fetch(name, self.there[name], below(self.folder, name, str(self.remote)))
            self.note(name)
        while steps := self.steps():
            try:
                self.fetch_checkpoint(f"step-{steps[-1]:08d}")
                return steps[-1]
            except Damaged as error:
                log.warning("%s The checkpoint before it is used.", error)
                self.put_aside(f"step-{steps[-1]:08d}")
        return None

    def others(self) -> list[str]:
        """The files there outside of checkpoints; those of an export only with its ``export.json``."""
        names = [name for name in self.there if name.partition("/")[0] not in LEFT_OUT]
        exports = {name.rpartition("/")[0] for name in self.there if name.endswith(f"/{INFO}")}
        partly = {"export", "best"} - exports
        return [name for name in names if name.partition("/")[0] not in partly]

    def fetch_checkpoint(self, name: str) -> None:
        """Download a checkpoint; it appears in the run folder when all of its files are right.

        Raises ``Damaged`` for one that is not what was written.
        """
        source, folder = f"checkpoints/{name}", self.folder / "checkpoints" / name
        partial = folder.with_name(f"{name}{PARTIAL}")
        remove(partial)
        manifest = self.manifest(source)
        checksums = manifest.get("crc32", {})
        for file, size in manifest["files"].items():
            where, path = f"{self.remote}/{source}/{file}", below(partial, file, f"{source}/{MARKER}")
            if self.there.get(f"{source}/{file}") != size:
                raise Damaged(f"{where} is missing or has another size than when it was written.")
            self.remote.fetch(f"{source}/{file}", size, path)
            if crc32_of(path) != checksums.get(file, crc32_of(path)):
                raise Damaged(f"{where} is damaged: it is not what was written.")
        self.remote.fetch(f"{source}/{MARKER}", self.there[f"{source}/{MARKER}"], partial / MARKER)
        remove_written(folder, WRITTEN)  # an incomplete one
        os.replace(partial, folder)
        for file in (*manifest["files"], MARKER):
            self.note(f"{source}/{file}")

    def manifest(self, source: str) -> dict[str, Any]:
        """The content of a checkpoint's marker."""
        try:
            content = unsealed(json_of(self.remote.read(f"{source}/{MARKER}")))
        except ValueError as error:
            raise Damaged(f"{self.remote}/{source}/{MARKER} is damaged: {error}.") from error
        return dict(content)

    def put_aside(self, name: str) -> None:
        """Take a damaged checkpoint's marker away; its files stay."""
        marker = f"checkpoints/{name}/{MARKER}"
        self.remote.write(marker + DAMAGED, self.remote.read(marker))
        self.withdraw(marker)

    def note(self, name: str) -> None:
        """Remember that a local file is in the mirror as it is now."""
        stat = (self.folder / name).stat()
        self.sent[name] = (stat.st_size, stat.st_mtime_ns)

    def start(self) -> None:
        """Upload in a thread from now on. Raises ``RemoteError`` if the mirror cannot be written."""
        if self.thread is None:
            self.remote.write(WRITER, json.dumps({"host": platform.node(), "pid": os.getpid()}).encode())
            self.thread = threading.Thread(target=self.run, name="mirror", daemon=True)
            self.thread.start()

    def run(self) -> None:
        """The thread's function."""
        while True:
            ends = self.ends  # whatever is complete before this is uploaded
            wait = MIRROR_POLL if self.attempt() else MIRROR_RETRY
            if ends:
                return
            self.wake.wait(wait)
            self.wake.clear()

    def attempt(self) -> bool:
        """Upload what the mirror lacks; a failure is told and remembered."""
        try:
            self.upload()
            self.problem = ""
        except (OSError, ValueError) as error:
            if str(error) != self.problem:
                log.warning("checkpoint.mirror: %s; uploading is tried again", error)
            self.problem = str(error)
        return not self.problem

    def finish(self) -> str:
        """Upload the rest; why the mirror is incomplete, or "".

        Attempts end when nothing has been uploaded for ``MIRROR_PATIENCE`` seconds.
        """
        if self.thread is None:
            return ""
        self.ends = True
        self.wake.set()
        self.thread.join()
        deadline, sent = time.monotonic() + MIRROR_PATIENCE, dict(self.sent)
        while self.problem and time.monotonic() < deadline:
            time.sleep(min(MIRROR_RETRY, MIRROR_PATIENCE))
            self.attempt()
            if self.sent != sent:
                deadline, sent = time.monotonic() + MIRROR_PATIENCE, dict(self.sent)
        return self.problem

    def upload(self) -> None:
        """Upload files, then checkpoints, the newest first; at last remove what is no longer kept."""
        if not self.folder.is_dir():
            return
        self.upload_files()
        while (newest := self.missing_checkpoint()) is not None:
            self.upload_checkpoint(newest)
        kept = {checkpoint.step for checkpoint in self.local_checkpoints()}
        if kept and kept <= set(self.steps()):
            self.remove_checkpoints(kept)

    def local_checkpoints(self) -> list[Checkpoint]:
        return complete_checkpoints(self.folder / "checkpoints")

    def missing_checkpoint(self) -> Path | None:
        """The newest complete checkpoint that is not in the mirror."""
        lacking = [c.folder for c in self.local_checkpoints() if not self.has(c.folder)]
        return lacking[-1] if lacking else None

    def has(self, folder: Path) -> bool:
        """Whether the mirror has this very checkpoint, not only one of its step."""
        name = f"checkpoints/{folder.name}/{MARKER}"
        if name in self.there and name not in self.sent:
            with suppress(FileNotFoundError):
                if self.remote.read(name) == (folder / MARKER).read_bytes():
                    self.note(name)
        return name in self.there and not self.differs(name)

    def upload_checkpoint(self, folder: Path) -> None:
        """Upload a checkpoint, its marker last; links keep its files if training removes it."""
        staged = self.folder / STAGED / folder.name
        remove(staged)
        staged.mkdir(parents=True)
        try:
            for file in folder.iterdir():
                link_or_copy(file, staged / file.name)
            self.withdraw(f"checkpoints/{folder.name}/{MARKER}")
            for file in sorted(staged.iterdir(), key=lambda file: marks_complete(file.name)):
                stat, name = file.stat(), f"checkpoints/{folder.name}/{file.name}"
                if self.sent.get(name) != (stat.st_size, stat.st_mtime_ns):
                    self.send(file, name)
        except FileNotFoundError:
            if folder.exists():
                raise
            # it has just given way to a newer one
        finally:
            remove(staged)
            with suppress(OSError):
                staged.parent.rmdir()

    def remove_checkpoints(self, kept: set[int]) -> None:
        """Remove the checkpoints before the newest that are not ``kept``."""
        for name in sorted(self.there, key=marks_complete, reverse=True):
            match = CHECKPOINT_FILE.fullmatch(name)
            if match is not None and (step := int(match[1][5:])) < max(kept) and step not in kept:
                self.withdraw(name)

    def upload_files(self) -> None:
        """Upload new and changed files outside of checkpoints; of an export ``export.json`` comes last."""
        changed = [name for name in self.local_files() if self.differs(name)]
        for name in list(changed):
            info = f"{name.rpartition('/')[0]}/{INFO}"
            if not marks_complete(name) and info in self.there:
                self.withdraw(info)
        changed += [name for name in self.local_files() if marks_complete(name) and name not in self.there]
        for name in sorted(dict.fromkeys(changed), key=marks_complete):
            with suppress(FileNotFoundError):
                self.send(self.folder / name, name)

    def local_files(self) -> Iterator[str]:
        """The files of the run folder outside of checkpoints, except unfinished ones."""
        for top in sorted(self.folder.iterdir()):
            if top.name in LEFT_OUT:
                continue
            for path in [top] if top.is_file() else sorted(top.rglob("*")):
                if path.is_file() and ".partial" not in path.name:
                    yield path.relative_to(self.folder).as_posix()

    def differs(self, name: str) -> bool:
        """Whether a local file is not in the mirror as it is now. One of equal size from an earlier start
        counts as equal, except the files that change in place.
        """
        try:
            stat = (self.folder / name).stat()
        except FileNotFoundError:  # it has just been removed
            return False
        if name in self.sent:
            return self.sent[name] != (stat.st_size, stat.st_mtime_ns)
        return name in LIVE or marks_complete(name) or self.there.get(name) != stat.st_size

    def send(self, file: Path, name: str) -> None:
        """Upload a file."""
        stat = file.stat()
        self.remote.put(file, name)
        self.there[name] = stat.st_size
        self.sent[name] = (stat.st_size, stat.st_mtime_ns)

    def withdraw(self, name: str) -> None:
        """Remove a file from the mirror."""
        self.remote.remove(name)
        self.there.pop(name, None)
        self.sent.pop(name, None)


def marks_complete(name: str) -> bool:
    """Whether a file says that those beside it are complete; such files are sorted last."""
    return name.rpartition("/")[2] in (MARKER, INFO)


def link_or_copy(file: Path, target: Path) -> None:
    """Give a file a second name, which keeps its content when the first is removed."""
    try:
        os.link(file, target)
    except OSError:  # a disk without links; a missing file raises again
        shutil.copy2(file, target)
