"""Lineage in W&B: data index -> model -> evaluation, each an artifact named by its content.

Files are uploaded from their place without a copy on disk. A file with the same content is the same version
on the server.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_transdiff.checkpoints.version import read_versioned
from lit_transdiff.config.targets import files_in
from lit_transdiff.data.index_files import header_hash
from lit_transdiff.tracking.server import going_on_without
from lit_transdiff.tracking.wandb_run import WandbRun

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)


def artifact_name(*words: str) -> str:
    """Join words to a name of the characters that W&B allows."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(words))[:120]


def data_artifact(folder: str, description: dict[str, Any]) -> wandb.Artifact:
    """The artifact of a folder of shards, identified by the hash of its index; they are not uploaded."""
    import wandb

    about = {"index": f"{folder}/index.json", "index_sha256": header_hash(folder), **description}
    artifact = wandb.Artifact(artifact_name("data", Path(folder).name), type="dataset", metadata=about)
    with artifact.new_file("data.json") as file:
        json.dump(about, file, indent=2)
    return artifact


def model_artifact(run_name: str, run_id: str, export: Path, *, upload: bool) -> wandb.Artifact:
    """The artifact of a run's exported weights and configuration, or without ``upload`` of their paths."""
    import wandb

    about = read_versioned(export / "export.json") | {"folder": str(export)}
    artifact = wandb.Artifact(artifact_name("model", run_name, run_id), type="model", metadata=about)
    for name in files_in(export):
        if upload:
            artifact.add_file(str(export / name), name, skip_cache=True, policy="immutable")
        else:
            artifact.add_reference((export / name).resolve().as_uri(), name)
    return artifact


def evaluation_artifact(file: Path, manifest: dict[str, Any]) -> wandb.Artifact:
    """The artifact of a result file and its picture."""
    import wandb

    artifact = wandb.Artifact(
        artifact_name("evaluation", file.stem), type="evaluation", metadata={"manifest": manifest}
    )
    for part in (file, file.with_suffix(".png")):
        if part.is_file():
            artifact.add_file(str(part), skip_cache=True, policy="immutable")
    return artifact


def use(tracker: WandbRun, artifact: wandb.Artifact) -> None:
    """Record ``artifact`` as an input of the run, in a thread because the client waits for the server."""
    experiment = tracker.experiment

    def tell() -> None:
        try:
            experiment.use_artifact(artifact)
        except Exception as error:  # any error: lineage must not stop training
            log.debug("the server did not record %s: %s", artifact.name, error)

    threading.Thread(target=tell, name="wandb lineage", daemon=True).start()


def register(tracker: WandbRun, artifact: wandb.Artifact, place: str) -> None:
    """Link an output of the run to ``place``, a registry and a collection of W&B's model registry."""
    if tracker.experiment.offline:
        return log.warning("tracking.registry: W&B is offline, and links no model to %s", place)
    with going_on_without(f"the link of {artifact.name} to the registry {place}"):
        tracker.experiment.link_artifact(artifact, f"wandb-registry-{place}")


def make(tracker: WandbRun, artifact: wandb.Artifact, aliases: Sequence[str] = ()) -> None:
    """Record ``artifact`` as an output of the run; W&B gives the newest version the alias ``latest``."""
    with going_on_without(artifact.name):
        tracker.experiment.log_artifact(artifact, aliases=["latest", *aliases])
