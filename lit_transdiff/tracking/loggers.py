"""Where the numbers of a run go: a CSV file in the run folder, and Weights & Biases."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lit_transdiff.config import RunConfig
from lit_transdiff.files import whole
from lit_transdiff.tracking.folders import COLUMNS, devices_of_starts
from lit_transdiff.tracking.wandb_run import WandbRun


class MetricsCSV(Logger):
    """``metrics.csv``, one row a value: step, images seen, wall-clock seconds of this process, metric, value, start of the run.

    Starts are numbered as in ``environment.json``. Rows are appended and flushed, so a kill loses nothing; a resumed run first
    drops the rows after the step it resumes from.
    """

    def __init__(self, path: Path, images_per_step: int) -> None:
        super().__init__()
        self.path = path
        self.images_per_step = images_per_step
        self.start = time.monotonic()

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration is saved beside the metrics, in ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        columns = self.columns()
        with open(self.path, "a", newline="") as file:
            writer = csv.writer(file)
            if columns is None:
                writer.writerow(COLUMNS)
            seconds = round(time.monotonic() - self.start, 3)
            for name, value in metrics.items():
                if name != "epoch":
                    row = [step, (step or 0) * self.images_per_step, seconds, name, value, self.run_start]
                    writer.writerow(row[: columns or len(COLUMNS)])

    @cached_property
    def run_start(self) -> int:
        """The number of this start of the run."""
        return len(devices_of_starts(self.path.parent)) - 1

    def columns(self) -> int | None:
        """How many columns the file has, which an earlier version may have begun; nothing where there is none yet."""
        if not self.path.exists():
            return None
        with open(self.path, newline="") as file:
            return len(next(csv.reader(file), [])) or None

    @rank_zero_only
    def drop_after(self, step: int) -> None:
        """Forget what was logged after ``step``."""
        if self.path.exists():
            with open(self.path, newline="") as file:
                header, *rows = list(csv.reader(file))
            with whole(self.path) as partial, open(partial, "w", newline="") as file:
                csv.writer(file).writerows([header, *(row for row in rows if int(row[0]) <= step)])


def build_loggers(run: RunConfig) -> list[Logger]:
    """The CSV file and, unless ``tracking.wandb`` is false, the W&B run of this run folder."""
    loggers: list[Logger] = [MetricsCSV(run.folder / "metrics.csv", run.images_per_step)]
    return loggers + ([WandbRun(run)] if run.tracking.wandb else [])


def wandb_of(loggers: Iterable[Logger]) -> WandbRun | None:
    """The W&B run among the loggers, if there is one."""
    return next((logger for logger in loggers if isinstance(logger, WandbRun)), None)
