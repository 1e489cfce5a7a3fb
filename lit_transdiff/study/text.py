"""Tables as text: for a terminal, in blocks of columns that fit its width, and as Markdown."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

WIDTH = 120  # the width of a terminal in characters
LONGEST = 100  # the most characters of a cell in a terminal
GAP = "  "
Cells = Sequence[Sequence[str]]


def markdown(head: Sequence[str], table: Cells) -> str:
    """A Markdown table."""
    lines = [[escaped(cell) for cell in cells] for cells in (head, *table)]
    lines.insert(1, ["---"] * len(head))
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def escaped(text: str) -> str:
    """Escape text for Markdown, so that it creates no HTML, link, code or table column."""
    plain = html.escape(" ".join(text.split()), quote=False)
    return plain.replace("\\", "\\\\").replace("|", "\\|").replace("`", "\\`").replace("](", "]\\(")


def aligned(head: Sequence[str], table: Cells) -> str:
    """A table with aligned columns for a terminal; wider than WIDTH, it becomes blocks with numbered rows."""
    columns = [[shortened(cell) for cell in column] for column in zip(head, *table, strict=True)]
    if wide(columns) <= WIDTH:
        return block(columns)
    number = ["#", *(str(i + 1) for i in range(len(table)))]
    blocks = [[number]]
    for column in columns:
        if wide([*blocks[-1], column]) > WIDTH:
            blocks.append([number])
        blocks[-1].append(column)
    return "\n".join(map(block, blocks))


def shortened(cell: str) -> str:
    """Cut the middle out of a long cell, because names of trials differ at the end."""
    half = (LONGEST - 1) // 2
    return cell if len(cell) <= LONGEST else f"{cell[:half]}…{cell[-half:]}"


def wide(columns: Cells) -> int:
    """The width of a block in characters."""
    return sum(max(map(len, column)) for column in columns) + len(GAP) * (len(columns) - 1)


def block(columns: Cells) -> str:
    """Columns side by side, with a line below their heads."""
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    head, *rows = (GAP.join(cells).rstrip() for cells in zip(*padded, strict=True))
    return "\n".join([head, GAP.join("-" * len(column[0]) for column in padded), *rows]) + "\n"


def frame(table: pd.DataFrame) -> str:
    """Format a data frame for a terminal: by pandas if it fits, otherwise in blocks."""
    text = table.to_string(index=False, float_format=lambda value: f"{value:.4g}")
    if max(map(len, text.splitlines()), default=0) <= WIDTH:
        return text
    cells = [[in_cell(value) for value in row] for row in table.itertuples(index=False)]
    return aligned([str(name) for name in table.columns], cells).rstrip()


def in_cell(value: Any) -> str:
    """The text of a value in a data frame; a dash for a missing value."""
    if isinstance(value, float):
        return "-" if value != value else f"{value:.4g}"
    return str(value)
