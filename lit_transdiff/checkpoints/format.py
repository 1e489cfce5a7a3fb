"""Checkpoints on disk, in one format for every strategy and number of ranks.

``checkpoints/step-00000500/`` contains ``rank-00000.safetensors`` ... (slices of parameters and their
optimizer states, named ``parameter::state::first element`` in the flattened parameter), ``training.pt`` (the
state of training) and, written last, ``COMPLETE.json`` with the size and CRC-32 of each file, and its own. A
folder is written under another name and renamed when complete, so an unfinished one is never used. Because
each slice names its elements of its parameter, any strategy and any number of ranks can read it.
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
WEIGHT = "weight"  # the "state" of the parameter itself, float32
PARTIAL = ".partial"
DAMAGED = ".damaged"
MAX_OPEN = 256  # number of files of a checkpoint open at a time
CHECKSUM = ".crc32"  # suffix for a rank file's checksum until the marker contains it
# All files of this program in a checkpoint folder; other files are not removed.
WRITTEN = ("rank-*.safetensors*", f"rank-*{CHECKSUM}", "rank-*.failed", f"{TRAINING}*", f"{MARKER}*")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slice:
    """The location on disk of some elements of a parameter's state."""

    start: int
    length: int
    file: Path
    key: str


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]
    slices: dict[tuple[str, str], list[Slice]] = field(default_factory=dict)
    contents: dict[Path, Any] = field(default_factory=dict, compare=False, repr=False)  # open files

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Parameter -> shape."""
        return dict(self.manifest["shapes"])

    def index(self) -> Checkpoint:
        """A copy of this checkpoint with its list of slices, from the header of each file."""
        slices: dict[tuple[str, str], list[Slice]] = defaultdict(list)
        for file in sorted(self.folder.glob("rank-*.safetensors")):
            content = self.content(file)
            for key in content.keys():  # noqa: SIM118 (it is no dictionary)
                name, state, start = key.split("::")
                length = math.prod(content.get_slice(key).get_shape())
                slices[name, state].append(Slice(int(start), length, file, key))
        return Checkpoint(self.folder, self.manifest, dict(slices), self.contents)

    def content(self, file: Path) -> Any:
        """A rank's file, kept open, because opening it reads the whole header."""
        if file not in self.contents:
            if len(self.contents) >= MAX_OPEN:
                self.contents.clear()
            self.contents[file] = safe_open(file, "pt")
        return self.contents[file]

    def states(self, name: str) -> list[str]:
        """The saved states of a parameter."""
        return [state for parameter, state in self.slices if parameter == name]

    def read(self, name: str, state: str, start: int = 0, length: int | None = None) -> Tensor:
        """``length`` elements from ``start`` on of a flattened state; ``ValueError`` if some are missing."""
        length = math.prod(self.shapes[name]) - start if length is None else length
        pieces = [
            (piece, max(start, piece.start), min(start + length, piece.start + piece.length))
            for piece in self.slices.get((name, state), [])
        ]
        filled = sum(max(0, last - first) for _, first, last in pieces)
        if filled != length:
            raise ValueError(
                f"{self.folder}: {name}: {length - filled} of {length} elements of {state!r} are missing."
            )
        out = torch.empty(length)
        for piece, first, last in pieces:
            if first < last:
                part = self.content(piece.file).get_slice(piece.key)[first - piece.start : last - piece.start]
                out[first - start : last - start] = part
        return out

    def scalar(self, name: str, state: str) -> Tensor:
        """A scalar state, such as AdamW's step."""
        piece = self.slices[name, state][0]
        return self.content(piece.file).get_tensor(piece.key).reshape(())

    def tensor(self, name: str, state: str) -> Tensor:
        """A whole state in the parameter's shape, float32."""
        return self.read(name, state).view(self.shapes[name])

    def weights(self, average: str | None) -> dict[str, Tensor]:
        """All parameters and buffers; parameters with an ``average`` of that name are replaced by it."""
        averaged = {name for name, state in self.slices if state == average}
        tensors = {
            name: self.tensor(name, str(average) if name in averaged else WEIGHT) for name in self.shapes
        }
        return tensors | self.training()["buffers"]

    def training(self) -> dict[str, Any]:
        """The state of training: loops, schedules, callbacks, the run and its provenance."""
        loaded = torch.load(self.folder / TRAINING, map_location="cpu", weights_only=True)
        assert isinstance(loaded, dict)
        return loaded

    def damaged_file(self, part: int = 0, parts: int = 1) -> str | None:
        """The first damaged file, among every ``parts``-th one from ``part`` on, or None.

        Checkpoints of earlier versions have no checksums and are not checked.
        """
        checksums = sorted(self.manifest.get("crc32", {}).items())
        return next(
            (name for name, crc32 in checksums[part::parts] if crc32_of(self.folder / name) != crc32), None
        )

    @property
    def averages(self) -> list[str]:
        """The states that are averages of the weights; needs ``index``."""
        return sorted({state for _, state in self.slices if state.startswith(EMA)})


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def complete_checkpoints(checkpoints: Path) -> list[Checkpoint]:
    """The complete checkpoints of a folder, oldest first. Those with files of the wrong size are omitted."""
    complete = []
    for marker in sorted(checkpoints.glob(f"step-*/{MARKER}")):
        folder = marker.parent
        if not folder.name[5:].isdigit():
            continue
        try:
            manifest = read_manifest(marker)
        except Damaged as error:
            warn_once(f"{error} The checkpoint is left out.")
            continue
        sizes = {
            name: (folder / name).stat().st_size for name in manifest["files"] if (folder / name).exists()
        }
        if sizes == manifest["files"]:
            complete.append(Checkpoint(folder, manifest))
    return complete


def read_manifest(marker: Path) -> dict[str, Any]:
    """Read a marker. Raises ``Damaged`` if it is damaged or belongs to another folder."""
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
    """Log a recurring warning once."""
    log.warning(text)


def put_aside(checkpoint: Checkpoint) -> None:
    """Rename a damaged checkpoint, unless another process has done so."""
    aside = checkpoint.folder.with_name(checkpoint.folder.name + DAMAGED)
    if checkpoint.folder.exists():
        remove_written(aside, WRITTEN)
        os.replace(checkpoint.folder, aside)


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint with its slices; raises ``FileNotFoundError`` unless ``path`` is a complete checkpoint."""
    complete = complete_checkpoints(path.parent)
    for checkpoint in complete:
        if checkpoint.folder == path:
            return checkpoint.index()
    raise FileNotFoundError(f"{path} is not a complete checkpoint. Complete ones: {complete or 'none'}.")


def slice_key(name: str, state: str, start: int) -> str:
    return f"{name}::{state}::{start}"


def write_rank_file(partial: Path, rank: int, tensors: Mapping[str, Tensor]) -> None:
    """Write a rank's slices completely, or raise ``CheckpointError`` with the reason and leave no file."""
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
    """``torch.save`` through a Python file, whose errors give a reason; torch's own do not."""
    with open(path, "wb") as file:
        torch.save(content, file)


def finish_checkpoint(
    partial: Path, world: int, training: Mapping[str, Any], manifest: Mapping[str, Any], timeout: float
) -> Checkpoint:
    """On the first rank: wait for all ranks, write the rest and the marker, and rename the folder."""
    deadline = time.monotonic() + timeout
    while len(list(partial.glob("rank-*.safetensors"))) < world:
        failed = sorted(path.stem for path in partial.glob("rank-*.failed"))
        if failed or time.monotonic() > deadline:
            late = f"not all {world} ranks wrote within {timeout:.0f} s"
            reason = f"{', '.join(failed)} failed" if failed else late
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
        remove_written(folder, WRITTEN)  # an incomplete one
        os.replace(partial, folder)
        to_disk(folder.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise CheckpointError(getattr(error, "errno", None) or errno.EIO, f"{partial}: {error}") from error
    return Checkpoint(folder, whole_manifest)


def retained(checkpoints: Iterable[Checkpoint], policy: CheckpointConfig) -> set[Path]:
    """The folders of the checkpoints to keep under a policy."""
    ordered = sorted(checkpoints, key=lambda checkpoint: checkpoint.step)
    folders = {c.folder for c in ordered[-policy.keep_last :]}
    folders |= {c.folder for c in ordered if c.manifest.get("milestone")}
    scored = [
        c for c in ordered if math.isfinite(c.manifest.get("metrics", {}).get(policy.keep_best, math.nan))
    ]
    if scored:
        sign = 1 if policy.best_is == "lowest" else -1
        folders.add(min(scored, key=lambda c: sign * c.manifest["metrics"][policy.keep_best]).folder)
    return folders


def prune(checkpoints: Path, policy: CheckpointConfig) -> None:
    """Remove the checkpoints that the policy does not keep, and unfinished removals."""
    complete = complete_checkpoints(checkpoints)
    folders = retained(complete, policy)
    for folder in [c.folder for c in complete if c.folder not in folders]:
        hidden = folder.with_name(folder.name + ".removed")
        if not hidden.exists():  # otherwise it contains files of others
            folder = folder.rename(hidden)
        remove_written(folder, WRITTEN)
    for rest in checkpoints.glob("step-*.removed"):
        remove_written(rest, WRITTEN)
