"""Files of a run that a lost machine left empty, truncated or zeroed are detected and named, and the run
continues.
"""

import csv
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_transdiff.__main__ import main
from lit_transdiff.base.files import read_json, replace_file
from lit_transdiff.checkpoints.format import MARKER, TRAINING, complete_checkpoints
from lit_transdiff.config import RunConfig
from lit_transdiff.tracking.identity import run_id
from lit_transdiff.tracking.loggers import MetricsCSV
from lit_transdiff.training.trainer import train
from tests.helpers.small import small_run, without_checksums


def silent(text: str) -> None:
    pass


def half_zeroed(file: Path) -> None:
    """The same size, and the second half is zeros, as after a power cut."""
    size = file.stat().st_size
    with open(file, "rb+") as opened:
        opened.seek(size // 2)
        opened.write(bytes(size - size // 2))


def two_checkpoints(folder: Path) -> RunConfig:
    """A run of which the checkpoints of steps 4 and 6 are there, and no trained model."""
    run = small_run(folder, checkpoint={"keep_last": 2})
    train(run, silent)
    (run.folder / "export" / "export.json").unlink()
    return run


@pytest.mark.parametrize("name", ["rank-00000.safetensors", TRAINING, MARKER])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = two_checkpoints(tmp_path)
    before = load_file(run.folder / "export" / "model.safetensors")
    last = run.folder / "checkpoints" / "step-00000006"
    if name == MARKER:
        (last / name).write_bytes(b"")
    else:
        half_zeroed(last / name)
    said: list[str] = []
    train(run, said.append)
    assert f"{last / name} is damaged" in caplog.text and "continuing from" in "".join(said)
    assert "step-00000004" in "".join(line for line in said if "continuing from" in line)
    after = load_file(run.folder / "export" / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [c.damaged_file() for c in complete_checkpoints(run.folder / "checkpoints")] == [None, None]


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = two_checkpoints(tmp_path)
    half_zeroed(run.folder / "checkpoints" / "step-00000006" / "rank-00000.safetensors")
    assert main(["export", str(run.folder)]) == 2
    assert "step-00000006/rank-00000.safetensors is damaged" in capsys.readouterr().err


def test_checkpoints_without_checksums_are_read(tmp_path: Path) -> None:
    run = two_checkpoints(tmp_path)
    marker = run.folder / "checkpoints" / "step-00000006" / MARKER
    without_checksums(marker)
    assert train(run, silent).step == 6


def test_a_run_goes_on_beside_empty_small_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = two_checkpoints(tmp_path)
    for name in ("environment.json", "export/export.json", "metrics.csv"):
        (run.folder / name).write_bytes(b"")
    train(run, silent)
    assert (
        len(read_json(run.folder / "environment.json")) == 1
        and read_json(run.folder / "export" / "export.json")["step"] == 6
    )
    assert "environment.json is damaged" in caplog.text and "export.json is damaged" in caplog.text


@pytest.mark.parametrize(
    "content", ["", "step,images_seen,seconds,metric,value\n2,2,0.1,a,1.0\n4,4,0.2", "\0" * 64]
)
def test_metrics_that_were_cut_are_gone_on_with(tmp_path: Path, content: str) -> None:
    log = MetricsCSV(tmp_path / "metrics.csv", images_per_step=1)
    log.path.write_text(content)
    log.drop_after(4)
    log.log_metrics({"a": 3.0}, step=6)
    with open(log.path, newline="") as file:
        found = [(row["step"], row["value"]) for row in csv.DictReader(file)]
    assert found == ([("2", "1.0")] if "a,1.0" in content else []) + [("6", "3.0")]
    log.path.write_bytes(b"")
    log.log_metrics({"a": 3.0}, step=8)
    assert log.path.read_text().startswith("step,")


def test_a_lost_wandb_id_is_that_of_the_local_files(tmp_path: Path) -> None:
    (tmp_path / "wandb" / "offline-run-20260102_030405-0badcafe").mkdir(parents=True)
    (tmp_path / "wandb" / "run-20260103_030405-00c0ffee").mkdir()
    (tmp_path / "wandb" / "run_id").write_bytes(b"")
    assert run_id(tmp_path) == run_id(tmp_path) == "00c0ffee"


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a power failure leaves a name without content."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append("replace"), replace(old, new)))
    replace_file(tmp_path / "file", b"content")
    assert events == ["fsync", "replace", "fsync"] and (tmp_path / "file").read_bytes() == b"content"
    (tmp_path / "file").write_bytes(b"{")
    with pytest.raises(ValueError, match="file is damaged: it holds no JSON"):
        read_json(tmp_path / "file")
