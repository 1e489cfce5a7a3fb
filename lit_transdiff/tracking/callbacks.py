"""What a training run tells W&B besides its numbers: the data it reads, its best model so far, and a loss that is not finite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from lit_transdiff.config import RunConfig
from lit_transdiff.data.datamodule import DataModule
from lit_transdiff.stages.callbacks import NonFiniteLoss
from lit_transdiff.tracking.artifacts import data_artifact, make, model_artifact, use
from lit_transdiff.tracking.wandb_run import WandbRun, run_id

WATCHED = "val/loss"
Export = Callable[[pl.Trainer, Path], None]  # writes the averaged weights to a folder; every rank calls it


class BestModel(pl.Callback):
    """Keeps the averaged weights of the lowest validation loss in the folder ``best``, one export, replaced when it improves.

    The last validation is left out: what it judges is the run's export.
    """

    def __init__(self, folder: Path, export: Export) -> None:
        self.folder = folder
        self.export = export
        self.best = float("inf")
        self.best_step = -1

    def on_validation_end(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        value = trainer.callback_metrics.get(WATCHED)
        if trainer.sanity_checking or value is None or not float(value) < self.best:
            return
        self.best, self.best_step = float(value), trainer.global_step
        if trainer.global_step < trainer.max_steps:
            self.export(trainer, self.folder)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]


class Track(pl.Callback):
    """The run's lineage and its alerts."""

    def __init__(self, tracker: WandbRun, run: RunConfig, data: DataModule) -> None:
        self.tracker = tracker  # not ``log``: Lightning overwrites that name in callbacks
        self.run = run
        self.data = data

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        index = self.data.index_of("data.train")
        about = {"samples": len(index), "classes": index.num_classes, "shards": len(index.shards), "kind": index.kind}
        use(self.tracker, data_artifact(Path(index.folder) / "index.json", about))

    @rank_zero_only
    def on_exception(self, trainer: pl.Trainer, stage: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, NonFiniteLoss):
            self.tracker.alert(f"{self.run.name}: the loss is not finite", str(exception), bad=True)


@rank_zero_only
def log_models(log: WandbRun, run: RunConfig, best: BestModel | None) -> None:
    """The models that a finished run leaves, as versions of one artifact: ``best``, then ``latest``; one if they are the same."""
    upload, id_ = run.tracking.upload_models, run_id(run.folder)
    earlier = best is not None and best.best_step < run.training.max_steps and (best.folder / "export.json").is_file()
    if earlier and best is not None:
        make(log, model_artifact(run.name, id_, best.folder, upload=upload), ["best"])
    make(log, model_artifact(run.name, id_, run.folder / "export", upload=upload), [] if earlier else ["best"])
