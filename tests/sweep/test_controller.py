"""Local sweeps: agents at once, early termination, a kill in the middle, programs of ours and of others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lit_transdiff.__main__ import main
from lit_transdiff.base import locks
from lit_transdiff.base.endings import EXIT_REQUEUE, Preempted, TrialsFailed, code_of
from lit_transdiff.study.runs import runs
from lit_transdiff.study.wandb_logs import log_files, read_log
from lit_transdiff.sweep.controller import run_sweep
from lit_transdiff.sweep.file import load_sweep
from lit_transdiff.sweep.journal import SweepJournal
from lit_transdiff.sweep.local import slots_of
from lit_transdiff.sweep.report import failures, outcome
from lit_transdiff.sweep.values import logged_names, logged_values
from lit_transdiff.tracking.loggers import MetricsCSV
from tests.helpers import forks
from tests.helpers.forks import Forked, forked
from tests.helpers.small import ROOT
from tests.helpers.sweeps import TINY, train_command, write_recipe

# Logs a loss that falls towards x, one value every PACE seconds, into the trial's folder, going on where it
# was.
PROGRAM = """
import csv, os, sys, time
settings = dict(word.split("=") for word in sys.argv[1:])
file = os.path.join(os.environ["WANDB_DIR"], "metrics.csv")
done = sum(1 for _ in open(file)) - 1 if os.path.exists(file) else -1
with open(file, "a") as out:
    if done < 0:
        print("step,images_seen,seconds,metric,value", file=out, flush=True)
    for step in range(max(done, 0), 9):
        print(f"{step},{step},{step},loss,{float(settings['x']) + 1 / (step + 1)}", file=out, flush=True)
        time.sleep(float(settings["pace"]))
if settings["x"] == "7":
    sys.exit(3)
"""


HEAD = "step,images_seen,seconds,metric,value,start\n"


def write_sweep(folder: Path, **changes: object) -> Path:
    (folder / "program.py").write_text(PROGRAM)
    settings: dict[str, object] = {
        "name": "small",
        "method": "grid",
        "metric": {"name": "loss", "goal": "minimize"},
        "parameters": {"x": {"values": [3, 1, 2]}, "pace": {"value": 0.05}},
        "command": ["${env}", "${interpreter}", str(folder / "program.py"), "${args_no_hyphens}"],
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(settings | changes))
    return folder / "sweep.yaml"


def test_a_second_controller_is_told_who_runs_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(locks, "LOCK_PATIENCE", 0.0)
    sweep = load_sweep(write_sweep(tmp_path))
    told = rf"out: another process runs this sweep \(.+, pid {os.getpid()}\)\."
    with SweepJournal(tmp_path / "out", sweep, 0).lock, pytest.raises(ValueError, match=told):
        SweepJournal(tmp_path / "out", sweep, 0)


def journal(folder: Path, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def quiet(text: str) -> None:
    """Nobody listens."""


def test_every_trial_runs_once_and_three_at_once(tmp_path: Path) -> None:
    file = write_sweep(tmp_path)
    trials = run_sweep(load_sweep(file), tmp_path / "out", agents=3, say=quiet)
    events = [
        json.loads(line)["event"] for line in (tmp_path / "out" / "trials.jsonl").read_text().splitlines()
    ]
    assert events == ["start", "process"] * 3 + ["end"] * 3
    assert [trial.state for trial in trials] == ["finished"] * 3
    assert [trial.best(maximize=False) for trial in trials] == pytest.approx(
        [3 + 1 / 9, 1 + 1 / 9, 2 + 1 / 9]
    )
    assert {path.name.rsplit("-", 1)[0] for path in (tmp_path / "out").glob("pace*")} == {
        f"pace_0.05-x_{x}" for x in (1, 2, 3)
    }
    assert run_sweep(load_sweep(file), tmp_path / "out", say=quiet) == trials  # all done: nothing is started
    assert len(journal(tmp_path / "out", "start")) == 3


@pytest.mark.parametrize(
    "gpus, agents, each, slots",
    [
        (0, None, 1, [()]),
        (0, 3, 1, [()] * 3),
        (4, None, 1, [(0,), (1,), (2,), (3,)]),
        (5, None, 2, [(0, 1), (2, 3)]),
        (4, 1, 2, [(0, 1)]),
        (2, 5, 1, [(0,), (1,), (0,), (1,), (0,)]),
    ],
)
def test_trials_share_the_gpus_out(monkeypatch: pytest.MonkeyPatch, gpus, agents, each, slots) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert slots_of(agents, each) == slots


def test_more_gpus_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(ValueError, match="--devices-per-run: got 9; allowed: at most the 4 GPUs"):
        slots_of(None, 9)
    with pytest.raises(ValueError, match="--agents: got 3; allowed: at most 2"):
        slots_of(3, 2)


def test_hyperband_ends_the_poor_ones(tmp_path: Path) -> None:
    file = write_sweep(
        tmp_path,
        parameters={"x": {"values": [1, 2, 3]}, "pace": {"value": 0.4}},
        early_terminate={"type": "hyperband", "min_iter": 2, "eta": 3},
    )
    trials = run_sweep(load_sweep(file), tmp_path / "out", agents=3, say=quiet)
    assert [trial.state for trial in trials] == ["finished", "finished", "stopped"] or trials[
        2
    ].state == "stopped"
    assert trials[0].state == "finished" and 2 <= len(trials[2].values) < 9


def test_a_failure_is_one_trial_and_three_at_the_start_end_the_sweep(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, parameters={"x": {"values": [1, 7]}, "pace": {"value": 0.0}})
    assert [t.state for t in run_sweep(load_sweep(file), tmp_path / "out", say=quiet)] == [
        "finished",
        "failed",
    ]
    file = write_sweep(tmp_path, parameters={"x": {"values": [7, 7, 7, 7]}, "pace": {"value": 0.0}})
    with pytest.raises(
        TrialsFailed, match=r"the first 3 trials all failed.*The same command tries them again"
    ):
        run_sweep(load_sweep(file), tmp_path / "hopeless", say=quiet)
    # what was wrong is put right
    (tmp_path / "program.py").write_text(PROGRAM.replace("sys.exit(3)", "sys.exit(0)"))
    assert [t.state for t in run_sweep(load_sweep(file), tmp_path / "hopeless", say=quiet)] == [
        "finished"
    ] * 4
    assert len(journal(tmp_path / "hopeless", "start")) == 4


# Fails at x = 2 and 3 while the file "broken" exists, having logged what was far better than all else.
BRITTLE = """
import os, pathlib, sys
x = float(dict(word.split("=") for word in sys.argv[1:])["x"])
broken = pathlib.Path(__file__).with_name("broken").exists()
with open(pathlib.Path(__file__).with_name("done"), "a") as done:
    print(f"{x:g}", "failed" if broken and x in (2, 3) else "finished", file=done)
value = -100 if broken and x in (2, 3) else x
HEAD = "step,images_seen,seconds,metric,value,start\\n"
pathlib.Path(os.environ["WANDB_DIR"], "metrics.csv").write_text(HEAD + f"1,8,0,loss,{value},0\\n")
sys.exit(5 if broken and x in (2, 3) else 0)
"""


def test_failed_trials_are_tried_again_and_finished_ones_are_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, place, broken = (
        write_sweep(tmp_path, parameters={"x": {"values": [1, 2, 3, 4]}}),
        tmp_path / "out",
        tmp_path / "broken",
    )
    (tmp_path / "program.py").write_text(BRITTLE)
    broken.touch()
    command = ["sweep", str(file), "--output", str(place)]
    assert main(command) == 1
    told = capsys.readouterr()
    assert "4 trials: 2 finished, 2 failed" in told.out
    assert "2 of 4 trials failed; see" in told.err and told.err.rstrip().endswith(
        "The same command tries them again."
    )
    assert main([*command, "--tries", "2"]) == 1  # the same failure again: each has had its two attempts
    assert "With --tries 3 the same command tries them again." in capsys.readouterr().err
    assert main([*command, "--tries", "2"]) == 1
    assert len((tmp_path / "done").read_text().splitlines()) == 6
    broken.unlink()
    assert main(command) == 0
    assert "4 trials: 4 finished" in capsys.readouterr().out
    done = (tmp_path / "done").read_text().split()
    assert [(done.count(x), done.count(f"{x}")) for x in "14"] == [(1, 1)] * 2 and [
        done.count(x) for x in "23"
    ] == [3, 3]
    trials = SweepJournal(place, load_sweep(file), 0).read()
    assert [(trial.state, trial.values, trial.failures) for trial in trials] == [
        ("finished", [1.0], 0),
        ("finished", [2.0], 2),
        ("finished", [3.0], 2),
        ("finished", [4.0], 0),
    ]
    ends = [(event["id"], event["state"], event["values"]) for event in journal(place, "end")]
    assert [(state, values) for id_, state, values in ends if id_ == trials[1].id] == [
        ("failed", [-100.0]),
        ("failed", []),  # it has logged nothing that was not there before
        ("finished", [2.0]),
    ]
    # each trial once, in one folder
    assert len(journal(place, "start")) == 4 and len(list(place.glob("x_*"))) == 4


def test_an_attempt_that_a_signal_ends_is_none_of_the_failed_ones(tmp_path: Path) -> None:
    """A trial that failed once and was then interrupted continues like a running one, whatever the limit of
    attempts.
    """
    file, place = (
        write_sweep(tmp_path, parameters={"x": {"values": [1, 7]}, "pace": {"value": 0.0}}),
        tmp_path / "out",
    )
    run_sweep(load_sweep(file), place, say=quiet)
    trial = journal(place, "end")[-1]["id"]
    with open(place / "trials.jsonl", "a") as events:
        events.write(json.dumps({"event": "again", "id": trial}) + "\n")
    (tmp_path / "program.py").write_text(PROGRAM.replace("sys.exit(3)", "sys.exit(0)"))
    trials = run_sweep(load_sweep(file), place, tries=1, say=quiet)
    assert [(trial.state, trial.failures) for trial in trials] == [("finished", 0), ("finished", 1)]
    assert failures(trials, place, 1) is None


def test_hyperband_does_not_judge_an_attempt_by_what_the_one_before_left(tmp_path: Path) -> None:
    """A trial that diverged, failed and now starts again: until it writes, its file ends with NaN."""
    file = write_sweep(
        tmp_path,
        parameters={"x": {"values": [5, 2]}},
        early_terminate={"type": "hyperband", "min_iter": 1, "eta": 3},
    )
    (tmp_path / "program.py").write_text(
        "import time\ntime.sleep(1.2)\n" + BRITTLE.replace("-100 if", "'nan' if")
    )
    (tmp_path / "broken").touch()
    assert [trial.state for trial in run_sweep(load_sweep(file), tmp_path / "out", say=quiet)] == [
        "finished",
        "failed",
    ]
    (tmp_path / "broken").unlink()
    assert [trial.state for trial in run_sweep(load_sweep(file), tmp_path / "out", say=quiet)] == [
        "finished"
    ] * 2


@pytest.mark.parametrize("content", ["word", "nan", "-inf", "", "1.5,0\n2,2,2,loss,nan"])
def test_what_is_no_number_does_not_end_a_sweep(tmp_path: Path, content: str) -> None:
    """A trial that finished, and logged a word, NaN, an infinity, nothing, or NaN in the end."""
    row = f"1,1,1,loss,{content},0\n"
    program = (
        f"import os, pathlib; pathlib.Path(os.environ['WANDB_DIR'], 'metrics.csv').write_text({HEAD + row!r})"
    )
    plan = load_sweep(
        write_sweep(tmp_path, parameters={"x": {"values": [1]}}, command=["${interpreter}", "-c", program])
    )
    said: list[str] = []
    (trial,) = run_sweep(plan, tmp_path / "out", say=said.append)
    assert trial.state == "finished" and (trial.diverged or not trial.values)
    warned = [text for text in said if text.startswith("warning")]
    assert len(warned) == (0 if "1.5" in content else 1), said
    (again,) = run_sweep(plan, tmp_path / "out", say=quiet)
    assert again.values == pytest.approx(trial.values, nan_ok=True)  # as the journal keeps them


def test_a_value_that_was_damaged_is_left_out_of_the_search(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = MetricsCSV(tmp_path / "metrics.csv", 8)
    for step, loss in enumerate((0.75, 0.5, 0.625)):
        log.log_metrics({"loss": loss}, step)
    log.path.write_text(log.path.read_text().replace(",0.5,", ",0.1,"))
    assert (
        logged_values(tmp_path, "loss") == [0.75, 0.625]
        and "damaged or changed, and left out: line 3." in caplog.text
    )


def test_values_of_wandb_end_with_what_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "other.py"
    log = "run.log({'loss': 1.0}); run.log({'loss': float('nan')})"
    program.write_text(f"import wandb\nwith wandb.init(mode='offline') as run:\n    {log}\n")
    file = write_sweep(tmp_path, command=None, program=str(program), parameters={"x": {"values": [2]}})
    (trial,) = run_sweep(load_sweep(file), tmp_path / "out", say=quiet)
    assert trial.finite() == [1.0] and trial.diverged


def test_a_sweep_of_failures_still_says_how_it_ended(tmp_path: Path) -> None:
    command = ["${interpreter}", "-c", "import sys; sys.exit(3)"]
    plan = load_sweep(write_sweep(tmp_path, parameters={"x": {"values": [1, 2]}}, command=command))
    told = outcome(plan, run_sweep(plan, tmp_path / "out", say=quiet), tmp_path / "out")
    assert (
        "2 trials: 2 failed" in told
        and f"No trial has produced a run. Their outputs: {tmp_path / 'out' / 'logs'}" in told
    )


def test_a_metric_that_no_trial_logs_is_told_at_the_first_one(tmp_path: Path) -> None:
    program = tmp_path / "other.py"
    program.write_text(
        "import sys\nif '--x=1' not in sys.argv:\n    sys.exit()\n"  # the second has nothing to say
        "import wandb\nwith wandb.init(mode='offline') as run:\n    run.log({'val/loss': 1.0, 'accuracy': "
        "2.0})\n"
    )
    metric = {"name": "val_loss", "goal": "minimize"}
    plan = load_sweep(
        write_sweep(
            tmp_path, command=None, program=str(program), metric=metric, parameters={"x": {"values": [1, 2]}}
        )
    )
    said: list[str] = []
    trials = run_sweep(plan, tmp_path / "out", say=said.append)
    (warning,) = [text for text in said if text.startswith("warning")]
    assert "metric.name: the trial has not logged 'val_loss', but val/loss" in warning
    assert "2 finished; none has logged val_loss" in outcome(plan, trials, tmp_path / "out")


def test_names_in_the_file_of_another_program_are_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(
        HEAD + "1,8,0,val/loss,1.0,0\n1,8,0,accuracy,2.0,0\n2,16,0,accuracy,2.0,0\n2,1"
    )
    assert logged_names(tmp_path) == ["accuracy", "val/loss"]


def test_another_sweep_does_not_go_into_the_same_folder(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, parameters={"x": {"values": [1]}, "pace": {"value": 0.0}})
    run_sweep(load_sweep(file), tmp_path / "out", say=quiet)
    with pytest.raises(ValueError, match="holds another sweep"):
        run_sweep(load_sweep(write_sweep(tmp_path)), tmp_path / "out", say=quiet)


def start_sweep(file: Path, place: Path) -> Forked:
    """A sweep in a separate process, whose second trial has started."""
    log = place.with_suffix(".log")
    started = forked(1, forks.PROGRAM, "sweep", str(file), "--output", str(place), log=log)
    while not (place / "trials.jsonl").exists() or len(journal(place, "process")) < 2:
        assert started.poll() is None, "ended before it could be killed"
        time.sleep(0.05)
    return started


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_sweep_that_is_asked_to_stop_leaves_no_trial_behind(tmp_path: Path, number: signal.Signals) -> None:
    file, place = (
        write_sweep(tmp_path, parameters={"x": {"values": [3, 1, 2]}, "pace": {"value": 0.2}}),
        tmp_path / "out",
    )
    asked = start_sweep(file, place)
    asked.send_signal(number)
    code, told = asked.wait(60), place.with_suffix(".log").read_text()
    assert code == code_of(number) and number.name in told and "Traceback" not in told
    assert gone(journal(place, "process")[-1]["pid"])
    trials = run_sweep(load_sweep(file), place, say=quiet)
    assert [(trial.state, len(trial.values)) for trial in trials] == [("finished", 9)] * 3
    assert len(journal(place, "start")) == 3


def test_a_signal_in_the_middle_of_a_start_leaves_no_trial_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial's process is there, and the controller has not yet taken it among those that it ends."""
    file, place = (
        write_sweep(tmp_path, parameters={"x": {"values": [1]}, "pace": {"value": 0.5}}),
        tmp_path / "out",
    )
    write = SweepJournal.write

    def write_and_signal(self: SweepJournal, event: str, **content: object) -> None:
        write(self, event, **content)
        if event == "process":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SweepJournal, "write", write_and_signal)
    with pytest.raises(Preempted, match="SIGTERM"):
        run_sweep(load_sweep(file), place, say=quiet)
    assert gone(journal(place, "process")[-1]["pid"])


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As for a closed terminal under nohup."""
    file = write_sweep(tmp_path, parameters={"x": {"values": [1, 2]}, "pace": {"value": 0.0}})
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trials = run_sweep(
            load_sweep(file), tmp_path / "out", say=lambda text: os.kill(os.getpid(), signal.SIGHUP)
        )
    finally:
        signal.signal(signal.SIGHUP, before)
    assert [trial.state for trial in trials] == ["finished"] * 2


def test_a_trial_that_someone_else_asked_to_stop_goes_on(tmp_path: Path) -> None:
    """A scheduler signals all processes of a job: the trial may end before its controller hears of it."""
    file = write_sweep(tmp_path, parameters={"x": {"values": [1]}, "pace": {"value": 0.0}})
    once = f"        if step == 4 and done < 4:\n            sys.exit({EXIT_REQUEUE})\n"
    (tmp_path / "program.py").write_text(PROGRAM.replace("        time.sleep", f"{once}        time.sleep"))
    told: list[str] = []
    (trial,) = run_sweep(load_sweep(file), tmp_path / "out", say=told.append)
    assert (trial.state, len(trial.values)) == ("finished", 9)
    assert sum(line.startswith("again") for line in told) == 1


@pytest.mark.slow
def test_a_killed_sweep_goes_on_with_the_same_trials(tmp_path: Path) -> None:
    """SIGKILL to the controller while a trial runs: its orphan is ended, its trial goes on, none is lost or
    doubled.
    """
    file, place = (
        write_sweep(tmp_path, parameters={"x": {"values": [3, 1, 2]}, "pace": {"value": 0.2}}),
        tmp_path / "out",
    )
    killed = start_sweep(file, place)
    killed.send_signal(signal.SIGKILL)
    killed.join()
    orphan = journal(place, "process")[-1]["pid"]
    trials = run_sweep(load_sweep(file), place, say=quiet)
    assert [trial.state for trial in trials] == ["finished"] * 3 and [
        len(trial.values) for trial in trials
    ] == [9] * 3
    assert len(journal(place, "start")) == 3
    assert gone(orphan)


def test_an_event_that_a_kill_cut_short_does_no_harm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The next event starts on a new line, and an event of an unknown trial is skipped."""
    file, place = (
        write_sweep(tmp_path, parameters={"x": {"values": [1, 2]}, "pace": {"value": 0.0}}),
        tmp_path / "out",
    )
    run_sweep(load_sweep(file), place, say=quiet)
    lines = (place / "trials.jsonl").read_text().splitlines(keepends=True)
    (place / "trials.jsonl").write_text(
        "".join([*lines[:3], '{"event": "end", "id": "0badcafe", "state": "x"}\n', lines[3][:20]])
    )
    assert [trial.state for trial in run_sweep(load_sweep(file), place, say=quiet)] == ["finished"] * 2
    assert "0badcafe" in caplog.text and len(journal(place, "start")) == 2
    assert [trial.state for trial in run_sweep(load_sweep(file), place, say=quiet)] == ["finished"] * 2
    (place / "sweep.yaml").write_bytes(b"")
    with pytest.raises(ValueError, match=r"sweep\.yaml is damaged: it holds no sweep"):
        run_sweep(load_sweep(file), place, say=quiet)


def test_an_orphan_is_found_whose_process_was_never_written_down(tmp_path: Path) -> None:
    """The controller may be killed between the start of a trial and the line in its journal."""
    file, place = (
        write_sweep(tmp_path, parameters={"x": {"values": [1]}, "pace": {"value": 0.0}}),
        tmp_path / "out",
    )
    (trial,) = run_sweep(load_sweep(file), place, say=quiet)
    (place / "trials.jsonl").write_text(
        "".join((place / "trials.jsonl").read_text().splitlines(keepends=True)[:1])
    )
    environment = {**os.environ, "WANDB_RUN_ID": trial.id, "LIT_TRANSDIFF_SWEEP_FOLDER": str(place)}
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    orphan = subprocess.Popen(sleep, env=environment, start_new_session=True)
    other = subprocess.Popen(sleep, env={**environment, "WANDB_RUN_ID": "0badcafe"}, start_new_session=True)
    try:
        run_sweep(load_sweep(file), place, say=quiet)
        orphan.wait(5)
        assert other.poll() is None
    finally:
        for process in (orphan, other):
            process.kill()
            process.wait()


def test_a_program_that_knows_only_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "other.py"
    program.write_text(
        "import wandb\nwith wandb.init() as run:\n    run.log({'loss': run.config['x'] + 1.5})\n"
    )
    monkeypatch.setenv("WANDB_MODE", "offline")
    file = write_sweep(tmp_path, command=None, program=str(program), parameters={"x": {"values": [2]}})
    (trial,) = run_sweep(load_sweep(file), tmp_path / "out", say=quiet)
    assert (trial.state, trial.values) == ("finished", [3.5])
    (logged,) = [read_log(files) for files in log_files(tmp_path / "out")]
    assert (logged.id, logged.group, logged.config) == (trial.id, "small", {"x": 2})


@pytest.mark.slow
def test_trials_of_our_own_are_runs_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command = train_command(write_recipe(tmp_path), *TINY)
    parameters = {
        "optimizer": {"parameters": {"lr": {"values": [0.001, 0.01]}}},
        "training.micro_batch_size": {"value": None},
        "flow": {"parameters": {"discretize": {"value": None}}},
    }
    file = write_sweep(
        tmp_path, command=command, parameters=parameters, metric={"name": "val/loss", "goal": "minimize"}
    )
    trials = run_sweep(load_sweep(file), tmp_path / "out", agents=2, say=quiet)
    assert [(trial.state, len(trial.values)) for trial in trials] == [("finished", 2)] * 2
    found = runs(tmp_path / "out")
    assert {run.id for run in found} == {trial.id for trial in trials} and {run.group for run in found} == {
        "small"
    }
    assert {run.config["optimizer"]["lr"] for run in found} == {0.001, 0.01}
    assert all(run.config["flow"]["discretize"] is None and run.state == "finished" for run in found)
