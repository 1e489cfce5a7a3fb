"""Checkpoints on disk: one form for every strategy and number of ranks.

``checkpoints/step-00000500/`` holds ``rank-00000.safetensors`` ... (slices of parameters and of their optimizer states, named
``parameter::state::first element`` in the flattened parameter), ``training.pt`` (where training stands) and, written last,
``COMPLETE.json``. A folder is made under another name and renamed when it is whole, so one that was broken off is never found.
Because each slice says which elements of which parameter it holds, any strategy and any number of ranks reads it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_transdiff.averages import EMA
from lit_transdiff.config import CheckpointConfig
from lit_transdiff.endings import CheckpointError
from lit_transdiff.files import replace_file, require_space, whole

MARKER = "COMPLETE.json"
TRAINING = "training.pt"
WEIGHT = "weight"  # the "state" that is the parameter itself, float32
PARTIAL = ".partial"


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

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Parameter -> shape."""
        return dict(self.manifest["shapes"])

    def index(self) -> Checkpoint:
        """The same checkpoint with a list of its slices; reads the head of each file."""
        found: dict[tuple[str, str], list[Slice]] = defaultdict(list)
        for file in sorted(self.folder.glob("rank-*.safetensors")):
            with safe_open(file, "pt") as content:
                for key in content.keys():  # noqa: SIM118 (it is no dictionary)
                    name, state, start = key.split("::")
                    length = math.prod(content.get_slice(key).get_shape())
                    found[name, state].append(Slice(int(start), length, file, key))
        return Checkpoint(self.folder, self.manifest, dict(found))

    def states(self, name: str) -> list[str]:
        """The states that are kept of a parameter."""
        return [state for parameter, state in self.slices if parameter == name]

    def read(self, name: str, state: str, start: int = 0, length: int | None = None) -> Tensor:
        """Elements ``start`` .. ``start + length`` of a flattened state [length]; raises ``ValueError`` if some are missing."""
        length = math.prod(self.shapes[name]) - start if length is None else length
        out, filled = torch.empty(length), 0
        for piece in self.slices.get((name, state), []):
            first, last = max(start, piece.start), min(start + length, piece.start + piece.length)
            if first < last:
                with safe_open(piece.file, "pt") as content:
                    part = content.get_slice(piece.key)[first - piece.start : last - piece.start]
                out[first - start : last - start] = part
                filled += last - first
        if filled != length:
            raise ValueError(f"{self.folder}: {name}: {length - filled} of {length} elements of {state!r} are missing.")
        return out

    def scalar(self, name: str, state: str) -> Tensor:
        """A state that is one number, as the step of AdamW."""
        piece = self.slices[name, state][0]
        with safe_open(piece.file, "pt") as content:
            return content.get_tensor(piece.key).reshape(())

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
        folder, manifest = marker.parent, json.loads(marker.read_text())
        sizes = {name: (folder / name).stat().st_size for name in manifest["files"] if (folder / name).exists()}
        if folder.name[5:].isdigit() and sizes == manifest["files"]:
            found.append(Checkpoint(folder, manifest))
    return found


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
            save_file(dict(tensors), temporary)
            with open(temporary, "rb+") as written:
                os.fsync(written.fileno())
    except (OSError, SafetensorError) as error:
        replace_file(file.with_suffix(".failed"), b"")
        raise CheckpointError(getattr(error, "errno", None) or errno.EIO, f"{file}: {error}") from error


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
        with open(partial / TRAINING, "wb") as file:
            torch.save(dict(training), file)
            file.flush()
            os.fsync(file.fileno())
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        whole = {**manifest, "files": sizes}
        replace_file(partial / MARKER, json.dumps(whole, indent=1).encode())
        folder = partial.with_name(partial.name.removesuffix(PARTIAL))
        shutil.rmtree(folder, ignore_errors=True)  # one that is not complete
        os.replace(partial, folder)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise CheckpointError(getattr(error, "errno", None) or errno.EIO, f"{partial}: {error}") from error
    return Checkpoint(folder, whole)


def kept(found: Iterable[Checkpoint], policy: CheckpointConfig) -> set[Path]:
    """The folders of the checkpoints that the policy keeps."""
    found = sorted(found, key=lambda checkpoint: checkpoint.step)
    keep = {c.folder for c in found[-policy.keep_last :]} | {c.folder for c in found if c.manifest.get("milestone")}
    scored = [c for c in found if policy.keep_best in c.manifest.get("metrics", {})]
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
        os.replace(folder, hidden)
        shutil.rmtree(hidden, ignore_errors=True)
    for rest in checkpoints.glob("step-*.removed"):
        shutil.rmtree(rest, ignore_errors=True)
