"""The loggers of a run: a CSV file in the run folder, and Weights & Biases."""

from __future__ import annotations

import csv
import io
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lit_transdiff.base.files import is_full, naming_full, replace_file, to_disk
from lit_transdiff.config import RunConfig
from lit_transdiff.tracking.metrics_file import (
    COLUMNS,
    NEEDED,
    cells_of,
    devices_of_starts,
    drop_cut_line,
    row_checksum,
)
from lit_transdiff.tracking.wandb_run import WandbRun

log = logging.getLogger(__name__)


class MetricsCSV(Logger):
    """``metrics.csv``, one row per value.

    A row has the step, images seen, wall-clock seconds of this process, metric, value, number of the run's
    start (as in ``environment.json``) and checksum. Rows are flushed to disk before training continues, so
    that a checkpoint never lacks the rows before it. A resumed run drops the rows after its step and writes
    them again: except for times and starts, the file then equals that of an uninterrupted run. With
    ``despite_full_disk`` rows wait in memory until the disk has space.
    """

    def __init__(self, path: Path, images_per_step: int, despite_full_disk: bool = False) -> None:
        super().__init__()
        self.path = path
        self.images_per_step = images_per_step
        self.despite_full_disk = despite_full_disk
        self.waiting: list[list[Any]] = []
        self.full = False  # the disk is full, and a warning was logged
        self.start = time.monotonic()
        self.resumed: int | None = None  # the step of the checkpoint from which the run continues

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration is saved beside the metrics in ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        seconds = round(time.monotonic() - self.start, 3)
        images = (step or 0) * self.images_per_step
        given = {name: value for name, value in metrics.items() if name != "epoch"}
        cells = [[step, images, seconds, name, value, self.run_start] for name, value in given.items()]
        rows = [[*row, row_checksum(row)] for row in cells]
        if step == self.resumed:
            self.insert(rows)
        else:
            self.waiting += rows
            self.write()

    @cached_property
    def run_start(self) -> int:
        """The number of the run's current start."""
        return len(devices_of_starts(self.path.parent)) - 1

    def names(self) -> list[str]:
        """The column names of the file; empty if it does not exist."""
        if not self.path.exists():
            return []
        with open(self.path, encoding="utf-8", errors="replace") as file:
            return file.readline().strip().split(",")

    def columns(self) -> int:
        """The number of ``COLUMNS`` in the file, fewer in earlier versions; 0 if it has no metrics."""
        differ = [name != column for name, column in zip(self.names(), COLUMNS, strict=False)] + [True]
        return differ.index(True) if differ.index(True) >= len(NEEDED) else 0

    def write(self) -> None:
        """Append the waiting rows to the file on disk, all or none."""
        if not self.waiting:
            return
        drop_cut_line(self.path)
        columns, size = self.columns(), self.path.stat().st_size if self.path.exists() else 0
        rows = [row[:columns] for row in self.waiting] if columns else [COLUMNS, *self.waiting]
        try:
            with naming_full(self.path), open(self.path, "a", newline="", encoding="utf-8") as file:
                file.write(as_csv(rows))
            to_disk(self.path)
            if not size:  # a new file: flush its directory entry, too
                to_disk(self.path.parent)
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, size)
            if not (self.despite_full_disk and is_full(error)):
                raise
            if not self.full:
                text = "%s: %s. Training goes on; its numbers wait in memory until there is room."
                log.warning(text, self.path, error)
            self.full = True
            return
        self.full = False
        self.waiting.clear()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the rows that still wait; W&B, if used, has them in any case."""
        if self.waiting:
            self.write()
        if self.waiting:
            text = "%s: the last %d numbers of this process are lost: the disk is still full."
            log.warning(text, self.path, len(self.waiting))

    @rank_zero_only
    def drop_after(self, step: int) -> int:
        """Drop the rows after ``step`` and damaged lines, and return the number of these rows."""
        self.resumed = step
        if not self.path.exists():
            return 0
        rows = self.rows()
        kept = [row for row in rows if int(row[0]) <= step]
        self.replace(kept)
        return len(rows) - len(kept)

    def insert(self, rows: Sequence[Sequence[Any]]) -> None:
        """Insert rows of the step at which the run was stopped before the others of that step."""
        before = self.rows()
        place = next((i for i, row in enumerate(before) if int(row[0]) == self.resumed), len(before))
        columns = self.columns() or len(COLUMNS)
        self.replace([*before[:place], *(row[:columns] for row in rows), *before[place:]])

    def rows(self) -> list[list[str]]:
        """The complete rows of the file, including rows that a user has added or changed."""
        text = self.path.read_text("utf-8", errors="replace").replace("\0", "").split("\n")
        rows = [cells_of(line) for line in text[:-1]]
        return [row for row in rows if len(row) >= len(NEEDED) and row[0].isdecimal()]

    def replace(self, rows: Sequence[Sequence[Any]]) -> None:
        """Rewrite the file with these rows."""
        names = self.names() if self.columns() else COLUMNS
        replace_file(self.path, as_csv([names, *rows]).encode())


def as_csv(rows: Iterable[Sequence[Any]]) -> str:
    """Format rows as CSV text."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()


def build_loggers(run: RunConfig) -> list[Logger]:
    """The CSV logger and, unless ``tracking.wandb`` is false, the W&B logger of this run folder."""
    goes_on = run.checkpoint.on_error == "continue"
    metrics = MetricsCSV(run.folder / "metrics.csv", run.images_per_step, goes_on)
    return [metrics, WandbRun(run)] if run.tracking.wandb else [metrics]


def wandb_of(loggers: Iterable[Logger]) -> WandbRun | None:
    """The W&B logger among the loggers, or None."""
    return next((logger for logger in loggers if isinstance(logger, WandbRun)), None)
