"""Logging of evaluations to W&B: scores, a table, the picture, an artifact with its model, and an alert."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_transdiff.config import RunConfig
from lit_transdiff.config.paths import export_folder
from lit_transdiff.evaluation.scores import EVALUATE, measured_std, value
from lit_transdiff.sampling.pictures import opener
from lit_transdiff.tracking.artifacts import evaluation_artifact, make, model_artifact, use
from lit_transdiff.tracking.identity import run_id
from lit_transdiff.tracking.loggers import MetricsCSV
from lit_transdiff.tracking.metrics_file import last_logged, read_rows
from lit_transdiff.tracking.wandb_run import WandbRun, open_run

REFERENCES = "references"  # the name of the picture of an MRAR run's successive images


def numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    """Scores as metrics: ``eval/NAME``, and ``eval/NAME_std`` for scores with a standard deviation."""
    found: dict[str, float] = {}
    for name, score in scores.items():
        found[f"eval/{name}"] = value(score)
        if (std := measured_std(score)) is not None:
            found[f"eval/{name}_std"] = std
    return found


def evaluation_run(settings: RunConfig, checkpoint: str) -> RunConfig:
    """The run that scores ``checkpoint``: the trained run's settings with other sampling and evaluation."""
    return dataclasses.replace(settings, stage=EVALUATE, init_from=checkpoint)


def log_own_scores(run: RunConfig, result: Mapping[str, Any], *, new: bool) -> None:
    """Log the scores of a trained run with its own settings to the run itself, in W&B and ``metrics.csv``.

    The CSV file is written last. For a result that is not ``new``, scores that are missing there because of
    an interruption are logged again.
    """
    step, file = run.training.max_steps, run.folder / "metrics.csv"
    there = set() if new else set(last_logged(read_rows(file)))
    missing = {name: value for name, value in numbers(result["scores"]).items() if name not in there}
    if missing and run.tracking.wandb:
        log = WandbRun(run)
        successive = run.folder / "samples" / REFERENCES / "grid.png"
        if successive.is_file():
            log.log_picture(f"samples/{REFERENCES}", opener(successive)(), step)
        log_result(log, result, step)
        log.finish()
    MetricsCSV(file, run.images_per_step).log_metrics(missing, step)


def log_evaluation(run: RunConfig, result: Mapping[str, Any], folder: Path, *, trial: bool) -> None:
    """Log scores as a separate W&B run of job type ``evaluate`` with its files in ``folder``.

    With ``trial``, the folder belongs to this evaluation alone (a trial of a sweep) and also gets a
    ``metrics.csv``.
    """
    step = int((result["manifest"]["training"] or {}).get("step", 0))
    if trial:
        MetricsCSV(folder / "metrics.csv", run.images_per_step).log_metrics(numbers(result["scores"]), step)
    if not run.tracking.wandb:
        return
    stem = Path(result["file"]).stem
    id_ = run_id(folder) if trial else hashlib.sha256(f"{run_id(folder)} {stem}".encode()).hexdigest()[:8]
    log = WandbRun(run)
    log.adopt(
        open_run(run, id_, folder=folder, name=run.name if trial else f"{stem} {EVALUATE}", job_type=EVALUATE)
    )
    trained = export_folder(str(run.init_from))
    id_file = trained.parent / "wandb" / "run_id"
    model_id = id_file.read_text() if id_file.is_file() else "model"
    name = result["manifest"]["run"]
    use(log, model_artifact(name, model_id, trained, upload=run.tracking.upload_models))
    log_result(log, result, step)
    log.finish()


def log_result(log: WandbRun, result: Mapping[str, Any], step: int) -> None:
    """Log scores as numbers, table and picture, the manifest as configuration, the artifact and the alert."""
    scores, manifest, file = result["scores"], result["manifest"], Path(result["file"])
    log.experiment.config.update({"manifest": dict(manifest)}, allow_val_change=True)
    log.log_metrics(numbers(scores), step)
    rows = [[name, value(score), measured_std(score)] for name, score in scores.items()]
    log.log_table("eval/scores", ["metric", "value", "std"], rows, step)
    picture = file.with_suffix(".png")
    if picture.is_file():
        log.log_picture("eval/samples", opener(picture)(), step)
    make(log, evaluation_artifact(file, manifest))
    shown = ", ".join(
        f"{name} {value:.4g}" for name, value in numbers(scores).items() if not name.endswith("_std")
    )
    log.alert(f"{manifest['run']}: evaluated", shown)
