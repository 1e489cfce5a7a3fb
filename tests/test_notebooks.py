"""The notebooks run, and what they show is what they would show now."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.small import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TRAINS = "1_quickstart"  # what training took and found depends on the machine
MAX_KILOBYTES = 900


def execute(path: Path, folder: Path) -> Any:
    """A notebook executed in ``folder``, which stands beside the repository's own."""
    book = nbformat.read(path, as_version=4)
    return NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()


def texts(book: Any) -> list[str]:
    """The text of every output; tables are compared word by word."""
    found = []
    for cell in book.cells:
        for output in cell.get("outputs", []):
            text = output.get("text") or output.get("data", {}).get("text/plain", "")
            found.append(re.sub(r"\s+", " ", text))
    return found


def pictures(book: Any) -> int:
    return sum("image/png" in output.get("data", {}) for cell in book.cells for output in cell.get("outputs", []))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_small_and_executed(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    assert path.stat().st_size < MAX_KILOBYTES * 1024
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert pictures(book) >= 3
    assert not any(str(ROOT) in text or "/tmp/" in text for text in texts(book))


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem != TRAINS], ids=lambda p: p.stem)
def test_outputs_are_current(path: Path) -> None:
    stored, now = nbformat.read(path, as_version=4), execute(path, ROOT / "notebooks")
    assert texts(now) == texts(stored)
    assert pictures(now) == pictures(stored)


@pytest.mark.slow
def test_the_quickstart_trains_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKSTART_OUTPUT", str(tmp_path / "quickstart"))
    book = execute(ROOT / "notebooks" / f"{TRAINS}.ipynb", ROOT / "notebooks")
    assert pictures(book) >= 3 and (tmp_path / "quickstart" / "small" / "export" / "model.safetensors").is_file()
    shutil.rmtree(tmp_path / "quickstart")
