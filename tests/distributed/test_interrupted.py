"""Interruptions of a job: signals, lost ranks, a stuck rank, a full disk."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_transdiff.base.endings import EXIT_REQUEUE, EXIT_STALLED, code_of
from lit_transdiff.checkpoints.format import complete_checkpoints
from lit_transdiff.config import RunConfig
from lit_transdiff.config.loading import save_yaml
from tests.helpers.forks import PROGRAM, forked, run_forked
from tests.helpers.processes import (
    LONG,
    TRAIN,
    assert_same_weights,
    background,
    children,
    command_line,
    numbers,
    run_in,
    steps_logged,
    until,
    values,
)
from tests.helpers.small import small_run


@pytest.mark.slow
def test_a_signal_saves_and_asks_for_a_requeue(tmp_path: Path):
    """Like SLURM's ``--signal``: the process gets the signal, saves out of schedule, and sets its exit
    code.
    """
    run, file = run_in(tmp_path, "run", checkpoint_every=10_000)
    process, number = forked(1, PROGRAM, "train", file, log=tmp_path / "log"), signal.SIGUSR1
    until(steps_logged(run), process)
    process.send_signal(number)
    asked = time.monotonic()
    assert process.wait(60) == code_of(number) == EXIT_REQUEUE
    assert time.monotonic() - asked < 20
    (checkpoint,) = complete_checkpoints(run.folder / "checkpoints")
    text = (tmp_path / "log").read_text()
    assert f"asked to stop ({number.name}): the checkpoint of step {checkpoint.step} is complete" in text
    assert f"continuing from {checkpoint.folder}" in run_forked(1, PROGRAM, "train", file)
    assert len(values(run.folder)) == 20


@pytest.mark.slow
def test_one_signalled_rank_of_two_stops_both(tmp_path: Path):
    """Lightning's own handling hangs here; both ranks save together and end with 75."""
    run, file = run_in(tmp_path, "run", checkpoint_every=10_000)
    process = forked(2, PROGRAM, "train", file, log=tmp_path / "log")
    until(steps_logged(run), process)
    os.kill(children(process.pid)[-1], signal.SIGTERM)
    assert process.wait(60) != 0
    text = (tmp_path / "log").read_text()
    assert len(complete_checkpoints(run.folder / "checkpoints")) == 1
    assert "asked to stop (another rank was asked)" in text and "asked to stop (SIGTERM)" in text
    assert len(re.findall(rf"exitcode\s*: {EXIT_REQUEUE}", text)) >= 1


def run_with_workers(folder: Path, name: str) -> tuple[RunConfig, str]:
    """A run of 60 steps with data workers, and its file."""
    rhythm = {
        "max_steps": 60,
        "checkpoint_every": 1000,
        "log_every": 7,
        "validate_every": 0,
        "sample_every": 0,
    }
    run = small_run(folder, name=name, training=rhythm, data={"num_workers": 2})
    save_yaml(run, folder / f"{name}.yaml")
    return run, str(folder / f"{name}.yaml")


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], RunConfig]:
    """The run that no signal reached, on a number of processes; made once."""
    folder = tmp_path_factory.mktemp("untouched")

    def of(processes: int) -> RunConfig:
        run, file = run_with_workers(folder, f"on-{processes}")
        if not run.folder.exists():
            run_forked(processes, PROGRAM, "train", file)
        return run

    return of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "processes"), [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGTERM, 2)]
)
def test_a_signal_to_all_processes_of_a_run_leaves_no_trace(
    tmp_path: Path, untouched: Callable[[int], RunConfig], number: signal.Signals, processes: int
):
    """As from a terminal or torchrun: data workers get it too, in the middle of a metrics window."""
    run, file = run_with_workers(tmp_path, "run")
    process = background(command_line(processes, *TRAIN, file), tmp_path / "log")
    until(steps_logged(run), process)
    os.killpg(process.pid, number)
    code = process.wait(100)
    text = (tmp_path / "log").read_text()
    assert code == code_of(number) if processes == 1 else code != 0, text
    checkpoint = complete_checkpoints(run.folder / "checkpoints")[-1]
    assert f"asked to stop ({number.name}): the checkpoint of step {checkpoint.step} is complete" in text
    run_forked(processes, PROGRAM, "train", file)
    assert numbers(run) == numbers(untouched(processes))


@pytest.mark.slow
def test_torchrun_starts_again_what_lost_a_rank(tmp_path: Path):
    """``--max_restarts``: rank 1 is killed; all start again from the checkpoint within a minute, and end in
    the same bits.
    """
    whole, whole_file = run_in(tmp_path, "whole")
    run_forked(2, PROGRAM, "train", whole_file)
    run, file = run_in(tmp_path, "run")
    process = forked(2, PROGRAM, "train", file, elastic=("--max_restarts", "2"), log=tmp_path / "log")
    until(lambda: complete_checkpoints(run.folder / "checkpoints"), process)
    until(steps_logged(run, 7), process)
    ranks, killed = children(process.pid), time.monotonic()
    os.kill(ranks[-1], signal.SIGKILL)
    until(lambda: (tmp_path / "log").read_text().count("continuing from"), process)
    assert time.monotonic() - killed < 60
    assert process.wait(200) == 0
    text = (tmp_path / "log").read_text()
    assert "local_rank: 1" in text and "exitcode: -9" in text  # the rank is named
    assert values(run.folder) == values(whole.folder)
    assert_same_weights(run, whole)


@pytest.mark.slow
def test_a_stuck_rank_ends_and_says_where(tmp_path: Path):
    """A stopped process makes no step: the other one ends itself, with its samples, instead of waiting for
    half an hour.
    """
    run = small_run(tmp_path, name="run", training=LONG, safety={"stall_seconds": 5.0})
    save_yaml(run, tmp_path / "run.yaml")
    process = forked(2, PROGRAM, "train", str(tmp_path / "run.yaml"), log=tmp_path / "log")
    until(steps_logged(run), process)
    stuck = children(process.pid)[-1]
    os.kill(stuck, signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        until(lambda: "stalled for 5 s" in (tmp_path / "log").read_text(), process, seconds=40)
    finally:
        os.kill(stuck, signal.SIGCONT)
    assert process.wait(60) != 0 and time.monotonic() - stopped < 60
    text = (tmp_path / "log").read_text()
    assert re.search(
        r"rank \d on \S+: stalled for 5 s \(safety\.stall_seconds\) "
        r"while (computing|waiting for the other ranks) in step \d+",
        text,
    )
    assert "fashion-train-" in text and f"exitcode  : {EXIT_STALLED}" in text


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="a small disk needs root")
def test_a_really_full_disk(tmp_path: Path):
    """A disk of 2 MB holds one checkpoint, not two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("this machine does not let root mount")
    try:
        run = small_run(disk, name="run", training={"sample_every": 0})
        save_yaml(run, tmp_path / "run.yaml")
        process = forked(1, PROGRAM, "train", str(tmp_path / "run.yaml"), log=tmp_path / "log")
        code, text = process.wait(120), (tmp_path / "log").read_text()
        assert code == 1 and "no checkpoint could be written" in text, text
        assert [c.step for c in complete_checkpoints(run.folder / "checkpoints")] == [2]
        assert not list((run.folder / "checkpoints").glob("*.partial"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
