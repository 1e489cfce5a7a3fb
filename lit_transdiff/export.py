"""The plain form of a trained model: ``model.safetensors`` (averaged weights), ``config.yaml`` and ``export.json``.

Every command that uses a trained model reads this form; a run folder stands for the ``export`` folder in it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_transdiff.checkpoint import Checkpoint, complete_checkpoints
from lit_transdiff.config import RunConfig, require, unknown
from lit_transdiff.files import short_hash
from lit_transdiff.loading import load_run, run_from, save_yaml


@dataclass(frozen=True)
class Export:
    """A trained model as it lies on disk: its run, its weights and where they come from (step, images seen, versions)."""

    folder: Path
    run: RunConfig
    state: dict[str, Tensor]
    info: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights file, 16 hexadecimal digits."""
        return short_hash(self.folder / "model.safetensors")


def export_folder(path: str | Path) -> Path:
    """The export folder that ``path`` (a run folder or an export folder) stands for.

    Raises ``FileNotFoundError`` naming the trained runs nearby when there is none.
    """
    path = Path(path)
    for candidate in (path, path / "export"):
        if (candidate / "model.safetensors").is_file():
            return candidate
    root = path if path.is_dir() else path.parent
    nearby = sorted(str(p.parent.parent) for p in root.glob("*/export/model.safetensors")) if root.is_dir() else []
    hint = f" Trained runs there: {', '.join(nearby)}." if nearby else ""
    raise FileNotFoundError(f"{path} holds no trained model (no export/model.safetensors).{hint}")


def read_export(path: str | Path) -> Export:
    """Read a trained model from a run folder or an export folder."""
    folder = export_folder(path)
    info = json.loads((folder / "export.json").read_text())
    return Export(folder, load_run(folder / "config.yaml"), load_file(folder / "model.safetensors"), info)


def export_run(run_folder: Path, step: int | None, average: str, output: str | None) -> Path:
    """Export a checkpoint of a run folder (the last one, if ``step`` is nothing) and return the folder."""
    found = {checkpoint.step: checkpoint for checkpoint in complete_checkpoints(run_folder / "checkpoints")}
    if not found:
        raise FileNotFoundError(f"{run_folder} holds no complete checkpoint.")
    chosen = max(found) if step is None else step
    require(chosen in found, "--step", chosen, f"one of {sorted(found)}")
    folder = Path(output) if output else run_folder / f"export-{chosen:08d}"
    export_checkpoint(found[chosen].index(), folder, average)
    return folder


def export_checkpoint(checkpoint: Checkpoint, folder: Path, average: str = "ema") -> None:
    """Write the plain form of a checkpoint of one of the three stages, whatever strategy and number of ranks wrote it."""
    training = checkpoint.training()
    run, info = run_from(training["run"]), training["info"]
    averages = sorted({state for _, state in checkpoint.slices if state.startswith("ema")})
    if average not in averages and average != "last":
        raise unknown("average", average, [*averages, "last"])
    weights = checkpoint.weights(None if average == "last" else average)
    state = {name.removeprefix("model."): value.contiguous() for name, value in weights.items()}
    decay = run.optimizer.ema_decay if average == "ema" else average.removeprefix("ema_")
    info = {
        **info,
        "step": checkpoint.step,
        "images_seen": checkpoint.manifest["images_seen"],
        "weights": "last" if average == "last" else f"ema {decay}",
    }
    write_export(folder, run, info, lambda partial: save_file(state, partial / "model.safetensors"))


def write_export(folder: Path, run: RunConfig, info: Mapping[str, Any], write_weights: Callable[[Path], None]) -> None:
    """Write a trained model under a temporary name, then put it in place of what was there."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_weights(partial)
    save_yaml(run, partial / "config.yaml")
    (partial / "export.json").write_text(json.dumps(dict(info), indent=2))
    before = folder.with_name(folder.name + ".before")
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        os.replace(folder, before)
    os.replace(partial, folder)
    shutil.rmtree(before, ignore_errors=True)
