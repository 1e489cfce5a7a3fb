"""The view of W&B on a run that was killed or preempted, with the real client and our own server."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lit_transdiff.base.endings import EXIT_INTERRUPTED, EXIT_REQUEUE, Preempted
from lit_transdiff.tracking.preempted import mark_preempting
from lit_transdiff.tracking.wandb_run import WandbRun
from lit_transdiff.training.rhythm import StepCallback
from lit_transdiff.training.trainer import train
from tests.helpers.small import small_run
from tests.helpers.wandb_runs import TRACKED, rows_of
from tests.helpers.wandb_stub import Stub


class PowerCut(StepCallback):
    """Ends training after step 5, of which the numbers are logged and the checkpoint is not written."""

    def on_train_batch_end(self, trainer, *rest: object) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("a power cut")


def steps(stub: Stub) -> list[int]:
    return [row["trainer/global_step"] for row in rows_of(stub, "train/loss")]


def test_a_killed_run_is_rewound_to_its_checkpoint(stub: Stub, tmp_path: Path) -> None:
    """Each step is there once, as in metrics.csv."""
    run = small_run(tmp_path, tracking=TRACKED, training={"log_every": 1, "checkpoint_every": 4})
    with pytest.raises(RuntimeError, match="a power cut"):
        train(run, callbacks=[PowerCut()])
    assert steps(stub) == [1, 2, 3, 4, 5]
    train(run)
    assert steps(stub) == [1, 2, 3, 4, 5, 6] and stub.state.operations["RewindRun"] == 1


@pytest.mark.parametrize("rewinds, shown", [(True, [1, 2, 3, 3, 4]), (False, [1, 2, 3, 4, 5, 3, 4])])
def test_a_server_that_does_not_rewind_shows_points_twice(
    stub: Stub, tmp_path: Path, caplog: pytest.LogCaptureFixture, rewinds: bool, shown: list[int]
) -> None:
    """The points of step 3 that came after the checkpoint stay, as they do in metrics.csv."""
    caplog.set_level(logging.INFO, "lit_transdiff")
    stub.state.rewinds = rewinds
    for rewind_to, logged in ((None, (1, 2, 3, 4, 5)), (3, (3, 4))):
        log = WandbRun(small_run(tmp_path, tracking=TRACKED))
        log.rewind_to = rewind_to
        for step in logged:
            log.log_metrics({"train/loss": 1.0}, step)
        log.finish()
    assert steps(stub) == shown and stub.state.only_run()["state"] == "finished"
    assert ("shows later points twice (failed to rewind run" in caplog.text) != rewinds


@pytest.mark.parametrize(
    "code, stopped, state",
    [
        (EXIT_REQUEUE, False, "preempted"),
        (EXIT_REQUEUE, True, "failed"),  # by early termination at the server: it must not come back
        (EXIT_INTERRUPTED, False, "failed"),
    ],
)
def test_a_preempted_run_is_marked(stub: Stub, tmp_path: Path, code: int, stopped: bool, state: str) -> None:
    log = WandbRun(small_run(tmp_path, tracking=TRACKED))
    log.log_metrics({"train/loss": 1.0}, 1)
    stub.state.only_run()["stopped"] = stopped
    mark_preempting(Preempted("asked to stop", code))
    log.finish(1)
    assert stub.state.only_run()["state"] == state


def test_without_a_run_there_is_nothing_to_mark() -> None:
    mark_preempting(Preempted("asked to stop", EXIT_REQUEUE))
