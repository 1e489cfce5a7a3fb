"""A copy of a run folder becomes a separate W&B run; a renamed or moved folder keeps its run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from lit_transdiff.sweep.file import load_sweep
from lit_transdiff.sweep.journal import SweepJournal
from lit_transdiff.tracking.identity import first_id, run_id
from lit_transdiff.tracking.origin import RECORD
from lit_transdiff.tracking.wandb_run import origin_of


def begun(folder: Path) -> str:
    folder.mkdir(parents=True)
    return run_id(folder)


def copied(folder: Path, to: Path) -> Path:
    """Copy like ``cp -a``."""
    return Path(shutil.copytree(folder, to, symlinks=True))


def test_a_copy_is_a_run_of_its_own_and_says_of_which(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    one = begun(tmp_path / "one")
    two = run_id(copied(tmp_path / "one", tmp_path / "two"))
    assert two != one and run_id(tmp_path / "one") == one and run_id(tmp_path / "two") == two
    assert origin_of(tmp_path / "two") == {"copied_from": {"run": one, "folder": str(tmp_path / "one")}}
    assert origin_of(tmp_path / "one") == {} and caplog.text.count("is a copy of") == 1
    three = run_id(copied(tmp_path / "two", tmp_path / "three"))
    assert len({one, two, three}) == 3


@pytest.mark.parametrize("way", ["rename", "parent", "link", "chmod", "numbered anew"])
def test_a_folder_that_moved_keeps_its_run(tmp_path: Path, way: str):
    before, after = tmp_path / "runs" / "one", tmp_path / "storage" / "two"
    one = begun(before)
    after.parent.mkdir()
    if way == "parent":
        (tmp_path / "runs").rename(after.parent / "runs")
        after = after.parent / "runs" / "one"
    elif way == "numbered anew":  # as some network file systems do at each mount
        after = before
        record = json.loads((after / "wandb" / RECORD).read_text())
        (after / "wandb" / RECORD).write_text(json.dumps(record | {"inode": 1, "disk": 1}))
    else:
        before.rename(after)
    if way == "link":
        before.symlink_to(after)
        assert run_id(before) == one
    if way == "chmod":
        (after / "wandb" / "run_id").chmod(0o600)
    assert run_id(after) == run_id(after) == one and origin_of(after) == {}


def test_the_original_keeps_its_run_wherever_its_copies_are(tmp_path: Path):
    one = begun(tmp_path / "one")
    copied(tmp_path / "one", tmp_path / "copy")
    (tmp_path / "one").rename(tmp_path / "old")
    (tmp_path / "copy").rename(tmp_path / "one")  # the copy stands where the original was
    assert run_id(tmp_path / "old") == one and run_id(tmp_path / "one") != one
    copied(tmp_path / "old", tmp_path / "third")
    shutil.rmtree(tmp_path / "old")  # a move to another disk looks the same: never two that write to one run
    assert run_id(tmp_path / "third") != one


def test_hard_links_are_a_copy(tmp_path: Path):
    one = begun(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=os.link)
    assert run_id(tmp_path / "two") != one and run_id(tmp_path / "one") == one


@pytest.mark.parametrize("first", ["one", "two"])
def test_of_folders_of_earlier_versions_the_older_is_the_original(tmp_path: Path, first: str):
    one = begun(tmp_path / "one")
    (tmp_path / "one" / "wandb" / RECORD).unlink()
    copied(tmp_path / "one", tmp_path / "two")
    run_id(tmp_path / first)
    assert run_id(tmp_path / "one") == one and run_id(tmp_path / "two") != one


def test_a_trial_of_a_copied_sweep_is_a_run_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        yaml.safe_dump({"method": "grid", "parameters": {"x": {"value": 1}}, "command": ["true"]})
    )
    sweep = load_sweep(file)
    with SweepJournal(tmp_path / "sweep", sweep, 0).lock:
        pass
    copied(tmp_path / "sweep", tmp_path / "copy")
    (tmp_path / "parameters.yaml").write_text(yaml.safe_dump({"x": {"value": 1}}))
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(tmp_path / "parameters.yaml"))
    monkeypatch.setenv("WANDB_RUN_ID", "0badcafe")
    for name, same in (("copy", False), ("sweep", True), ("copy", False)):
        with SweepJournal(tmp_path / name, sweep, 0).lock:
            pass
        monkeypatch.setenv("LIT_TRANSDIFF_SWEEP_FOLDER", str(tmp_path / name))
        assert (first_id(tmp_path / name / "wandb") == "0badcafe") == same
