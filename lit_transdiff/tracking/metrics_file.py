"""What the files of a run folder say of its metrics and its starts; what is damaged is left out with a warning."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_transdiff.base.files import Damaged
from lit_transdiff.checkpoints.version import read_versioned

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("step", "images_seen", "seconds", "metric", "value", "start")  # of metrics.csv; earlier versions wrote no start
log = logging.getLogger(__name__)


def json_content(file: Path) -> Any:
    """What a JSON file holds; nothing, with a warning when there is a file, where it is damaged."""
    try:
        return read_versioned(file) if file.is_file() else None
    except Damaged as error:
        log.warning("%s It is left out.", error)
        return None


def devices_of_starts(folder: Path) -> list[int]:
    """Processes of each start of the run, on all nodes; each had one device."""
    return [start.get("num_processes", 1) for start in json_content(folder / "environment.json") or []] or [1]


def device_count(folder: Path) -> int:
    """Processes of the run's last start, on all nodes; each had one device."""
    return devices_of_starts(folder)[-1]


def read_rows(file: Path) -> pd.DataFrame:
    """The rows of ``metrics.csv`` with its ``COLUMNS``; lines that are cut or damaged are left out with a warning.

    Where the file does not say which start of the run wrote a row, a clock that goes back begins another.
    """
    import pandas as pd

    with_values = list(COLUMNS[:-1])
    text = file.read_text(errors="replace") if file.is_file() else ",".join(COLUMNS) + "\n"
    lines = list(csv.reader(text.splitlines()))
    head = lines[0] if lines else []
    if not set(with_values) <= set(head):
        log.warning("%s does not begin with %s and is left out.", file, ",".join(with_values))
        return pd.DataFrame(columns=list(COLUMNS), dtype=float)
    complete = lines[1:] if text.endswith("\n") else lines[1:-1]  # what a kill cut short has no end
    whole = [line + [""] * (len(head) - len(line)) for line in complete if len(with_values) <= len(line) <= len(head)]
    rows = pd.DataFrame(whole, columns=head)
    words = rows["value"].str.lower() if len(rows) else rows["value"]
    numeric = [name for name in head if name != "metric"]
    rows[numeric] = rows[numeric].apply(pd.to_numeric, errors="coerce")
    rows = rows[rows[["step", "images_seen", "seconds"]].notna().all(axis=1) & (rows["value"].notna() | (words == "nan"))]
    if len(rows) < len(lines) - 1:
        log.warning("%s: %d of its %d lines are damaged and are left out.", file, len(lines) - 1 - len(rows), len(lines) - 1)
    rows = rows.astype({"step": int, "images_seen": int}).reset_index(drop=True)
    start = rows["start"].ffill().fillna(0) if "start" in head else (rows["seconds"].diff() < 0).cumsum()
    return rows.assign(start=start)


def last_logged(rows: pd.DataFrame) -> dict[str, float]:
    """The last logged value of each metric, also where it is not a number."""
    last = rows.drop_duplicates("metric", keep="last")
    return {str(name): float(value) for name, value in zip(last["metric"], last["value"], strict=True)}
