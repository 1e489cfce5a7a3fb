"""The folder of a run: what it holds, and whether a run may write to it.

``config.yaml`` (resolved), ``environment.json`` (commit, versions, machine; one entry a start), ``metrics.csv``,
``checkpoints/``, ``samples/``, ``export/`` (the trained model, written when the run has finished), ``evaluations/``, ``wandb/``.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from lit_transdiff.checkpoint import Checkpoint, complete_checkpoints
from lit_transdiff.config import RunConfig
from lit_transdiff.files import read_json, replace_file
from lit_transdiff.loading import load_run, save_yaml, to_dict

PACKAGES = (
    "lit-transdiff",
    "torch",
    "lightning",
    "wandb",
    "omegaconf",
    "webdataset",
    "timm",
    "einops",
    "torchmetrics",
    "torch-fidelity",
    "deepspeed",
    "diffusers",
    "numpy",
    "pillow",
)
# Settings that may change between two starts of one run: they do not decide its numbers so far (max_steps does, where the
# learning rate follows it).
FREE = (
    "training.max_steps",
    "training.log_every",
    "training.validate_every",
    "training.checkpoint_every",
    "training.sample_every",
    "training.micro_batch_size",
    "training.precision",
    "training.compile",
    "training.activation_checkpointing",
    "training.activation_checkpointing_every",
)
log = logging.getLogger(__name__)
FREE_GROUPS = ("sampling", "evaluation", "tracking", "distributed", "checkpoint", "safety")


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted names of the settings that differ between two nested configurations, with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in old:
        name = f"{prefix}{key}"
        if isinstance(old[key], dict):
            found |= differences(old[key], new[key], name + ".")
        elif old[key] != new[key]:
            found[name] = (old[key], new[key])
    return found


def check_folder(run: RunConfig) -> None:
    """Refuse a folder that holds a run with other settings: nothing is overwritten, and no run continues as another."""
    file = run.folder / "config.yaml"
    if not file.exists():
        return
    free = [name for name in FREE if name != "training.max_steps" or run.optimizer.schedule == "constant"]
    changed = {
        name: pair
        for name, pair in differences(to_dict(load_run(file)), to_dict(run)).items()
        if name not in free and name.split(".")[0] not in FREE_GROUPS
    }
    if changed:
        listed = "; ".join(f"{name}: {old!r} there, {new!r} now" for name, (old, new) in changed.items())
        raise ValueError(
            f"{run.folder} holds a run with other settings ({listed}). Choose another name=..., or remove that folder."
        )


def trained_steps(run: RunConfig) -> int:
    """The steps of the trained model in the folder, 0 where there is none."""
    info = run.folder / "export" / "export.json"
    try:
        return int(read_json(info)["step"]) if info.exists() else 0
    except ValueError as error:
        log.warning("%s The export is made again.", error)
        return 0


def last_checkpoint(run: RunConfig) -> Checkpoint | None:
    """The newest complete checkpoint of the run, or nothing."""
    return max(complete_checkpoints(run.folder / "checkpoints"), key=lambda found: found.step, default=None)


def open_folder(run: RunConfig, num_processes: int | None = None) -> None:
    """Make the folder and write the resolved configuration and the environment of this start.

    ``num_processes`` is that of all nodes; without it, what the launcher says in ``WORLD_SIZE``.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    save_yaml(run, run.folder / "config.yaml")
    file = run.folder / "environment.json"
    try:
        starts = read_json(file) if file.exists() else []
    except ValueError as error:
        log.warning("%s It is begun anew.", error)
        starts = []
    this = environment() | ({"num_processes": num_processes} if num_processes else {})
    replace_file(file, json.dumps([*starts, this], indent=2).encode())


def environment() -> dict[str, Any]:
    """Commit, versions and machine of this process."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "host": platform.node(),
        "cpu_count": os.cpu_count(),
        "num_processes": int(os.environ.get("WORLD_SIZE", 1)),
        "gpus": gpus,
    }


def package_versions() -> dict[str, str]:
    """The versions of this package and of those that its numbers depend on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def git_commit() -> str | None:
    """Commit of the checkout that this package runs from, with ``-dirty`` when it has changes; nothing outside a checkout."""
    root = Path(__file__).parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
