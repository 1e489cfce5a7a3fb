"""Where the numbers of a run go: a CSV file in the run folder, and Weights & Biases."""

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
from lit_transdiff.tracking.metrics_file import COLUMNS, NEEDED, cells_of, devices_of_starts, row_checksum
from lit_transdiff.tracking.wandb_run import WandbRun

log = logging.getLogger(__name__)


class MetricsCSV(Logger):
    """``metrics.csv``, one row a value: step, images seen, wall-clock seconds of this process, metric, value, start of the run.

    Starts are numbered as in ``environment.json``; a row ends with its checksum. Rows are on disk before training goes on, so
    that those up to a checkpoint are there when it is; a resumed run first drops the rows after its step, and makes them again.
    Then the file is, but for times and starts, that of a run that was never stopped. With ``despite_full_disk`` rows wait in
    memory until there is room.
    """

    def __init__(self, path: Path, images_per_step: int, despite_full_disk: bool = False) -> None:
        super().__init__()
        self.path = path
        self.images_per_step = images_per_step
        self.despite_full_disk = despite_full_disk
        self.waiting: list[list[Any]] = []
        self.full = False  # and the people have been told
        self.start = time.monotonic()
        self.resumed: int | None = None  # the step of the checkpoint that the run goes on from

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
        seconds = round(time.monotonic() - self.start, 3)
        images = (step or 0) * self.images_per_step
        rows = [[step, images, seconds, name, value, self.run_start] for name, value in metrics.items() if name != "epoch"]
        rows = [[*row, row_checksum(row)] for row in rows]
        if step == self.resumed:
            self.insert(rows)
        else:
            self.waiting += rows
            self.write()

    @cached_property
    def run_start(self) -> int:
        """The number of this start of the run."""
        return len(devices_of_starts(self.path.parent)) - 1

    def names(self) -> list[str]:
        """The names of the file's columns; none where there is no file."""
        if not self.path.exists():
            return []
        with open(self.path, encoding="utf-8", errors="replace") as file:
            return file.readline().strip().split(",")

    def columns(self) -> int:
        """With how many of ``COLUMNS``, fewer in earlier versions, the file begins; 0 where it is none of metrics."""
        differ = [name != column for name, column in zip(self.names(), COLUMNS, strict=False)] + [True]
        return differ.index(True) if differ.index(True) >= len(NEEDED) else 0

    def write(self) -> None:
        """Append the rows that wait to the file on disk, all of them or none."""
        if not self.waiting:
            return
        cut_torn_line(self.path)
        columns, size = self.columns(), self.path.stat().st_size if self.path.exists() else 0
        rows = [row[:columns] for row in self.waiting] if columns else [COLUMNS, *self.waiting]
        try:
            with naming_full(self.path), open(self.path, "a", newline="", encoding="utf-8") as file:
                file.write(as_csv(rows))
            to_disk(self.path)
            if not size:  # and its name
                to_disk(self.path.parent)
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, size)
            if not (self.despite_full_disk and is_full(error)):
                raise
            if not self.full:
                log.warning("%s: %s. Training goes on; its numbers wait in memory until there is room.", self.path, error)
            self.full = True
            return
        self.full = False
        self.waiting.clear()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what still waits; W&B, where it is on, has it anyway."""
        if self.waiting:
            self.write()
        if self.waiting:
            log.warning("%s: the last %d numbers of this process are lost: there is still no room.", self.path, len(self.waiting))

    @rank_zero_only
    def drop_after(self, step: int) -> None:
        """Forget what was logged after ``step``, and lines that a kill or a damaged disk has cut short."""
        self.resumed = step
        if self.path.exists():
            self.replace([row for row in self.rows() if int(row[0]) <= step])

    def insert(self, rows: Sequence[Sequence[Any]]) -> None:
        """Rows of the step at which the run was stopped (scores that were broken off) stand first in it, as without the stop."""
        before = self.rows()
        place = next((i for i, row in enumerate(before) if int(row[0]) == self.resumed), len(before))
        columns = self.columns() or len(COLUMNS)
        self.replace([*before[:place], *(row[:columns] for row in rows), *before[place:]])

    def rows(self) -> list[list[str]]:
        """The whole rows of the file, also those that somebody has added or changed."""
        text = self.path.read_text("utf-8", errors="replace").replace("\0", "").split("\n")
        rows = [cells_of(line) for line in text[:-1]]
        return [row for row in rows if len(row) >= len(NEEDED) and row[0].isdecimal()]

    def replace(self, rows: Sequence[Sequence[Any]]) -> None:
        """Write the file anew with these rows."""
        names = self.names() if self.columns() else COLUMNS
        replace_file(self.path, as_csv([names, *rows]).encode())


def cut_torn_line(path: Path) -> None:
    """Remove a last line that a kill has cut short: what is appended would continue it."""
    if path.exists() and path.stat().st_size:
        with open(path, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)


def as_csv(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as the text of a CSV file."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()


def build_loggers(run: RunConfig) -> list[Logger]:
    """The CSV file and, unless ``tracking.wandb`` is false, the W&B run of this run folder."""
    loggers: list[Logger] = [MetricsCSV(run.folder / "metrics.csv", run.images_per_step, run.checkpoint.on_error == "continue")]
    return loggers + ([WandbRun(run)] if run.tracking.wandb else [])


def wandb_of(loggers: Iterable[Logger]) -> WandbRun | None:
    """The W&B run among the loggers, if there is one."""
    return next((logger for logger in loggers if isinstance(logger, WandbRun)), None)
