"""Reading the logged values of a trial from ``metrics.csv`` or W&B's log in its run folder."""

from __future__ import annotations

import difflib
import math
from pathlib import Path

from lit_transdiff.checkpoints.format import warn_once
from lit_transdiff.study.runs import read_local
from lit_transdiff.study.wandb_logs import log_files, read_log
from lit_transdiff.sweep.definition import Sweep
from lit_transdiff.sweep.trial import Trial
from lit_transdiff.tracking.metrics_file import changed_in_words, read_lines


def logged_values(folder: Path, metric: str) -> list[float]:
    """The values of ``metric`` in the order logged, NaN for any that is not a number."""
    file, logs = folder / "metrics.csv", folder / "wandb"
    if file.is_file():
        rows = (row for row in rows_of(file) if row.get("metric") == metric and row.get("value"))
        return [as_number(row["value"]) for row in rows]
    return values_in_log(logs, metric) if logs.is_dir() else []


def rows_of(file: Path) -> list[dict[str, str]]:
    """The rows of a ``metrics.csv``, possibly of another program; changed lines give one warning."""
    lines = read_lines(file)
    if lines.changed:
        warn_once(changed_in_words(file, lines.changed))
    return [dict(zip(lines.names, cells, strict=True)) for cells in lines.cells.values()]


def values_in_log(folder: Path, metric: str) -> list[float]:
    """The values of ``metric`` in W&B's files; empty if they are not readable, as just after the start."""
    try:
        runs = [read_log(files) for files in log_files(folder)[:1]]
    except ValueError:
        return []
    values: list[float] = []
    for run in runs:
        history, last = run.history(), run.summary.get(metric)
        values += [as_number(value) for value in history[metric].dropna()] if metric in history else []
        ends_in_nan = bool(values) and math.isnan(values[-1])
        if last is not None and not math.isfinite(as_number(last)) and not ends_in_nan:
            values.append(math.nan)  # in the history, NaN looks like a step without a value
    return values


def as_number(value: object) -> float:
    """A logged value as a float; NaN for text."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def logged_names(folder: Path) -> list[str]:
    """The names of the metrics that a trial has logged."""
    file = folder / "metrics.csv"
    if file.is_file():
        return sorted({row["metric"] for row in rows_of(file) if row.get("metric")})
    try:
        return sorted({name for run in read_local(folder) for name in run.summary})
    except FileNotFoundError:
        return []


def no_value(trial: Trial, folder: Path, sweep: Sweep) -> str | None:
    """The reason why a finished trial has no usable value of the sweep's metric, else None."""
    if sweep.metric is None or trial.finite():
        return None
    if trial.values:
        return f"the trial has logged no finite value of {sweep.metric!r}"
    names = logged_names(folder)
    near = difflib.get_close_matches(sweep.metric, names, n=3, cutoff=0.3) or names
    return f"the trial has not logged {sweep.metric!r}, but {', '.join(near) or 'no metric at all'}"
