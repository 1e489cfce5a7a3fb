"""The name, group and folder of a run that is a trial of a sweep.

``wandb agent`` and ``lit-transdiff sweep`` start a trial with the same environment: ``WANDB_RUN_ID``, and
``WANDB_SWEEP_PARAM_PATH``, a YAML file of the swept settings. ``lit-transdiff sweep`` adds
``WANDB_RUN_GROUP`` (the sweep's name) and ``SWEEP_FOLDER``.
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_transdiff.config import RunConfig, is_folder_name, require
from lit_transdiff.config.targets import below
from lit_transdiff.config.yaml_text import read_file

SWEEP_FOLDER = "LIT_TRANSDIFF_SWEEP_FOLDER"
SWEEP_SIGN = "sweep.yaml"  # the file that identifies a sweep's folder
MAX_NAME = 120  # the most characters of a folder's name for the settings


@dataclass(frozen=True)
class TrialPlace:
    """The W&B id of a trial, its sweep's name and folder (None: below the run's), and the swept settings."""

    id: str
    sweep: str
    folder: Path | None
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """The sorted swept settings and the id, as in ``lr_0.002-global_batch_size_64-1a2b3c4d``."""
        swept = sorted(flattened(self.settings).items())
        words = (re.sub(r"[^\w+-]", "_", key.split(".")[-1]) + f"_{word(value)}" for key, value in swept)
        return f"{'-'.join(words)[:MAX_NAME]}-{self.id}"


def trial_place() -> TrialPlace | None:
    """The trial that this process is according to its environment, or None."""
    file, id_ = os.environ.get("WANDB_SWEEP_PARAM_PATH"), os.environ.get("WANDB_RUN_ID")
    if not file or not id_:
        return None
    given = read_file(Path(file))
    settings = {
        key: item["value"] for key, item in given.items() if isinstance(item, dict) and "value" in item
    }
    sweep = os.environ.get("WANDB_RUN_GROUP") or f"sweep-{os.environ.get('WANDB_SWEEP_ID', 'unnamed')}"
    require(is_folder_name(id_), "WANDB_RUN_ID", id_, "the id of a run, without '/' or '\\'")
    folder = os.environ.get(SWEEP_FOLDER)
    return TrialPlace(id_, sweep, Path(folder) if folder else None, settings)


def placed(run: RunConfig) -> RunConfig:
    """``run``; if this process is a trial of a sweep, with the name, group and folder of the trial."""
    trial = trial_place()
    if trial is None:
        return run
    folder = trial.folder or below(Path(run.output_dir) / "sweeps", trial.sweep, "WANDB_RUN_GROUP")
    tracking = dataclasses.replace(run.tracking, group=trial.sweep)
    return dataclasses.replace(run, name=trial.name, output_dir=str(folder), tracking=tracking)


def flattened(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        found |= flattened(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def word(value: Any) -> str:
    """A value in a form for folder names."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("_")
