"""The files of a run folder and of its mirror: which are there, and which of them are those here."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lit_transdiff.base.files import remove
from lit_transdiff.base.remote import RemoteFolder
from lit_transdiff.checkpoints.export import INFO
from lit_transdiff.checkpoints.format import MARKER, Checkpoint, complete_checkpoints
from lit_transdiff.checkpoints.mirror_holder import HOLDER, Hold

STAGED = ".mirror"  # links to the files that are being uploaded
LEFT_OUT = ("lock", "wandb", "checkpoints", STAGED, HOLDER)
LIVE = ("config.yaml", "environment.json", "metrics.csv")  # grow or change without a new name
CHECKPOINT_FILE = re.compile(r"checkpoints/(step-\d+)/([^/]+)")


class MirrorFiles:
    """The files of a mirror (``there``), and the local files that are known to be in it (``sent``)."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.remote = folder, RemoteFolder(url)
        self.hold = Hold(self.remote, folder)
        self.there: dict[str, int] = {}  # files of the mirror and their sizes
        self.sent: dict[str, tuple[int, int]] = {}  # size and time of the local files that are there

    def look(self) -> None:
        """List the mirror. Raises ``RemoteError`` if that is impossible."""
        self.there = self.remote.files()

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints there, oldest first."""
        found = (CHECKPOINT_FILE.fullmatch(name) for name in self.there)
        return sorted(int(match[1][5:]) for match in found if match is not None and match[2] == MARKER)

    def local_checkpoints(self) -> list[Checkpoint]:
        return complete_checkpoints(self.folder / "checkpoints")

    def local_files(self) -> Iterator[str]:
        """The files of the run folder outside of checkpoints, except unfinished ones."""
        for top in sorted(self.folder.iterdir()):
            if top.name in LEFT_OUT:
                continue
            for path in [top] if top.is_file() else sorted(top.rglob("*")):
                if path.is_file() and ".partial" not in path.name:
                    yield path.relative_to(self.folder).as_posix()

    def has(self, folder: Path) -> bool:
        """Whether the mirror has this very checkpoint, not only one of its step."""
        name = f"checkpoints/{folder.name}/{MARKER}"
        self.recognise(name)
        return name in self.there and not self.differs(name)

    def recognise(self, marker: str) -> None:
        """Note the files that an earlier start has uploaded, if the marker beside them is the one here."""
        if marker not in self.there or marker in self.sent:
            return
        beside = [name for name in self.there if is_beside(name, marker) and (self.folder / name).exists()]
        with suppress(FileNotFoundError):
            stats = {name: self.stat(name) for name in beside}
            if self.remote.read(marker) == (self.folder / marker).read_bytes():
                self.sent |= {name: stat for name, stat in stats.items() if stat[0] == self.there[name]}

    def differs(self, name: str) -> bool:
        """Whether a local file is not in the mirror as it is now. One of equal size from an earlier start
        counts as equal, except the files that change in place and those of an export or a checkpoint.
        """
        try:
            stat = self.stat(name)
        except FileNotFoundError:  # it has just been removed
            return False
        if name in self.sent:
            return self.sent[name] != stat
        marked = any((self.folder / name).with_name(marker).exists() for marker in (MARKER, INFO))
        return name in LIVE or marked or self.there.get(name) != stat[0]

    def note(self, name: str) -> None:
        """Remember that a local file is in the mirror as it is now."""
        self.sent[name] = self.stat(name)

    def stat(self, name: str) -> tuple[int, int]:
        """The size and time of a local file."""
        return size_and_time(self.folder / name)

    def send(self, file: Path, name: str) -> None:
        """Upload a file."""
        self.hold.check()
        stat = size_and_time(file)
        self.remote.put(file, name)
        self.there[name], self.sent[name] = stat[0], stat

    def withdraw(self, name: str) -> None:
        """Remove a file from the mirror."""
        self.hold.check()
        self.remote.remove(name)
        self.there.pop(name, None)
        self.sent.pop(name, None)

    @contextmanager
    def linked(self, files: Iterable[Path]) -> Iterator[list[Path]]:
        """Second names of files, which keep their content when the first are removed or replaced."""
        place = self.folder / STAGED
        remove(place)  # the remains of a process that was killed
        place.mkdir()
        try:
            yield [link_or_copy(file, place / file.name) for file in files]
        finally:
            remove(place)


def marks_complete(name: str) -> bool:
    """Whether a file says that those beside it are complete; such files are sorted last."""
    return name.rpartition("/")[2] in (MARKER, INFO)


def is_beside(name: str, marker: str) -> bool:
    """Whether a file is one of those of a marker, or the marker itself."""
    return name.rpartition("/")[0] == marker.rpartition("/")[0]


def size_and_time(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def link_or_copy(file: Path, target: Path) -> Path:
    """Give a file a second name, which keeps its content when the first is removed."""
    try:
        os.link(file, target)
    except OSError:  # a disk without links; a missing file raises again
        shutil.copy2(file, target)
    return target
