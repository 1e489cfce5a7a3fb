"""Checkpoints on disk: one form for every strategy and number of ranks.

``checkpoints/step-00000500/`` holds ``rank-00000.safetensors`` ... (slices of parameters and of their optimizer states, named
``parameter::state::first element`` in the flattened parameter), ``training.pt`` (where training stands) and, written last,
``COMPLETE.json``, with the size and the CRC-32 of each file, and its own. A folder is made under another name and renamed when
it is whole, so one that was broken off is never found.
Because each slice says which elements of which parameter it holds, any strategy and any number of ranks reads it.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_transdiff.base.endings import CheckpointError
from lit_transdiff.base.files import Damaged, crc32_of, replace_file, require_space, sealed, to_disk, whole
from lit_transdiff.checkpoints.averages import EMA
from lit_transdiff.checkpoints.version import read_versioned, versioned
from lit_transdiff.config import CheckpointConfig
from lit_transdiff.config.targets import below, remove_written, save_tensors

MARKER = "COMPLETE.json"
TRAINING = "training.pt"
WEIGHT = "weight"  # the "state" that is the parameter itself, float32
PARTIAL = ".partial"
DAMAGED = ".damaged"
MAX_OPEN = 256  # files of a checkpoint at a time
CHECKSUM = ".crc32"  # of a rank's file, until the marker holds it
# All that this program writes into the folder of a checkpoint: what else lies in it is not removed.
WRITTEN = ("rank-*.safetensors*", f"rank-*{CHECKSUM}", "rank-*.failed", f"{TRAINING}*", f"{MARKER}*")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slice:
    """Where some elements of a parameter's state lie on disk."""

    start: int
    length: int
    file: Path
    key: str


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder and what its marker says."""

    folder: Path
    manifest: dict[str, Any]
    slices: dict[tuple[str, str], list[Slice]] = field(default_factory=dict)
    contents: dict[Path, Any] = field(default_factory=dict, compare=False, repr=False)  # of open files

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Parameter -> shape."""
        return dict(self.manifest["shapes"])

    def index(self) -> Checkpoint:
        """The same checkpoint with a list of its slices; reads the head of each file."""
        slices: dict[tuple[str, str], list[Slice]] = defaultdict(list)
        for file in sorted(self.folder.glob("rank-*.safetensors")):
            content = self.content(file)
            for key in content.keys():  # noqa: SIM118 (it is no dictionary)
                name, state, start = key.split("::")
                length = math.prod(content.get_slice(key).get_shape())
                slices[name, state].append(Slice(int(start), length, file, key))
        return Checkpoint(self.folder, self.manifest, dict(slices), self.contents)

    def content(self, file: Path) -> Any:
        """A rank's file, which stays open: to open it is to read its whole head."""
        if file not in self.contents:
            if len(self.contents) >= MAX_OPEN:
                self.contents.clear()
            self.contents[file] = safe_open(file, "pt")
        return self.contents[file]

    def states(self, name: str) -> list[str]:
        """The states that are kept of a parameter."""
        return [state for parameter, state in self.slices if parameter == name]

    def read(self, name: str, state: str, start: int = 0, length: int | None = None) -> Tensor:
        """Elements ``start`` .. ``start + length`` of a flattened state [length]; raises ``ValueError`` if some are missing."""
        length = math.prod(self.shapes[name]) - start if length is None else length
        pieces = [
            (piece, max(start, piece.start), min(start + length, piece.start + piece.length))
            for piece in self.slices.get((name, state), [])
        ]
        filled = sum(max(0, last - first) for _, first, last in pieces)
        if filled != length:
            raise ValueError(f"{self.folder}: {name}: {length - filled} of {length} elements of {state!r} are missing.")
        out = torch.empty(length)
        for piece, first, last in pieces:
            if first < last:
                part = self.content(piece.file).get_slice(piece.key)[first - piece.start : last - piece.start]
                out[first - start : last - start] = part
        return out

    def scalar(self, name: str, state: str) -> Tensor:
        """A state that is one number, as the step of AdamW."""
        piece = self.slices[name, state][0]
        return self.content(piece.file).get_tensor(piece.key).reshape(())

    def tensor(self, name: str, state: str) -> Tensor:
        """A whole state in the parameter's shape, float32."""
        return self.read(name, state).view(self.shapes[name])

    def weights(self, average: str | None) -> dict[str, Tensor]:
        """All parameters and buffers; those with an ``average`` of that name are replaced by it."""
        averaged = {name for name, state in self.slices if state == average}
        tensors = {name: self.tensor(name, str(average) if name in averaged else WEIGHT) for name in self.shapes}
        return tensors | self.training()["buffers"]

    def training(self) -> dict[str, Any]:
        """Where training stood: loops, schedules, callbacks, the run and what made it."""
        loaded = torch.load(self.folder / TRAINING, map_location="cpu", weights_only=True)
        assert isinstance(loaded, dict)
        return loaded

    def damaged_file(self, part: int = 0, parts: int = 1) -> str | None:
        """The first file whose content is not what was written, among every ``parts``-th one from ``part`` on.

        Checkpoints of earlier versions hold no checksums; of them nothing is said.
        """
        checksums = sorted(self.manifest.get("crc32", {}).items())
        return next((name for name, crc32 in checksums[part::parts] if crc32_of(self.folder / name) != crc32), None)

    @property
    def averages(self) -> list[str]:
        """The states that are averages of the weights; of a checkpoint with its slices."""
        return sorted({state for _, state in self.slices if state.startswith(EMA)})


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def complete_checkpoints(checkpoints: Path) -> list[Checkpoint]:
    """The whole checkpoints of a folder, oldest first. One whose files have other sizes than were written is left out."""
    found = []
    for marker in sorted(checkpoints.glob(f"step-*/{MARKER}")):
        folder = marker.parent
        if not folder.name[5:].isdigit():
            continue
        try:
            manifest = read_manifest(marker)
        except Damaged as error:
            warn_once(f"{error} The checkpoint is left out.")
            continue
        sizes = {name: (folder / name).stat().st_size for name in manifest["files"] if (folder / name).exists()}
        if sizes == manifest["files"]:
            found.append(Checkpoint(folder, manifest))
    return found


def read_manifest(marker: Path) -> dict[str, Any]:
    """What a marker says. Raises ``Damaged`` naming it when it is damaged, or is of another folder."""
    manifest = read_versioned(marker)
    if not isinstance(manifest, dict) or not {"step", "shapes", "files"} <= manifest.keys():
        raise Damaged(f"{marker} is damaged: it lacks what the marker of a checkpoint says.")
    if manifest["step"] != int(marker.parent.name[5:]):
        raise Damaged(f"{marker} is damaged, or its folder was renamed: it is of step {manifest['step']}.")
    try:
        for name in manifest["files"]:
            below(marker.parent, name, f"{marker}: files")
    except ValueError as error:
        raise Damaged(str(error)) from error
    return manifest


@cache
def warn_once(text: str) -> None:
    """Warn of what is found at every look."""
    log.warning(text)


def put_aside(checkpoint: Checkpoint) -> None:
    """Take a damaged checkpoint out of the list of complete ones, unless another process has done so."""
    aside = checkpoint.folder.with_name(checkpoint.folder.name + DAMAGED)
    if checkpoint.folder.exists():
        remove_written(aside, WRITTEN)
        os.replace(checkpoint.folder, aside)


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint with its slices; raises ``FileNotFoundError`` when ``path`` is none or is not complete."""
    for found in complete_checkpoints(path.parent):
        if found.folder == path:
            return found.index()
    raise FileNotFoundError(f"{path} is not a complete checkpoint. Complete ones: {complete_checkpoints(path.parent) or 'none'}.")


def slice_key(name: str, state: str, start: int) -> str:
    return f"{name}::{state}::{start}"


def write_rank_file(partial: Path, rank: int, tensors: Mapping[str, Tensor]) -> None:
    """Write a rank's slices, whole or not at all. Raises ``CheckpointError`` with the reason, and leaves no file then."""
    file = partial / f"rank-{rank:05d}.safetensors"
    try:
        require_space(partial, sum(t.numel() * t.element_size() for t in tensors.values()))
        with whole(file) as temporary:
            save_tensors(tensors, temporary)
            file.with_suffix(CHECKSUM).write_text(str(crc32_of(temporary)))
    except (OSError, SafetensorError) as error:
        replace_file(file.with_suffix(".failed"), b"")
        raise CheckpointError(getattr(error, "errno", None) or errno.EIO, f"{file}: {error}") from error


def save_pickled(content: Any, path: Path) -> None:
    """``torch.save`` to a file of Python's, which says why it could not write; torch's own does not."""
    with open(path, "wb") as file:
        torch.save(content, file)


def finish_checkpoint(
    partial: Path, world: int, training: Mapping[str, Any], manifest: Mapping[str, Any], timeout: float
) -> Checkpoint:
    """On the first rank: wait until all ranks have written, write the rest and the marker, and give the folder its name."""
    deadline = time.monotonic() + timeout
    while len(list(partial.glob("rank-*.safetensors"))) < world:
        failed = sorted(path.stem for path in partial.glob("rank-*.failed"))
        if failed or time.monotonic() > deadline:
            reason = f"{', '.join(failed)} failed" if failed else f"not all {world} ranks wrote within {timeout:.0f} s"
            raise CheckpointError(errno.EIO, f"{partial}: {reason}.")
        time.sleep(0.05)
    try:
        save_pickled(dict(training), partial / TRAINING)
        to_disk(partial / TRAINING)
        crc32 = {TRAINING: crc32_of(partial / TRAINING)}
        for file in sorted(partial.glob(f"*{CHECKSUM}")):
            crc32[file.with_suffix(".safetensors").name] = int(file.read_text())
            file.unlink()
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        whole_manifest = versioned(manifest) | {"files": sizes, "crc32": crc32}
        replace_file(partial / MARKER, sealed(whole_manifest))
        folder = partial.with_name(partial.name.removesuffix(PARTIAL))
        remove_written(folder, WRITTEN)  # one that is not complete
        os.replace(partial, folder)
        to_disk(folder.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise CheckpointError(getattr(error, "errno", None) or errno.EIO, f"{partial}: {error}") from error
    return Checkpoint(folder, whole_manifest)


def kept(found: Iterable[Checkpoint], policy: CheckpointConfig) -> set[Path]:
    """The folders of the checkpoints that the policy keeps."""
    found = sorted(found, key=lambda checkpoint: checkpoint.step)
    keep = {c.folder for c in found[-policy.keep_last :]} | {c.folder for c in found if c.manifest.get("milestone")}
    scored = [c for c in found if math.isfinite(c.manifest.get("metrics", {}).get(policy.keep_best, math.nan))]
    if scored:
        sign = 1 if policy.best_is == "lowest" else -1
        keep.add(min(scored, key=lambda c: sign * c.manifest["metrics"][policy.keep_best]).folder)
    return keep


def prune(checkpoints: Path, policy: CheckpointConfig) -> None:
    """Remove what the policy does not keep, and what was broken off."""
    found = complete_checkpoints(checkpoints)
    keep = kept(found, policy)
    for folder in [c.folder for c in found if c.folder not in keep]:
        hidden = folder.with_name(folder.name + ".removed")
        if not hidden.exists():  # else it holds what others put there
            folder = folder.rename(hidden)
        remove_written(folder, WRITTEN)
    for rest in checkpoints.glob("step-*.removed"):
        remove_written(rest, WRITTEN)
