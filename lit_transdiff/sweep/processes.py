"""The processes of trials: signals, waiting, and those that outlived their controller."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from lit_transdiff.tracking.place import SWEEP_FOLDER

KILL_AFTER = 60.0  # seconds for a trial to end after SIGTERM


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
