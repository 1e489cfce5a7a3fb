"""Where the numbers of a run go: a CSV file in the run folder, and Weights & Biases."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lit_transdiff.config import RunConfig
from lit_transdiff.files import replace_file
from lit_transdiff.tracking.wandb_run import WandbRun

COLUMNS = ("step", "images_seen", "seconds", "metric", "value")


class MetricsCSV(Logger):
    """``metrics.csv``, one row a value: step, images seen, wall-clock seconds of this process, metric, value.

    Rows are appended and flushed, so a kill loses nothing; a resumed run first drops the rows after the step it resumes from.
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
        new = not self.path.exists() or self.path.stat().st_size == 0
        with open(self.path, "a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(COLUMNS)
            seconds = round(time.monotonic() - self.start, 3)
            for name, value in metrics.items():
                if name != "epoch":
                    writer.writerow([step, (step or 0) * self.images_per_step, seconds, name, value])

    @rank_zero_only
    def drop_after(self, step: int) -> None:
        """Forget what was logged after ``step``, and lines that a kill or a damaged disk has cut short."""
        if self.path.exists():
            rows = list(csv.reader(self.path.read_text(errors="replace").replace("\0", "").splitlines()))
            kept = [row for row in rows if len(row) == len(COLUMNS) and row[0].isdigit() and int(row[0]) <= step]
            replace_file(self.path, as_csv([COLUMNS, *kept]).encode())


def as_csv(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as the text of a CSV file."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()


def build_loggers(run: RunConfig) -> list[Logger]:
    """The CSV file and, unless ``tracking.wandb`` is false, the W&B run of this run folder."""
    loggers: list[Logger] = [MetricsCSV(run.folder / "metrics.csv", run.images_per_step)]
    return loggers + ([WandbRun(run)] if run.tracking.wandb else [])


def wandb_of(loggers: Iterable[Logger]) -> WandbRun | None:
    """The W&B run among the loggers, if there is one."""
    return next((logger for logger in loggers if isinstance(logger, WandbRun)), None)
