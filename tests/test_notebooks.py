"""The notebooks run, and their stored outputs are current."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import nbformat
import pytest
import wandb
from nbclient import NotebookClient

from lit_transdiff.config.loading import load_run
from lit_transdiff.study.folders import read_folder
from lit_transdiff.study.records import AXES
from lit_transdiff.tracking.evaluations import log_result
from lit_transdiff.tracking.wandb_run import WandbRun
from tests.helpers.run_folders import make_run
from tests.helpers.small import ROOT
from tests.helpers.wandb_stub import Stub

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TRAINS = "1_quickstart"  # what training took and found depends on the machine
MAX_KILOBYTES = 1300


def execute(book: Any, *sources: str) -> list[list[Any]]:
    """Execute a notebook as it is, then in the same kernel with other sources of runs; the cells of each
    time.
    """
    first = book.cells
    for source in sources:
        for cell in deepcopy(first):
            cell.id = f"{len(book.cells)}"
            cell.source = re.sub(r"SOURCE = \"\S+\"", f'SOURCE = "{source}"', cell.source)
            book.cells = [*book.cells, cell]
        assert source in "".join(cell.source for cell in book.cells[-len(first) :])
    resources = {"metadata": {"path": str(ROOT / "notebooks")}}
    done = NotebookClient(book, timeout=600, kernel_name="python3", resources=resources).execute().cells
    return [done[start : start + len(first)] for start in range(0, len(done), len(first))]


def texts(cells: list[Any]) -> list[str]:
    """The text of every output but warnings; tables are compared word by word."""
    found = []
    for cell in cells:
        for output in [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]:
            text = output.get("text") or output.get("data", {}).get("text/plain", "")
            found.append(re.sub(r"\s+", " ", text))
    return found


def pictures(cells: list[Any]) -> int:
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_small_and_executed(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    assert path.stat().st_size < MAX_KILOBYTES * 1024
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert pictures(book.cells) >= 3
    assert not any(str(ROOT) in text or "/tmp/" in text for text in texts(book.cells))


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Runs of none of the shipped sweeps: run folders as the pipeline leaves them,
    and the same ones at W&B.
    """
    folders = [make_run(tmp_path / "runs", f"one{seed}", 2.0 + seed, seed=seed) for seed in (0, 1)]
    changes = {"stage": "mrar_finetune", "init_from": str(folders[0]), "model": {"num_references": 4}}
    folders.append(make_run(tmp_path / "runs", "four", 3.0, **changes))
    with Stub() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        for folder, found in zip(folders, map(read_folder, folders), strict=True):
            run = load_run(folder / "config.yaml", ["tracking.wandb=true", "tracking.project=p"])
            log = WandbRun(run)
            for _, row in found.history().iterrows():
                log.log_metrics(row.dropna().drop(list(AXES)).to_dict(), int(row["step"]))
            for step, picture in found.samples().items():
                log.log_picture("samples", picture, step)
            log_result(
                log,
                {
                    **json.loads((folder / "evaluations/r.json").read_text()),
                    "file": folder / "evaluations/r.json",
                },
                6,
            )
            log.finish()
        yield str(tmp_path / "runs"), "team/p"
        assert server.state.unknown == []
    wandb.teardown()


@pytest.fixture
def without_scores(tmp_path: Path) -> str:
    """Two one-step runs that logged their training loss alone."""
    for name, lr in (("a", 1e-3), ("b", 2e-3)):
        folder = make_run(tmp_path / "bare", name, 2.0, lr=lr)
        shutil.rmtree(folder / "evaluations")
        shutil.rmtree(folder / "samples")
        lines = (folder / "metrics.csv").read_text().splitlines(keepends=True)
        (folder / "metrics.csv").write_text(
            "".join(line for line in lines if "val/" not in line and "eval/" not in line)
        )
    return str(tmp_path / "bare")


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem != TRAINS], ids=lambda p: p.stem)
def test_outputs_are_current_and_one_line_makes_them_show_other_runs(
    path: Path, sources: tuple[str, str], without_scores: str
) -> None:
    """Also at W&B; of runs without scores they say what is missing."""
    stored = nbformat.read(path, as_version=4).cells
    now, *others, bare = execute(nbformat.read(path, as_version=4), *sources, without_scores)
    assert texts(now) == texts(stored)
    assert pictures(now) == pictures(stored)
    assert len(others) == 2 and all(pictures(cells) >= 3 for cells in others)
    assert "lit-transdiff evaluate --checkpoint RUN" in " ".join(texts(bare))


@pytest.mark.slow
def test_the_quickstart_trains_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKSTART_OUTPUT", str(tmp_path / "quickstart"))
    (cells,) = execute(nbformat.read(ROOT / "notebooks" / f"{TRAINS}.ipynb", as_version=4))
    assert pictures(cells) >= 3
    assert (tmp_path / "quickstart" / "small" / "export" / "model.safetensors").is_file()
    shutil.rmtree(tmp_path / "quickstart")
