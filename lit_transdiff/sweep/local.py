"""Trials as processes of this machine: their start, signals, and those that outlived their controller."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from lit_transdiff.config import require
from lit_transdiff.sweep.launching import Order, Outcome, TrialJob
from lit_transdiff.tracking.place import SWEEP_FOLDER

POLL = 0.5  # seconds between checks of the trials
KILL_AFTER = 60.0  # seconds for a trial to end after SIGTERM
Slot = tuple[int, ...]  # GPUs of one trial; empty on CPUs


def slots_of(agents: int | None, devices_per_run: int) -> list[Slot]:
    """The GPUs of ``agents`` concurrent trials, by default as many as the GPUs allow, or one on CPUs.

    If there are more trials of one GPU each than GPUs, they share them, as small models can.
    """
    gpus = torch.cuda.device_count()
    if gpus == 0:
        return [()] * (agents or 1)
    allowed = f"at most the {gpus} GPUs of this machine"
    require(devices_per_run <= gpus, "--devices-per-run", devices_per_run, allowed)
    slots = [
        tuple(range(i, i + devices_per_run)) for i in range(0, gpus - devices_per_run + 1, devices_per_run)
    ]
    allowed = f"at most {len(slots)} of {devices_per_run} GPUs each"
    require(agents is None or agents <= len(slots) or devices_per_run == 1, "--agents", agents, allowed)
    return list(islice(cycle(slots), agents or len(slots)))


@dataclass(frozen=True)
class LocalJob:
    """A trial's process, which leads a group of its own, and its GPUs."""

    process: subprocess.Popen[bytes]
    slot: Slot

    @property
    def record(self) -> Mapping[str, Any]:
        return {"pid": self.process.pid}

    @property
    def stopping(self) -> bool:
        return False

    @property
    def where(self) -> str:
        return f" on GPU {','.join(map(str, self.slot))}" if self.slot else ""

    def outcome(self) -> Outcome | None:
        code = self.process.poll()
        return None if code is None else Outcome(code)

    def stop(self) -> None:
        signal_group(self.process.pid, signal.SIGTERM)

    def kill(self) -> None:
        signal_group(self.process.pid, signal.SIGKILL)


class LocalLauncher:
    """Starts each trial on a free slot; no trial outlives its controller."""

    poll, patience = POLL, KILL_AFTER

    def __init__(self, slots: Sequence[Slot], folder: Path) -> None:
        self.free = list(slots)
        self.folder = folder

    def has_room(self) -> bool:
        return len(self.free) > 0

    def start(self, order: Order) -> LocalJob:
        slot = self.free.pop(0)
        devices = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, slot))} if slot else {}
        with open(order.log, "ab") as log:
            process = subprocess.Popen(
                order.command,
                env={**os.environ, **order.environment, **devices},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return LocalJob(process, slot)

    def adopt(self, orders: Sequence[Order], known: Mapping[str, Mapping[str, Any]]) -> dict[str, TrialJob]:
        """End the processes that a killed controller has left; their trials continue from checkpoints."""
        if orders:
            end_orphans({order.id for order in orders}, self.folder)
        return {}

    def look(self) -> None:
        """Do nothing: the outcome of each process is read on demand."""

    def end(self, job: TrialJob) -> None:
        assert isinstance(job, LocalJob)
        self.free.append(job.slot)

    def leave(self, jobs: Sequence[TrialJob]) -> str:
        """End them; the journal lists them as running, so the same command continues them."""
        for job in jobs:
            job.stop()
        for job in jobs:
            assert isinstance(job, LocalJob)
            wait_or_kill(job.process)
        return ""


def end_orphans(trials: set[str], folder: Path) -> None:
    """End the trials of this sweep that outlived their controller.

    They are recognised by their environment, because a killed controller may not have recorded their
    processes.
    """
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            ours = environment.get("WANDB_RUN_ID") in trials and environment.get(SWEEP_FOLDER) == str(folder)
            if ours and os.getpgid(process.pid) == process.pid:  # the trial itself, not a child process
                found.append(process)
        except (psutil.Error, ProcessLookupError, PermissionError):
            continue
    for process in found:
        signal_group(process.pid, signal.SIGTERM)
    _, alive = psutil.wait_procs(found, KILL_AFTER)
    for process in alive:
        signal_group(process.pid, signal.SIGKILL)
    psutil.wait_procs(alive, KILL_AFTER)


def signal_group(pid: int, number: signal.Signals) -> None:
    """Send a signal to a trial and all its children, if it still exists."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def wait_or_kill(process: subprocess.Popen[bytes]) -> None:
    """Wait for a trial to end, and kill it if it does not."""
    try:
        process.wait(KILL_AFTER)
    except subprocess.TimeoutExpired:
        signal_group(process.pid, signal.SIGKILL)
        process.wait()
