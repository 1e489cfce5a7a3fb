"""Reading metrics and starts from the files of a run folder; damaged content is skipped with a warning."""

from __future__ import annotations

import csv
import logging
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lit_transdiff.base.files import SEAL, Damaged
from lit_transdiff.checkpoints.version import read_starts
from lit_transdiff.config import some

if TYPE_CHECKING:
    import pandas as pd

NEEDED = ("step", "images_seen", "seconds", "metric", "value")
# The columns of metrics.csv; earlier versions wrote no checksum, and still earlier ones no start.
COLUMNS = (*NEEDED, "start", SEAL)
Content = TypeVar("Content")
log = logging.getLogger(__name__)


def unless_damaged(read: Callable[[Path], Content], file: Path) -> Content | None:
    """The result of ``read`` for a file; None if it does not exist or, with a warning, if it is damaged."""
    try:
        return read(file) if file.is_file() else None
    except Damaged as error:
        log.warning("%s It is left out.", error)
        return None


def devices_of_starts(folder: Path) -> list[int]:
    """The number of processes on all nodes, one device each, for every start of the run."""
    counts = [start.get("num_processes", 1) for start in starts_of(folder)]
    return [count if isinstance(count, int) else 1 for count in counts] or [1]


def starts_of(folder: Path) -> list[dict[str, Any]]:
    """The records of the run's starts."""
    return unless_damaged(read_starts, folder / "environment.json") or []


def device_count(folder: Path) -> int:
    """The number of processes on all nodes, one device each, in the run's last start."""
    return devices_of_starts(folder)[-1]


def row_checksum(cells: Sequence[Any]) -> int:
    """The CRC-32 of the other cells of a row."""
    return zlib.crc32(",".join(map(str, cells)).encode())


@dataclass
class MetricLines:
    """The column names, and the cells of all acceptable lines by line number.

    ``changed`` lines (with a wrong checksum) are excluded; lines without a checksum are included.
    """

    names: list[str]
    cells: dict[int, list[str]]
    changed: list[int]
    without_checksum: list[int]
    torn: list[int]  # the last line, if a kill has truncated it


def read_lines(file: Path) -> MetricLines:
    """Read the lines of ``metrics.csv``."""
    text = file.read_text("utf-8", errors="replace") if file.is_file() else ",".join(COLUMNS) + "\n"
    first, *rest = text.split("\n")
    names = cells_of(first)
    before = names.index(SEAL) if SEAL in names else len(names)
    lines = MetricLines(names, {}, [], [], [len(rest) + 1] if rest and rest[-1] else [])
    for number, line in enumerate(rest[:-1], 2):
        cells = cells_of(line)
        checksum = "".join(cells[before : before + 1])
        intact = checksum in ("", str(row_checksum(cells[:before])))
        if not intact or not len(NEEDED) <= len(cells) <= len(names):
            lines.changed.append(number)
            continue
        lines.cells[number] = cells + [""] * (len(names) - len(cells))
        if not checksum and before < len(names):
            lines.without_checksum.append(number)
    return lines


def cells_of(line: str) -> list[str]:
    """The cells of one line, parsed alone so that a damaged quotation mark cannot swallow the next lines."""
    try:
        return next(csv.reader([line])) if '"' in line else line.split(",")
    except csv.Error:
        return []


def drop_cut_line(file: Path) -> None:
    """Remove a last line truncated by a kill, because the next line would continue it."""
    if file.exists() and file.stat().st_size:
        with open(file, "rb+") as lines:
            lines.seek(-1, os.SEEK_END)
            if lines.read(1) != b"\n":
                lines.seek(0)
                lines.truncate(lines.read().rfind(b"\n") + 1)


def changed_in_words(file: Path, lines: Sequence[int]) -> str:
    told = lines_in_words(lines)
    return f"{file}: damaged or changed, and left out: {told}. If you changed one, empty its {SEAL}."


def lines_in_words(numbers: Sequence[int]) -> str:
    count = f" ({len(numbers)} in all)" if len(numbers) > 3 else ""
    return f"line{'s' * (len(numbers) > 1)} {some(numbers)}{count}"


def read_rows(file: Path) -> pd.DataFrame:
    """The rows of ``metrics.csv`` with its ``COLUMNS``, without truncated and damaged lines (with a warning).

    In a file without the number of the start, a time that goes backwards marks a new start.
    """
    import pandas as pd

    lines = read_lines(file)
    if not set(NEEDED) <= set(lines.names):
        log.warning("%s does not begin with %s and is left out.", file, ",".join(NEEDED))
        return pd.DataFrame(columns=list(COLUMNS), dtype=float)
    if unknown := [name for name in lines.names if name not in COLUMNS]:
        log.warning("%s has columns that are not read: %s.", file, some(unknown))
    rows = pd.DataFrame(lines.cells.values(), list(lines.cells), lines.names)
    words = rows["value"].str.lower() if len(rows) else rows["value"]
    numeric = [name for name in COLUMNS if name in lines.names and name != "metric"]
    rows[numeric] = rows[numeric].apply(pd.to_numeric, errors="coerce")
    complete = rows[["step", "images_seen", "seconds"]].notna().all(axis=1)
    sound = complete & (rows["value"].notna() | (words == "nan"))
    if left_out := sorted([*lines.changed, *rows.index[~sound], *lines.torn]):
        log.warning("%s", changed_in_words(file, left_out))
    if lines.without_checksum:
        log.warning("%s: without a %s, but counted: %s.", file, SEAL, lines_in_words(lines.without_checksum))
    rows = rows[sound].astype({"step": int, "images_seen": int}).reset_index(drop=True)
    start = rows["start"].ffill().fillna(0) if "start" in rows else (rows["seconds"].diff() < 0).cumsum()
    return rows.assign(start=start)


def last_logged(rows: pd.DataFrame) -> dict[str, float]:
    """The last logged value of each metric, even if it is NaN."""
    last = rows.drop_duplicates("metric", keep="last")
    return {str(name): float(value) for name, value in zip(last["metric"], last["value"], strict=True)}
