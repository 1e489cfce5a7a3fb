"""Processes as a user starts them: one, or several through torchrun over gloo on this machine; and what is
seen of them. ``forks`` starts the same in less time.
"""

from __future__ import annotations

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lit_transdiff.base.endings import STOP_SIGNALS
from lit_transdiff.base.files import read_json
from lit_transdiff.config import RunConfig
from lit_transdiff.config.loading import save_yaml
from tests.helpers.small import ROOT, small_run

PROGRAM = ("-m", "lit_transdiff")
TRAIN = (*PROGRAM, "train")
LONG = {"max_steps": 100, "checkpoint_every": 25, "log_every": 5}
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "PYTHONPATH": str(ROOT),
    "WANDB_MODE": "offline",
}
ENVIRONMENT["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as in an activated environment


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def command_line(processes: int, *command: str, elastic: tuple[str, ...] = ()) -> list[str]:
    """Python with ``command``, through torchrun when there are several processes."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), *elastic]
    torchrun += ["--master_addr", "127.0.0.1", "--master_port", free_port()]
    return [sys.executable, *(torchrun if processes > 1 else []), *command]


def start(processes: int, *command: str, timeout: float = 300) -> str:
    """Run to the end; fails with the output."""
    line = command_line(processes, *command)
    done = subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def values(folder: Path, metric: str = "train/loss") -> dict[int, float]:
    """Step -> value of a metric of a run folder; each step is there once."""
    with open(folder / "metrics.csv", newline="") as file:
        rows: list[dict[str, Any]] = [row for row in csv.DictReader(file) if row["metric"] == metric]
    result = {int(row["step"]): float(row["value"]) for row in rows}
    assert len(result) == len(rows)
    return result


def numbers(run: RunConfig) -> list[tuple[str, str, str]]:
    """Step, metric and value of each row of ``metrics.csv``; rates without their values."""
    lines = [line.split(",") for line in (run.folder / "metrics.csv").read_text().splitlines()]
    return [
        (step, name, "" if name.startswith("throughput/") else value) for step, _, _, name, value, *_ in lines
    ]


def run_in(folder: Path, name: str, **training: int) -> tuple[RunConfig, str]:
    """A run of 100 steps, and its file."""
    run = small_run(folder, name=name, training={**LONG, **training})
    file = folder / f"{name}.yaml"
    save_yaml(run, file)
    return run, str(file)


def background(line: list[str], log: Path, **environment: str) -> subprocess.Popen:
    """Starts a command and does not wait for it; ``log`` gets its output."""
    with open(log, "w") as file:
        environment = {**ENVIRONMENT, **environment}
        return subprocess.Popen(
            line, cwd=ROOT, env=environment, stdout=file, stderr=file, preexec_fn=ignore_nothing
        )


def ignore_nothing() -> None:
    """These tests may themselves run under nohup or in the background.

    The processes make a group, as of a terminal.
    """
    os.setsid()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def until(condition: object, process: subprocess.Popen, seconds: float = 180) -> None:
    """Wait; fails when the process ends before, or after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert process.poll() is None and time.monotonic() < end, "did not get there"
        time.sleep(0.05)


def steps_logged(run: RunConfig, number: int = 2) -> object:
    """Whether training has logged so often, so that it is under way."""

    def condition() -> bool:
        file = run.folder / "metrics.csv"
        return file.exists() and file.read_text().count("train/loss,") >= number

    return condition


def children(process: int) -> list[int]:
    """The processes that a process (a torchrun, a srun) has started."""
    listing = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    return sorted(
        int(pid)
        for pid, parent in (line.split() for line in listing.splitlines()[1:])
        if int(parent) == process
    )


def assert_same_weights(a: RunConfig, b: RunConfig) -> None:
    """The exported weights of two runs are of the same step and equal bit for bit."""
    one, other = (run.folder / "export" for run in (a, b))
    steps = [read_json(folder / "export.json")["step"] for folder in (one, other)]
    assert steps[0] == steps[1], f"steps {steps}"
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    apart = {name: float((first[name] - second[name]).abs().max()) for name in first}
    apart = {name: largest for name, largest in apart.items() if not torch.equal(first[name], second[name])}
    assert not apart, f"step {steps[0]}: {len(apart)} of {len(first)} tensors differ, by up to {apart}"
