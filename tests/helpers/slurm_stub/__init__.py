"""A SLURM of one machine: its commands on the PATH, and what a test does to it."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.slurm_stub import commands

TOOLS = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sacct")


class Slurm:
    """The stub's commands and its jobs in a folder. ``environment`` makes them those of a process."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "slurm"
        (self.state / "bin").mkdir(parents=True)
        (self.state / "jobs").mkdir()
        for tool in TOOLS:
            file = self.state / "bin" / tool
            file.write_text(f'#!/bin/sh\nexec {sys.executable} -SE {commands.__file__} {tool} "$@"\n')
            file.chmod(file.stat().st_mode | stat.S_IEXEC)
        self.environment = {
            "STUB_SLURM": str(self.state),
            "PATH": f"{self.state / 'bin'}:{os.environ['PATH']}",
        }

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs in the order of their submission."""
        files = sorted((self.state / "jobs").glob("*.json"), key=lambda file: int(file.stem))
        return [json.loads(file.read_text()) for file in files]

    def switch(self, what: str, on: bool = True) -> None:
        """``hold``: jobs wait; ``down``: no answers; ``full``: no job is taken; ``no_accounts``: no sacct;
        ``remember``: scontrol knows ended jobs.
        """
        (self.state / what).touch() if on else (self.state / what).unlink(missing_ok=True)

    def until(self, condition: Callable[[], Any], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.jobs()
            time.sleep(0.05)

    def preempt(self, number: int) -> None:
        """The tasks get SIGTERM, as within the grace time of a preemption."""
        commands.signal_tasks(self.state, str(number), signal.SIGTERM)

    def fail_node(self, number: int, forget: bool = False) -> None:
        """The job's processes are gone at once; with ``forget`` nobody remembers the job."""
        commands.end_job(self.state, str(number), "NODE_FAIL")
        if forget:
            (self.state / "jobs" / f"{number}.json").unlink()

    def end(self) -> None:
        """End what is left."""
        for job in self.jobs():
            commands.end_job(self.state, str(job["id"]), "CANCELLED")
