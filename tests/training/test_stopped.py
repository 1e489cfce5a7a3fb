"""The numbers of a run that was stopped, at whatever step and by whatever, are those
of a run that never was.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from lit_transdiff.base.endings import EXIT_INTERRUPTED, Preempted, RankFailed
from lit_transdiff.base.locks import FolderLock
from lit_transdiff.checkpoints.format import complete_checkpoints
from lit_transdiff.config import RunConfig
from lit_transdiff.training import first_rank
from lit_transdiff.training.trainer import train
from tests.helpers.small import small_run

RHYTHM = {"max_steps": 14, "log_every": 5, "checkpoint_every": 3, "validate_every": 4, "sample_every": 7}
STAGES: dict[str, dict[str, Any]] = {
    "one-step": {},
    "accumulated": {"training": {"micro_batch_size": 4}},
    "classifier": {"stage": "classifier"},
}


class PowerCut(BaseException):
    """An end of the process without any cleanup."""


def quiet(text: str) -> None:
    pass


def run_in(folder: Path, changes: dict[str, Any]) -> RunConfig:
    return small_run(folder, **{**changes, "training": {**RHYTHM, **changes.get("training", {})}})


def rows(run: RunConfig) -> list[tuple[str, str, str, str]]:
    """Step, images seen, metric and value of each row of the file; rates without their values."""
    lines = [line.split(",") for line in (run.folder / "metrics.csv").read_text().splitlines()]
    return [
        (s, i, name, "" if name.startswith("throughput/") else value) for s, i, _, name, value, *_ in lines
    ]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[tuple[str, ...]]]:
    found: dict[str, list[tuple[str, ...]]] = {}

    def of(kind: str) -> list[tuple[str, ...]]:
        if kind not in found:
            run = run_in(tmp_path_factory.mktemp("whole"), STAGES[kind])
            train(run, say=quiet)
            found[kind] = rows(run)
        return found[kind]

    return of


class At(pl.Callback):
    """Does something in the first forward pass of a step (from 0)."""

    def __init__(self, step: int, what: Callable[[], None]) -> None:
        self.step, self.what = step, what

    def on_train_batch_start(
        self, trainer: pl.Trainer, stage: pl.LightningModule, batch: Any, i: int
    ) -> None:
        if trainer.global_step == self.step:
            self.what()


def cut() -> None:
    raise PowerCut


@pytest.mark.parametrize("kind", STAGES)
def test_a_power_cut_in_mid_window_leaves_no_trace(
    tmp_path: Path, untouched: Callable[[str], list[tuple[str, ...]]], kind: str
) -> None:
    run = run_in(tmp_path, STAGES[kind])
    for step in (4, 8, 13):  # after the checkpoints of steps 3, 6 and 12, each in the middle of a window
        with pytest.raises(PowerCut):
            train(run, say=quiet, callbacks=[At(step, cut)])
        with open(run.folder / "metrics.csv", "a") as file:
            file.write(f"{step},1")  # a row that the cut has torn
    train(run, say=quiet)
    assert rows(run) == untouched(kind)
    logged = [(step, name) for step, _, name, _ in rows(run)]
    validated = "val/accuracy" if kind == "classifier" else "val/loss"
    assert [step for step, name in logged if name == "train/loss"] == ["5", "10"]
    assert [step for step, name in logged if name == validated] == ["4", "8", "12"]


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name
)
def test_a_signal_saves_at_once_and_leaves_no_trace(
    tmp_path: Path, untouched: Callable[[str], list[tuple[str, ...]]], number: signal.Signals
) -> None:
    run = run_in(tmp_path, STAGES["one-step"])
    with pytest.raises(Preempted, match=number.name) as ended:
        train(run, say=quiet, callbacks=[At(7, lambda: os.kill(os.getpid(), number))])
    assert ended.value.code == (EXIT_INTERRUPTED if number == signal.SIGINT else 75)
    assert complete_checkpoints(run.folder / "checkpoints")[-1].step == 8
    train(run, say=quiet)
    assert rows(run) == untouched("one-step")


def test_ranks_soon_leave_when_the_first_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(first_rank, "EXPORT_PATIENCE", 0.05)
    monkeypatch.setattr(first_rank, "EXPORT_POLL", 0.01)
    run = small_run(tmp_path, distributed={"timeout_minutes": 0.005})
    start = time.monotonic()
    with FolderLock(run.folder) as lock:
        lock.take()  # it still writes the model
        with pytest.raises(RankFailed, match=r"small/export: the first rank has not written it"):
            first_rank.wait_for_export(run, 6, FolderLock(run.folder))
    assert time.monotonic() - start > 0.3
    run = small_run(tmp_path)  # half an hour
    with pytest.raises(RankFailed, match="has not written it"):
        first_rank.wait_for_export(run, 6, FolderLock(run.folder))
