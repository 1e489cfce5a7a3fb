"""The folder of a run: its content, and the conditions for a run to write to it.

``config.yaml`` (resolved), ``environment.json`` (commit, versions, machine; one entry per start),
``metrics.csv``, ``checkpoints/``, ``samples/``, ``export/`` (the trained model, written at the end),
``evaluations/``, ``wandb/``, ``lock`` (of the process that trains).
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
import zlib
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lit_transdiff.base.files import Damaged, crc32_of, replace_file, with_seal
from lit_transdiff.base.hub import is_on_hub
from lit_transdiff.base.remote import RemoteFolder, is_remote
from lit_transdiff.checkpoints.format import Checkpoint, complete_checkpoints
from lit_transdiff.checkpoints.version import read_number, read_starts, versioned
from lit_transdiff.config import RunConfig, is_stream
from lit_transdiff.config.loading import load_run, run_from, save_yaml, setting, to_dict
from lit_transdiff.config.targets import contents, refuse_foreign
from lit_transdiff.data.index_files import header_bytes

GIT_TIMEOUT = 10.0  # seconds; a hanging disk must not stop a run
PACKAGES = (
    "lit-transdiff torch lightning wandb omegaconf webdataset timm einops "
    "torchmetrics torch-fidelity deepspeed diffusers numpy pillow"
).split()
# Settings that may change between two starts of a run, because its numbers so far do not depend on them (they
# do on max_steps if the learning rate does, and on num_workers for a stream, which refuses another value
# itself). The folder may be reached by any path.
FREE = (
    "name",
    "output_dir",
    "data.num_workers",
    "data.cache_dir",
    "data.cache_gb",
    "training.max_steps",
    "training.log_every",
    "training.validate_every",
    "training.checkpoint_every",
    "training.sample_every",
    "training.profile_steps",
    "training.micro_batch_size",
    "training.precision",
    "training.kernels",
    "training.residual_dtype",
    "training.matmul_precision",
    "training.compile",
    "training.cuda_graphs",
    "training.activation_checkpointing",
    "training.activation_checkpointing_every",
)
# Path settings: the path may change, its content may not.
PLACES = ("data.train", "data.evaluation", "data.index", "data.groups", "autoencoder.path", "init_from")
# Output of a run before or without a checkpoint; "lock" and "wandb" precede "config.yaml".
WRITTEN_EARLY = ("environment.json", "metrics.csv", "samples", "profile", "best", "export", "evaluations")
# Settings that a stage does not read, by prefix; they may change, because the runs of a pipeline share them.
UNREAD = {
    "autoencoder": ("autoencoder.", "model.", "flow."),
    "classifier": ("autoencoder.", "autoencoder_training.", "model.", "flow."),
    "judge": ("autoencoder.", "autoencoder_training.", "model.", "flow."),
}
# by every stage, for the data and the number of images seen
READ = ("model.num_classes", "model.num_references")
log = logging.getLogger(__name__)
FREE_GROUPS = ("sampling", "evaluation", "tracking", "distributed", "checkpoint", "safety")


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The settings that differ between two nested configurations: dotted name -> both values."""
    changes: dict[str, tuple[Any, Any]] = {}
    for key in old:
        name = f"{prefix}{key}"
        if isinstance(old[key], dict):
            changes |= differences(old[key], new[key], name + ".")
        elif old[key] != new[key]:
            changes[name] = (old[key], new[key])
    return changes


def content_checksum(place: str | None) -> str | None:
    """A checksum of the shard index, model weights or file at a path, or None if there is none.

    For a URL it is that of the index, which is equal for a copy of the shards elsewhere.
    """
    on_hub = is_on_hub(place) and not str(place).startswith("hf://datasets/")  # pinned by its commit
    if place is None or is_stream(place) or on_hub:
        return None
    if is_remote(place):
        return index_checksum(place)
    path = Path(place)
    if path.is_file():
        files = [path]
    elif (path / "index.json").is_file():
        files = [path / "index.json"]
    else:
        folder = path / "export" if (path / "export").is_dir() else path
        files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
    return " ".join(f"{crc32_of(file):08x}-{file.stat().st_size}" for file in files) or None


def index_checksum(url: str) -> str | None:
    """The checksum of the index of shards at a URL, or None if there is none or it cannot be read."""
    try:
        header = header_bytes(url)
    except OSError:
        return None
    return f"{zlib.crc32(header):08x}-{len(header)}"


def inputs(run: RunConfig) -> dict[str, str]:
    """Checksums of the content at the run's paths, by setting, for its checkpoints."""
    settings = to_dict(run)
    places = {name: setting(settings, name) for name in PLACES}
    return {
        name: content for name, place in places.items() if (content := content_checksum(place)) is not None
    }


def same_place(old: str | None, new: str | None, content: str | None) -> bool:
    """Whether two paths have the same target, or the same ``content`` (by default that of ``old`` now)."""
    if old is None or new is None or is_stream(old) or is_stream(new):
        return old == new
    if not is_remote(old) and not is_remote(new) and Path(old).resolve() == Path(new).resolve():
        return True
    now = content_checksum(new)
    return now is not None and now == (content or content_checksum(old))


def changed(there: RunConfig, run: RunConfig, contents: Mapping[str, str]) -> dict[str, tuple[Any, Any]]:
    """The settings of ``run`` that affect its numbers and differ from ``there``, with earlier ``inputs``."""
    free = [name for name in FREE if name != "training.max_steps" or run.optimizer.schedule == "constant"]
    return {
        name: (old, new)
        for name, (old, new) in differences(to_dict(there), to_dict(run)).items()
        if name not in free
        and (name in READ or not name.startswith(UNREAD.get(run.stage, ("autoencoder_training.",))))
        and name.split(".")[0] not in FREE_GROUPS
        and not (name in PLACES and same_place(old, new, contents.get(name)))
    }


def refuse(place: Path | RemoteFolder, changes: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise ``ValueError`` if any settings have changed."""
    if changes:
        listed = "; ".join(f"{name}: {old!r} there, {new!r} now" for name, (old, new) in changes.items())
        raise ValueError(
            f"{place} holds a run with other settings ({listed}). Give this one another name=..."
        )


def check_folder(run: RunConfig) -> None:
    """Refuse a folder of a run with other settings, so that nothing is overwritten or mixed."""
    starts(run.folder)  # refuses a newer version
    file = run.folder / "config.yaml"
    if not file.exists() or not file.read_bytes().strip(b"\0\n "):
        there = [name for name in contents(run.folder) if name in WRITTEN_EARLY]
        if there and not (run.folder / "checkpoints").is_dir():
            refuse_foreign(run.folder, there, "a run")
        return  # lost; check_checkpoint compares instead
    checkpoint = last_checkpoint(run)
    changes = changed(load_run(file), run, {})
    if changes.keys() & PLACES and checkpoint is not None:
        changes = changed(load_run(file), run, checkpoint.training().get("inputs", {}))
    refuse(run.folder, changes)


def check_checkpoint(run: RunConfig, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint of a run with other settings, or with other content at its paths."""
    training = checkpoint.training()
    contents = training.get("inputs")
    if contents is None:
        text = "%s is of an earlier version: whether its data are still the same is not known."
        log.warning(text, checkpoint.folder)
        contents = {}
    changes = changed(run_from(training["run"]), run, contents)
    now = inputs(run)
    for name in PLACES[:-1]:  # the initial model of a run may be trained further
        old, new = contents.get(name), now.get(name)
        if old is not None and new is not None and old != new:
            changes[name] = (f"content {old}", f"content {new}")
    refuse(checkpoint.folder, changes)


def trained_steps(run: RunConfig) -> int:
    """The steps of the trained model in the folder, 0 if there is none."""
    info = run.folder / "export" / "export.json"
    try:
        return int(read_number(info, "step")) if info.exists() else 0
    except Damaged as error:
        log.warning("%s The export is made again.", error)
        return 0


def last_checkpoint(run: RunConfig) -> Checkpoint | None:
    """The newest complete checkpoint of the run, or None."""
    checkpoints = complete_checkpoints(run.folder / "checkpoints")
    return max(checkpoints, key=lambda checkpoint: checkpoint.step, default=None)


def open_folder(
    run: RunConfig,
    num_processes: int | None = None,
    places: Mapping[str, str] | None = None,
    execution: Mapping[str, Any] | None = None,
) -> None:
    """Make the folder and write the resolved configuration and the environment of this start.

    ``num_processes`` counts all nodes; by default it is ``WORLD_SIZE``. ``places`` on the Hub have commits.
    ``execution`` says how this start computes.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    save_yaml(run, run.folder / "config.yaml")
    file, earlier = run.folder / "environment.json", starts(run.folder)
    this = versioned(environment()) | ({"num_processes": num_processes} if num_processes else {})
    this |= {"hub": dict(places)} if places else {}
    this |= {"execution": dict(execution)} if execution else {}
    this["config_crc32"] = crc32_of(run.folder / "config.yaml")
    replace_file(file, json.dumps([with_seal(start) for start in [*earlier, this]], indent=2).encode())


def starts(folder: Path) -> list[dict[str, Any]]:
    """The environment of each start of the run in a folder; if damaged, [] with a warning."""
    file = folder / "environment.json"
    try:
        return read_starts(file) if file.exists() else []
    except Damaged as error:
        log.warning("%s It is begun anew.", error)
        return []


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
    """The versions of this package and of its numerical dependencies."""
    return {package: installed_version(package) for package in PACKAGES}


@cache
def installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def git_commit() -> str | None:
    """The commit of this package's checkout, ``-dirty`` if it has changes, or None outside a checkout."""
    root = Path(__file__).parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
