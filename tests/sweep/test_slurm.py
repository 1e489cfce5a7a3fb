"""Sweeps whose trials are jobs of several nodes, on a SLURM of our own: preempted, lost, left and found."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_transdiff.__main__ import main
from lit_transdiff.base.endings import Preempted
from lit_transdiff.sweep import controller, slurm
from lit_transdiff.sweep.controller import run_sweep
from lit_transdiff.sweep.file import load_sweep
from lit_transdiff.sweep.journal import SweepJournal
from lit_transdiff.sweep.launching import LauncherConfig
from lit_transdiff.sweep.trial import Trial
from tests.helpers.slurm_stub import Slurm
from tests.helpers.small import ROOT
from tests.helpers.sweeps import train_command, write_recipe

# Each rank writes its number down; the first logs six values, going on where it was. SIGTERM: exit code 75.
PROGRAM = """
import os, signal, sys, time
settings, asked = dict(word.split("=") for word in sys.argv[1:]), []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
rank, folder = int(os.environ["SLURM_PROCID"]), os.environ["WANDB_DIR"]
file = os.path.join(folder, "metrics.csv")
rows = open(file).readlines() if os.path.exists(file) else []
if rank == 0 and not rows:
    open(file, "w").write("step,images_seen,seconds,metric,value\\n")
open(os.path.join(folder, f"rank-{rank}-of-{os.environ['SLURM_NTASKS']}"), "a").write("start\\n")
for step in range(max(len(rows) - 1, 0), 6):
    if rank == 0:
        open(file, "a").write(f"{step},{step},{step},loss,{float(settings['x']) + 1 / (step + 1)}\\n")
    time.sleep(float(settings["pace"]))
    while settings["x"] == "5" and step == 5 and not asked:  # until it is stopped
        time.sleep(0.05)
    if asked:
        sys.exit(75)
sys.exit(3 if settings["x"] == "7" else 0)
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    made = Slurm(tmp_path)
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    yield made
    made.end()


def write_sweep(folder: Path, pace: float = 0.0, x: object = (3, 1, 2), **changes: Any) -> Path:
    (folder / "program.py").write_text(PROGRAM)
    launcher = {"kind": "slurm", "nodes": 2, "poll_seconds": 0.1, **changes.pop("launcher", {})}
    settings: dict[str, Any] = {
        "name": "small",
        "method": "grid",
        "metric": {"name": "loss", "goal": "minimize"},
        "parameters": {"x": {"values": list(x)}, "pace": {"value": pace}},  # type: ignore[call-overload]
        "command": ["${interpreter}", "-SE", str(folder / "program.py"), "${args_no_hyphens}"],
        "launcher": launcher,
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(settings | changes))
    return folder / "small.yaml"


def run(file: Path, said: list[str] | None = None, **options: Any) -> list[Trial]:
    told = [] if said is None else said
    return run_sweep(load_sweep(file), file.parent / "out", say=told.append, **options)


def stopped_with(file: Path, say: Any) -> int:
    """The exit code of a sweep that is asked to stop, which then is gone with its lock on the folder."""
    try:
        run_sweep(load_sweep(file), file.parent / "out", say=say)
    except Preempted as error:
        return error.code
    return 0


def outcomes(trials: list[Trial]) -> list[tuple[str, int]]:
    return [(trial.state, len(trial.values)) for trial in trials]


def in_background(stub: Slurm, deed: Any, ready: bool = False) -> threading.Thread:
    """Do something to the first job once it has logged, while the controller runs."""

    def when_logging() -> None:
        out = stub.state.parent / "out"
        stub.until(lambda: any("loss" in file.read_text() for file in out.glob("*/metrics.csv")), 400)
        stub.until(lambda: list(out.glob("*/rank-1-*")) or ready)
        deed()

    thread = threading.Thread(target=when_logging)
    thread.start()
    return thread


def test_every_trial_is_a_job_of_its_nodes(stub: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")  # the controller may run in a job of its own
    extra = {
        "tasks_per_node": 1,
        "time": "1:00:00",
        "partition": "gpu",
        "sbatch": ["--qos=high"],
        "parallel": 2,
    }
    said: list[str] = []
    trials = run(write_sweep(tmp_path, pace=0.05, launcher=extra), said)
    assert outcomes(trials) == [("finished", 6)] * 3
    jobs, out = stub.jobs(), tmp_path / "out"
    assert [job["name"] for job in jobs] == [f"small-{trial.id}" for trial in trials]
    assert all(
        (job["state"], job["nodes"], job["tasks"], job["inside"]) == ("COMPLETED", 2, 2, []) for job in jobs
    )
    wanted = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--time=1:00:00", "--partition=gpu"]
    for word in (*wanted, "--qos=high", "--requeue", "--signal=USR1@180", "--open-mode=append"):
        assert word in jobs[0]["words"], word
    for trial in trials:
        assert (out / "logs" / f"{trial.id}.log").exists()
        assert len(list(out.glob(f"*-{trial.id}/rank-*-of-2"))) == 2
    kinds = [text.split()[0] for text in said]
    assert kinds[:2] == ["start", "start"] and kinds[2] == "finished"  # two at once, not three
    assert run(tmp_path / "small.yaml") == trials and len(stub.jobs()) == 3  # all done: nothing is started


def test_a_preempted_trial_returns_to_the_queue_and_goes_on(stub: Slurm, tmp_path: Path) -> None:
    file = write_sweep(tmp_path, pace=0.3, x=[1])
    thread = in_background(stub, lambda: stub.preempt(1000))
    trials = run(file)
    thread.join()
    (job,) = stub.jobs()
    assert outcomes(trials) == [("finished", 6)] and (job["state"], job["restarts"]) == ("COMPLETED", 1)
    (ranks,) = {file.read_text() for file in (tmp_path / "out").glob("*/rank-*")}
    assert ranks == "start\nstart\n"


@pytest.mark.parametrize("memory", ["accounts", "scheduler", "nobody"])
def test_a_lost_job_is_submitted_again(stub: Slurm, tmp_path: Path, memory: str) -> None:
    """Its node has failed: the accounts know it, or the scheduler still does, or nobody."""
    stub.switch("no_accounts", memory != "accounts")
    stub.switch("remember", memory == "scheduler")
    said: list[str] = []
    file = write_sweep(tmp_path, pace=0.2, x=[1])
    thread = in_background(stub, lambda: stub.fail_node(1000, forget=memory == "nobody"))
    trials = run(file, said)
    thread.join()
    assert outcomes(trials) == [("finished", 6)] and trials[0].failures == 0
    assert [job["state"] for job in stub.jobs()][-1] == "COMPLETED" and said[1].startswith("again")
    assert ("has gone" if memory == "nobody" else "NODE_FAIL") in said[1]


def test_a_trial_that_is_lost_again_and_again_has_failed(
    stub: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller, "TIMES_LOST", 2)
    said: list[str] = []
    file = write_sweep(tmp_path, x=[1])
    (tmp_path / "program.py").write_text("import sys; sys.exit(76)")  # stalled, as after the loss of a node
    (trial,) = run(file, said)
    assert trial.state == "failed" and [text.split()[0] for text in said] == ["start", "again"] * 2 + [
        "start",
        "failed",
    ]
    assert "it has stalled: see" in said[-1]


def test_failed_trials_are_tried_again_as_the_file_says(stub: Slurm, tmp_path: Path) -> None:
    file = write_sweep(tmp_path, x=[1, 7], launcher={"retries": 1})
    said: list[str] = []
    trials = run(file, said)
    assert [(trial.state, trial.failures) for trial in trials] == [("finished", 0), ("failed", 2)]
    assert sum("exit status 3" in text for text in said) == 2 and len(stub.jobs()) == 3
    (tmp_path / "program.py").write_text(PROGRAM.replace("3 if", "0 if"))
    assert [trial.state for trial in run(file, tries=3)] == ["finished"] * 2


def test_a_job_that_its_user_cancels_has_failed(stub: Slurm, tmp_path: Path) -> None:
    said: list[str] = []
    file = write_sweep(tmp_path, pace=0.3, x=[1])
    thread = in_background(stub, lambda: os.system("scancel 1000"))
    (trial,) = run(file, said)
    thread.join()
    assert trial.state == "failed" and "job 1000 ended as CANCELLED by 1000: see" in said[-1]


def test_jobs_go_on_without_their_controller_and_are_found_again(stub: Slurm, tmp_path: Path) -> None:
    """Ctrl-C leaves them in the queue. One waits, one runs, one ends before the next controller."""
    file = write_sweep(tmp_path, pace=0.05)
    stub.switch("hold")
    said: list[str] = []

    def until_three(text: str) -> None:
        said.append(text)
        if len(stub.jobs()) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    assert stopped_with(file, until_three) == 130 and said[-1].endswith("to end: scancel 1000 1001 1002")
    assert [job["state"] for job in stub.jobs()] == ["PENDING"] * 3
    stub.switch("hold", False)
    stub.until(lambda: stub.jobs()[0]["state"] == "COMPLETED")
    said.clear()
    trials = run(file, said)
    assert outcomes(trials) == [("finished", 6)] * 3 and len(stub.jobs()) == 3
    assert [text.split()[0] for text in said[:3]] == ["found"] * 3


@pytest.mark.parametrize("ended", [False, True])
def test_a_job_is_found_whose_number_was_never_written_down(
    stub: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    """The controller is killed between the submission and the line in its journal."""
    file = write_sweep(tmp_path, pace=0.0 if ended else 0.2, x=[1])
    write = SweepJournal.write

    def die(self: SweepJournal, event: str, **content: object) -> None:
        if event == "process":
            raise KeyboardInterrupt
        write(self, event, **content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SweepJournal, "write", die)
        run(file)
    stub.until(lambda: stub.jobs()[0]["state"] == ("COMPLETED" if ended else "RUNNING"))
    assert outcomes(run(file)) == [("finished", 6)] and len(stub.jobs()) == 1


def test_hyperband_ends_a_job_for_good(stub: Slurm, tmp_path: Path) -> None:
    """Its ranks save and end with 75, and the job does not return to the queue."""
    file = write_sweep(tmp_path, x=[1, 5], early_terminate={"type": "hyperband", "min_iter": 2, "eta": 3})
    trials = run(file)
    assert [trial.state for trial in trials] == ["finished", "stopped"] and len(trials[1].values) >= 2
    assert [(job["restarts"], job["code"]) for job in stub.jobs()] == [(0, 0), (0, 75)]


def test_a_scheduler_that_does_not_answer_loses_no_trial(
    stub: Slurm, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_sweep(tmp_path, pace=0.1, x=[1, 2], launcher={"parallel": 1})

    def out_of_order() -> None:
        stub.switch("down")
        stub.until(lambda: caplog.text.count("SLURM does not answer") >= 3)
        stub.switch("full")
        stub.switch("down", False)
        stub.until(lambda: "QOSMaxSubmitJobPerUserLimit" in caplog.text)
        stub.switch("full", False)

    thread = in_background(stub, out_of_order)
    trials = run(file)
    thread.join()
    assert outcomes(trials) == [("finished", 6)] * 2 and len(stub.jobs()) == 2


def test_what_slurm_refuses_is_told_at_once(stub: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = write_sweep(tmp_path)
    words = ["sweep", str(file), "--output", str(tmp_path / "out")]
    assert main([*words, "--partition", "nowhere"]) == 2
    told = "sbatch refuses the trial: sbatch: error: invalid partition specified: nowhere"
    assert told in capsys.readouterr().err
    assert main([*words, "--launcher", "local", "--nodes", "3"]) == 2
    assert "--nodes: got 3; allowed: only with --launcher slurm." in capsys.readouterr().err
    assert main([*words, "--devices-per-run", "2"]) == 2
    assert "--devices-per-run: got 2; allowed: 1 with --launcher slurm" in capsys.readouterr().err


def test_slurm_without_its_commands_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda tool: None)
    with pytest.raises(
        ValueError, match="launcher: got 'slurm'; allowed: local, as no sbatch is on the PATH"
    ):
        run(write_sweep(tmp_path))


@pytest.mark.parametrize(
    "given, told",
    [
        ({"kind": "pbs"}, "launcher.kind: got 'pbs'; allowed: local, slurm"),
        ({"nodes": 0}, "launcher.nodes: got 0; allowed: at least 1"),
        ({"node": 1}, "launcher: 'node' is not known. Did you mean 'nodes'?"),
        (
            {"time": "a day"},
            "launcher.time: got 'a day'; allowed: minutes, hours:minutes:seconds or days-hours",
        ),
        ({"partition": "a b"}, "launcher.partition: got 'a b'; allowed: a word"),
        ({"sbatch": ["qos"]}, "launcher.sbatch: got 'qos'; allowed: options of sbatch"),
        ({"poll_seconds": 0}, "launcher.poll_seconds: got 0.0; allowed: 0.1 to 3600"),
        ([], "launcher: got []; allowed: settings"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, given: Any, told: str) -> None:
    file = write_sweep(tmp_path)
    content = yaml.safe_load(file.read_text()) | {"launcher": given}
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError) as refused:
        load_sweep(file)
    assert str(refused.value).startswith(f"{file}: {told}"), refused.value


def test_every_setting_is_in_the_documentation() -> None:
    page = (ROOT / "docs" / "tracking.md").read_text().split("### On SLURM")[1].split("| sweep |")[0]
    for setting in fields(LauncherConfig):
        assert re.search(rf"(`|[{{ ]){setting.name}(`|:)", page), setting.name


def test_the_launcher_may_change_between_calls(stub: Slurm, tmp_path: Path) -> None:
    trials = run(write_sweep(tmp_path, x=[1]))
    assert run(write_sweep(tmp_path, x=[1], launcher={"time": "30"})) == trials


@pytest.mark.slow
def test_trials_of_two_ranks_train_on_after_a_preemption(
    stub: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes of one rank each: the ranks save together, the job returns, and the run goes on."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(slurm, "LAST_RANK", 60)
    words = ["training.max_steps=40", "training.log_every=2", "training.checkpoint_every=1000"]
    command = train_command(
        write_recipe(tmp_path), *words, "training.global_batch_size=8", "tracking.wandb=false"
    )
    file = write_sweep(
        tmp_path,
        command=command[1:],
        parameters={"optimizer": {"parameters": {"lr": {"values": [0.001]}}}},
        metric={"name": "train/loss", "goal": "minimize"},
        launcher={"gpus_per_node": 0, "poll_seconds": 1},
    )
    for name, value in {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    thread = in_background(stub, lambda: stub.preempt(1000), ready=True)
    trials = run(file)
    thread.join()
    (job,), (log,) = stub.jobs(), (tmp_path / "out" / "logs").glob("*.log")
    assert outcomes(trials) == [("finished", 20)] and job["restarts"] == 1, log.read_text()
    assert "continuing from" in log.read_text() and "2 device(s)" in log.read_text()
    (export,) = (tmp_path / "out").glob("*/export/export.json")
    assert json.loads(export.read_text())["step"] == 40
