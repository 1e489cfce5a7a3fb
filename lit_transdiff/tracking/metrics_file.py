"""What the files of a run folder say of its metrics and its starts; what is damaged is left out with a warning."""

from __future__ import annotations

import csv
import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lit_transdiff.base.files import SEAL, Damaged
from lit_transdiff.checkpoints.version import read_starts, read_versioned
from lit_transdiff.config import some

if TYPE_CHECKING:
    import pandas as pd

NEEDED = ("step", "images_seen", "seconds", "metric", "value")
COLUMNS = (*NEEDED, "start", SEAL)  # of metrics.csv; earlier versions wrote no checksum, still earlier ones no start
Content = TypeVar("Content")
log = logging.getLogger(__name__)


def json_content(file: Path) -> dict[str, Any] | None:
    """What a JSON file says; nothing, with a warning when there is a file, where it is damaged."""
    return unless_damaged(read_versioned, file)


def unless_damaged(read: Callable[[Path], Content], file: Path) -> Content | None:
    """What ``read`` makes of a file, if there is one; nothing, with a warning, where it is damaged."""
    try:
        return read(file) if file.is_file() else None
    except Damaged as error:
        log.warning("%s It is left out.", error)
        return None


def devices_of_starts(folder: Path) -> list[int]:
    """Processes of each start of the run, on all nodes; each had one device."""
    counts = [start.get("num_processes", 1) for start in starts_of(folder)]
    return [count if isinstance(count, int) else 1 for count in counts] or [1]


def starts_of(folder: Path) -> list[dict[str, Any]]:
    """What is known of each start of the run."""
    return unless_damaged(read_starts, folder / "environment.json") or []


def device_count(folder: Path) -> int:
    """Processes of the run's last start, on all nodes; each had one device."""
    return devices_of_starts(folder)[-1]


def row_checksum(cells: Sequence[Any]) -> int:
    """The CRC-32 of what a row holds beside it."""
    return zlib.crc32(",".join(map(str, cells)).encode())


@dataclass
class MetricLines:
    """The names of the columns, and the cells of the lines that may be what was written, by the numbers of the lines.

    What was ``changed`` is not among them; what has no checksum, in a file that has some, is.
    """

    names: list[str]
    cells: dict[int, list[str]]
    changed: list[int]
    without_checksum: list[int]
    torn: list[int]  # the last line, where a kill has cut it short


def read_lines(file: Path) -> MetricLines:
    """The lines of ``metrics.csv``."""
    first, *rest = file.read_text("utf-8", errors="replace").split("\n") if file.is_file() else [",".join(COLUMNS), ""]
    names = cells_of(first)
    before = names.index(SEAL) if SEAL in names else len(names)
    lines = MetricLines(names, {}, [], [], [len(rest) + 1] if rest and rest[-1] else [])
    for number, line in enumerate(rest[:-1], 2):
        cells = cells_of(line)
        checksum = "".join(cells[before : before + 1])
        if not len(NEEDED) <= len(cells) <= len(names) or checksum not in ("", str(row_checksum(cells[:before]))):
            lines.changed.append(number)
            continue
        lines.cells[number] = cells + [""] * (len(names) - len(cells))
        if not checksum and before < len(names):
            lines.without_checksum.append(number)
    return lines


def cells_of(line: str) -> list[str]:
    """The cells of a line, read alone: a quotation mark that damage has made would take the lines after it with it."""
    try:
        return next(csv.reader([line])) if '"' in line else line.split(",")
    except csv.Error:
        return []


def changed_in_words(file: Path, lines: Sequence[int]) -> str:
    return f"{file}: damaged or changed, and left out: {lines_in_words(lines)}. If you changed one, empty its {SEAL}."


def lines_in_words(numbers: Sequence[int]) -> str:
    return f"line{'s' * (len(numbers) > 1)} {some(numbers)}" + (f" ({len(numbers)} in all)" if len(numbers) > 3 else "")


def read_rows(file: Path) -> pd.DataFrame:
    """The rows of ``metrics.csv`` with its ``COLUMNS``; lines that are cut or damaged are left out with a warning.

    Where the file does not say which start of the run wrote a row, a clock that goes back begins another.
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
    sound = rows[["step", "images_seen", "seconds"]].notna().all(axis=1) & (rows["value"].notna() | (words == "nan"))
    if left_out := sorted([*lines.changed, *rows.index[~sound], *lines.torn]):
        log.warning("%s", changed_in_words(file, left_out))
    if lines.without_checksum:
        log.warning("%s: without a %s, but counted: %s.", file, SEAL, lines_in_words(lines.without_checksum))
    rows = rows[sound].astype({"step": int, "images_seen": int}).reset_index(drop=True)
    start = rows["start"].ffill().fillna(0) if "start" in rows else (rows["seconds"].diff() < 0).cumsum()
    return rows.assign(start=start)


def last_logged(rows: pd.DataFrame) -> dict[str, float]:
    """The last logged value of each metric, also where it is not a number."""
    last = rows.drop_duplicates("metric", keep="last")
    return {str(name): float(value) for name, value in zip(last["metric"], last["value"], strict=True)}
