"""W&B servers that do not answer, or answer with an error: waits are bounded, runs go on, and no number is
lost.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lit_transdiff.__main__ import main
from lit_transdiff.config.loading import save_yaml
from lit_transdiff.tracking import server
from lit_transdiff.tracking.artifacts import data_artifact, make
from lit_transdiff.tracking.wandb_run import WandbRun
from tests.helpers.small import FASHION, small_run
from tests.helpers.wandb_runs import TRACKED, rows_of, sync, until
from tests.helpers.wandb_stub import Stub

HANGS = 0  # a server that takes questions and does not answer


def log_steps(log: WandbRun, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.log_metrics({"train/loss": float(step)}, step)


@pytest.mark.slow
@pytest.mark.parametrize("trouble", [HANGS, 401, 500])
def test_a_server_in_trouble_at_the_start_is_gone_without(
    stub: Stub,
    tmp_path: Path,
    trouble: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    stub.server.trouble = trouble
    log, start = WandbRun(small_run(tmp_path, tracking=TRACKED)), time.monotonic()
    log_steps(log, 1, 5)
    log.finish()
    assert time.monotonic() - start < 60 and "This run is recorded offline; later: wandb sync" in caplog.text
    with Stub() as later:
        sync(later, tmp_path / "small")
        assert [row["train/loss"] for row in rows_of(later, "train/loss")] == [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.slow
@pytest.mark.parametrize("trouble", [HANGS, 401, 500])
def test_a_server_that_gets_into_trouble_is_not_waited_for(
    stub: Stub,
    tmp_path: Path,
    trouble: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The client alone would wait for hours, here and again when the process ends."""
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "2")
    monkeypatch.setattr(server, "MARGIN", 4.0)  # its log is on disk every second here
    run = small_run(tmp_path, tracking=TRACKED)
    log = WandbRun(run)
    log_steps(log, 1, 50)
    until(lambda: len(rows_of(stub, "train/loss")) == 50)
    stub.server.trouble = trouble
    start = time.monotonic()
    log_steps(log, 51, 100)
    assert time.monotonic() - start < 2
    log.log_table("scores", ["a"], [[1]], 100)
    make(log, data_artifact(str(FASHION / "train"), {}))
    log.finish()
    assert time.monotonic() - start < 90
    assert "does not answer and skips" in caplog.text
    with Stub() as later:
        sync(later, run.folder)
        assert [row["train/loss"] for row in rows_of(later, "train/loss")] == [
            float(step) for step in range(1, 101)
        ]
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_steps(log, 101, 101)  # another service
    log.finish()


def test_a_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Root may write everywhere; where a file stands in the place of W&B's folder, nobody can."""
    run = small_run(tmp_path, tracking=TRACKED)
    run.folder.mkdir()
    (run.folder / "wandb").write_text("a file")
    save_yaml(run, tmp_path / "run.yaml")
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lit-transdiff:")]
    assert f"{run.folder / 'wandb'}" in line and "tracking.wandb=false" in line
