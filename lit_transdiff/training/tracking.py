"""W&B records of a training run besides its numbers: its data, its best model, and alerts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from lit_transdiff.base.endings import Preempted
from lit_transdiff.checkpoints.version import read_number
from lit_transdiff.config import RunConfig
from lit_transdiff.data.datamodule import DataModule
from lit_transdiff.tracking.artifacts import data_artifact, make, model_artifact, register, use
from lit_transdiff.tracking.identity import run_id
from lit_transdiff.tracking.nodes import NodeClient
from lit_transdiff.tracking.preempted import mark_preempting
from lit_transdiff.tracking.wandb_run import WandbRun
from lit_transdiff.training.callbacks import NonFiniteLoss
from lit_transdiff.training.guard import GuardSteps, RollBack
from lit_transdiff.training.rhythm import StepCallback

WATCHED = "val/loss"
# Write the averaged weights to a folder, with further entries for export.json; all ranks call it.
WriteExport = Callable[[pl.Trainer, Path, Mapping[str, Any]], None]


class BestModel(StepCallback):
    """Export the averaged weights with the lowest validation loss so far to the folder ``best``.

    The last validation is excluded, because it judges the run's own export.
    """

    def __init__(self, folder: Path, export: WriteExport) -> None:
        self.folder = folder
        self.export = export

    def on_validation_end(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        value = trainer.callback_metrics.get(WATCHED)
        if value is None or not math.isfinite(value) or trainer.global_step >= trainer.max_steps:
            return
        best = best_loss(self.folder)  # equal on all ranks, which share the folder and synchronise below
        with self.rhythm.resting():
            trainer.strategy.barrier()
            if best is None or float(value) < best:
                self.export(trainer, self.folder, {WATCHED: float(value)})
            trainer.strategy.barrier()


def best_loss(folder: Path) -> float | None:
    """The validation loss of the best model so far, over all starts of the run."""
    file = folder / "export.json"
    return read_number(file, WATCHED) if file.is_file() else None


class Track(StepCallback):
    """Record the run's lineage and send alerts."""

    def __init__(self, tracker: WandbRun, run: RunConfig, data: pl.LightningDataModule) -> None:
        self.tracker = tracker  # not ``log``: Lightning overwrites that name in callbacks
        self.run = run
        self.data = data
        self.num_bad = 0  # skipped steps already reported

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        self.num_bad = left_out(trainer)
        if not isinstance(self.data, DataModule):
            return
        index = self.data.index_of("data.train")
        about = {
            "samples": len(index),
            "classes": index.num_classes,
            "shards": len(index.shards),
            "kind": index.kind,
        }
        use(self.tracker, data_artifact(str(index.folder), about))

    @rank_zero_only
    def after_step(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        if left_out(trainer) > self.num_bad:
            self.num_bad = left_out(trainer)
            so_far = f"Step {trainer.global_step}; {self.num_bad} bad steps so far."
            text = f"{so_far} The run's log names the samples."
            with self.rhythm.resting():
                self.tracker.alert(f"{self.run.name}: a bad step was left out", text, bad=True)

    @rank_zero_only
    def on_exception(self, trainer: pl.Trainer, stage: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Preempted):
            mark_preempting(exception)
        elif isinstance(exception, NonFiniteLoss):
            self.tracker.alert(f"{self.run.name}: the loss is not finite", str(exception), bad=True)
        elif isinstance(exception, RollBack):
            self.tracker.alert(f"{self.run.name}: a bad step", str(exception), bad=True)


class EveryNode(StepCallback):
    """Send the system metrics of all nodes to the run, by one client on each node."""

    def __init__(self, tracker: WandbRun) -> None:
        self.tracker = tracker
        self.client: NodeClient | None = None

    def on_train_start(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        """All ranks call this: the first rank's run must be there before the others join it."""
        shared = self.tracker.shared_id() if trainer.is_global_zero else None
        id_ = trainer.strategy.broadcast(shared)
        if id_ is not None and trainer.local_rank == 0 and trainer.node_rank > 0:
            with self.rhythm.resting():
                self.client = NodeClient(self.tracker.run.tracking.project, id_, trainer.node_rank)

    def finish(self, trainer: pl.Trainer) -> None:
        self.close()

    def on_exception(self, trainer: pl.Trainer, stage: pl.LightningModule, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        if self.client is not None:
            self.client.close()
            self.client = None


def left_out(trainer: pl.Trainer) -> int:
    """The number of steps skipped so far for their loss."""
    guards = (c for c in trainer.callbacks if isinstance(c, GuardSteps))  # type: ignore[attr-defined]
    return next((guard.num_bad for guard in guards), 0)


@rank_zero_only
def log_models(tracker: WandbRun, run: RunConfig, last_loss: float | None) -> None:
    """Log a finished run's models as versions of one artifact: ``best``, then ``latest`` if it differs.

    ``last_loss`` is the validation loss of the last step.
    """
    upload, id_, best = run.tracking.upload_models, run_id(run.folder), best_loss(run.folder / "best")
    earlier = best is not None and last_loss is not None and best < last_loss
    for folder in ("best", "export") if earlier else ("export",):
        artifact = model_artifact(run.name, id_, run.folder / folder, upload=upload)
        is_best = folder == "best" or not earlier
        make(tracker, artifact, ["best"] if is_best else [])
        if is_best and run.tracking.registry is not None:
            register(tracker, artifact, run.tracking.registry)
