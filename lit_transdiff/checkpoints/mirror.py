"""A copy of a run folder at a URL, made beside training and read where the folder is lost.

A checkpoint there counts once its marker is there, which is uploaded last and removed first; the same holds
for the ``export.json`` of an export. Checkpoints that the run folder no longer keeps are removed after newer
ones are complete. One process at a time writes to a mirror (``mirror_holder``).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lit_transdiff.base.files import Damaged, crc32_of, json_of, remove, unsealed
from lit_transdiff.checkpoints.export import INFO
from lit_transdiff.checkpoints.format import DAMAGED, MARKER, PARTIAL, WRITTEN
from lit_transdiff.checkpoints.mirror_files import (
    CHECKPOINT_FILE,
    LEFT_OUT,
    MirrorFiles,
    is_beside,
    marks_complete,
    size_and_time,
)
from lit_transdiff.config.targets import below, remove_written

MIRROR_POLL = 5.0  # seconds between looks at the run folder
MIRROR_RETRY = 60.0  # seconds after a failure
MIRROR_PATIENCE = 600.0  # seconds in which a run that ends still uploads without success
log = logging.getLogger(__name__)


class Mirror(MirrorFiles):
    """The mirror of a run folder. After ``hold.take``, ``start`` begins to upload in the background, and
    ``finish`` ends it.
    """

    def __init__(self, folder: Path, url: str) -> None:
        super().__init__(folder, url)
        self.problem = ""
        self.wake, self.ends = threading.Event(), False
        self.thread: threading.Thread | None = None

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

    def start(self) -> None:
        """Upload in a thread from now on."""
        if self.thread is None:
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
        """Upload the rest, and let others write; why the mirror is incomplete, or "".

        Attempts end when nothing has been uploaded for ``MIRROR_PATIENCE`` seconds.
        """
        if self.thread is not None:
            self.ends = True
            self.wake.set()
            self.thread.join()
        deadline, sent = time.monotonic() + MIRROR_PATIENCE, dict(self.sent)
        while self.problem and not self.hold.lost and time.monotonic() < deadline:
            time.sleep(min(MIRROR_RETRY, MIRROR_PATIENCE))
            self.attempt()
            if self.sent != sent:
                deadline, sent = time.monotonic() + MIRROR_PATIENCE, dict(self.sent)
        self.hold.release()
        return self.problem

    def upload(self) -> None:
        """Upload what is missing, the newest checkpoint first, and remove those that are no longer kept."""
        missing = self.folder.is_dir()
        while missing:
            newest = self.missing_checkpoint()
            self.upload_files()  # after that look: metrics.csv has the rows before the checkpoint
            if newest is not None:
                self.upload_checkpoint(newest)
            self.remove_checkpoints()
            missing = newest is not None

    def missing_checkpoint(self) -> Path | None:
        """The newest complete checkpoint that is not in the mirror."""
        lacking = [c.folder for c in self.local_checkpoints() if not self.has(c.folder)]
        return lacking[-1] if lacking else None

    def upload_checkpoint(self, folder: Path) -> None:
        """Upload a checkpoint, its marker last; links keep its files if training removes it."""
        try:
            with self.linked(folder.iterdir()) as files:
                (folder / MARKER).stat()  # all files were there to be linked
                self.withdraw(f"checkpoints/{folder.name}/{MARKER}")
                for file in sorted(files, key=lambda file: marks_complete(file.name)):
                    name = f"checkpoints/{folder.name}/{file.name}"
                    if self.sent.get(name) != size_and_time(file):
                        self.send(file, name)
        except FileNotFoundError:
            if folder.exists():
                raise
            # it has just given way to a newer one

    def remove_checkpoints(self) -> None:
        """Remove the checkpoints that the run folder no longer keeps, before the newest one that was sent."""
        kept = {checkpoint.step for checkpoint in self.local_checkpoints()}
        sent = [step for step in self.steps() if f"checkpoints/step-{step:08d}/{MARKER}" in self.sent]
        newest = sent[-1] if sent and kept else 0
        for name in sorted(self.there, key=marks_complete, reverse=True):
            match = CHECKPOINT_FILE.fullmatch(name)
            if match is not None and (step := int(match[1][5:])) < newest and step not in kept:
                self.withdraw(name)

    def upload_files(self) -> None:
        """Upload new and changed files outside of checkpoints; of an export ``export.json`` comes last."""
        markers = [name for name in self.local_files() if marks_complete(name)]
        for marker in markers:
            self.recognise(marker)
        for name in self.local_files():
            if not marks_complete(name) and self.differs(name):
                for marker in markers:
                    if is_beside(name, marker) and marker in self.there:
                        self.withdraw(marker)
                with suppress(FileNotFoundError):
                    self.send(self.folder / name, name)
        for marker in markers:
            if marker not in self.there or self.differs(marker):
                with suppress(FileNotFoundError):
                    self.upload_marker(marker)

    def upload_marker(self, marker: str) -> None:
        """Upload an ``export.json``, unless files beside it are just being replaced."""
        with self.linked([self.folder / marker]) as [file]:
            beside = [name for name in self.local_files() if name != marker and is_beside(name, marker)]
            if not any(self.differs(name) for name in beside):
                self.send(file, marker)
