"""Waits of a step are watched, work that may take long is not; messages name rank, step and samples."""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lit_transdiff.base.endings import EXIT_STALLED
from lit_transdiff.config.loading import to_dict
from lit_transdiff.data.dataset import PlannedDataset
from lit_transdiff.stages.base import TransDiffStage
from lit_transdiff.training import watchdog
from lit_transdiff.training.callbacks import LogTraining, SampleGrids, StopOnNonFinite
from lit_transdiff.training.checkpointing import Checkpoints
from lit_transdiff.training.preemption import StopOnRequest
from lit_transdiff.training.trainer import train
from tests.helpers.forks import forked
from tests.helpers.small import small_run

WATCHED = [  # what takes long, in which of its calls, and what the watchdog calls it
    (PlannedDataset, "__getitem__", 2, "waiting for data"),
    (StopOnRequest, "any_rank", 2, "waiting for the other ranks"),
    (TransDiffStage, "objective", 2, "computing"),
    (StopOnNonFinite, "look", 3, "finishing"),  # the second is part of a save
    (LogTraining, "metrics", 2, "finishing"),
]
PATIENT = [(SampleGrids, "draw"), (Checkpoints, "save"), (TransDiffStage, "validation_step")]


def make_slow(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int = 2) -> list[float]:
    """That call takes long; the list holds the times of the calls."""
    original, calls = getattr(owner, name), []

    def slow(*arguments: Any, **named: Any) -> Any:
        calls.append(time.monotonic())
        time.sleep(3.0 if len(calls) == call else 0.0)
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, slow)
    return calls


@pytest.fixture()
def endings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The codes with which the watchdog would have ended this process."""
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        raise SystemExit  # of the watchdog's thread

    monkeypatch.setattr(watchdog.os, "_exit", end)
    return codes


def slow_run(folder: Path) -> Any:
    training = {"log_every": 2, "checkpoint_every": 2, "sample_every": 2, "validate_every": 2}
    return small_run(folder, training=training, safety={"stall_seconds": 1.0})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("owner, name, call, what", WATCHED)
def test_every_wait_of_a_step_is_watched(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    endings: list[int],
    owner: type,
    name: str,
    call: int,
    what: str,
):
    calls = make_slow(monkeypatch, owner, name, call)
    train(slow_run(tmp_path), lambda text: None)
    assert len(calls) >= call and endings == [EXIT_STALLED]
    said = capfd.readouterr().err
    assert re.search(
        rf"rank 0 on \S+: stalled for 1 s \(safety\.stall_seconds\) while {what} in step \d", said
    ), said
    assert "fashion-train-" in said


@pytest.mark.slow
@pytest.mark.parametrize("owner, name", PATIENT)
def test_what_may_take_long_is_not_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endings: list[int], owner: type, name: str
):
    calls = make_slow(monkeypatch, owner, name)
    train(slow_run(tmp_path), lambda text: None)
    assert len(calls) > 1 and endings == []


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()], ids=repr
)
def test_a_worker_lost_while_it_hands_over_a_batch_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: Exception
):
    original, calls = PlannedDataset.__getitem__, []

    def break_at_the_third(self: PlannedDataset, i: int) -> Any:
        calls.append(i)
        if len(calls) == 3:
            raise error
        return original(self, i)

    monkeypatch.setattr(PlannedDataset, "__getitem__", break_at_the_third)
    with pytest.raises(type(error)):
        train(small_run(tmp_path), lambda text: None)
    assert re.search(
        r"rank 0 on \S+: lost a data worker while waiting for data in step 3\. Samples .*\.tar/",
        capfd.readouterr().err,
    )


@pytest.mark.slow
def test_a_stuck_data_worker_is_named(tmp_path: Path):
    """One of two workers stops for ever; the process says which samples it waits for and ends."""
    run = small_run(
        tmp_path, data={"num_workers": 2}, safety={"stall_seconds": 8.0}, training={"max_steps": 100}
    )
    file = tmp_path / "run.json"
    file.write_text(json.dumps(to_dict(run)))
    process = forked(1, "tests.helpers.killed", str(file), "stuck", "4", "0", log=tmp_path / "log")
    try:
        assert process.wait(200) == EXIT_STALLED
    finally:
        os.kill(int(file.with_suffix(".pid").read_text()), signal.SIGKILL)
    text = (tmp_path / "log").read_text()
    stalled = re.search(
        r"rank 0 on \S+: stalled for 8 s .* while waiting for data in step (\d+).*fashion-train-", text
    )
    assert stalled is not None and 4 < int(stalled[1]) < 20, text
