"""``lit-transdiff init``: the package works without changes, and no file is overwritten."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from lit_transdiff.__main__ import main
from tests.helpers.small import ROOT


def start(folder: Path, *command: str) -> str:
    """The output of a command in a folder; its exit code must be 0."""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}


@pytest.mark.usefixtures("fresh_tables")
def test_the_package_is_written_under_its_name_and_its_recipe_is_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "my_ideas"]) == 0
    files = {
        str(path.relative_to(tmp_path / "my_ideas"))
        for path in (tmp_path / "my_ideas").rglob("*")
        if path.is_file()
    }
    assert files == {
        *("README.md", "pyproject.toml", "recipe.yaml", "sweep.yaml", "notebook.ipynb"),
        *("my_ideas/__init__.py", "my_ideas/ideas.py", "tests/test_ideas.py"),
    }
    assert not any("my_lab" in (tmp_path / "my_ideas" / file).read_text() for file in files)
    monkeypatch.chdir(tmp_path / "my_ideas")
    assert main(["train", "recipe.yaml", "--dry-run"]) == 0
    assert "my_ideas.ideas" in capsys.readouterr().out and not (tmp_path / "my_ideas" / "runs").exists()


@pytest.mark.parametrize(
    "folder, allowed",
    [("my-lab", "/my_lab."), ("3d", "/d."), ("random", "a Python module can have"), ("full", "or is empty")],
)
def test_a_folder_that_cannot_be_is_refused(tmp_path: Path, capsys, folder: str, allowed: str):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert main(["init", str(tmp_path / folder)]) == 2
    error = capsys.readouterr().err
    assert allowed in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "thesis.txt"]


@pytest.mark.slow
def test_everything_in_it_works(tmp_path: Path):
    folder = tmp_path / "my_ideas"
    assert main(["init", str(folder)]) == 0
    assert "3 passed" in start(folder, "pytest", "-q")
    start(folder, "lit_transdiff", "train", "recipe.yaml", "training.max_steps=4", "optimizer.warmup_steps=1")
    start(folder, "lit_transdiff", "sweep", "sweep.yaml")
    scores = [
        json.loads(file.read_text())["scores"]
        for file in (folder / "runs/sweeps/my_ideas").rglob("evaluations/*.json")
    ]
    assert len(scores) == 3 and all("class_accuracy" in found for found in scores)
    book = nbformat.read(folder / "notebook.ipynb", as_version=4)
    NotebookClient(
        book, timeout=300, resources={"metadata": {"path": str(folder)}}, env=environment()
    ).execute()
    outputs = [cell["outputs"][-1] for cell in book.cells if cell.cell_type == "code" and cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
