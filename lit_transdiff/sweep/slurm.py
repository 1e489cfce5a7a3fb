"""Trials as jobs of SLURM: every trial is one job of N nodes, which outlives its controller.

A job runs the trial's command by ``srun`` on all its nodes. A trial that was preempted, or reaches its time
limit, saves and ends with ``EXIT_REQUEUE``; the job's script then puts the job back into the queue, also
without a controller. Any other exit code is left in a file for the controller, because accounting (``sacct``)
may be switched off. The name of a job contains the trial's id, so that a job is found again whose number was
never written down.

This is plain ``sbatch`` rather than submitit: that pickles a Python function and runs it under signal
handlers and a requeueing of its own, whereas a trial is a command whose ranks handle signals themselves.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_transdiff.base.endings import EXIT_REQUEUE, EXIT_STALLED
from lit_transdiff.base.files import replace_file
from lit_transdiff.config import require
from lit_transdiff.sweep.launching import LauncherConfig, Order, Outcome, TrialJob
from lit_transdiff.sweep.slurm_commands import SlurmUnreachable, accounted, cancel, queue, submit

JOBS_AT_ONCE = 8  # jobs at once by default
ABSENCES = 2  # looks at the queue in a row without a job after which it has gone
# Seconds between the ends of the first and the last rank of a trial: one may still wait for W&B. (To kill all
# at the first exit code other than 0 would also kill a rank that is saving.)
LAST_RANK = 420
log = logging.getLogger(__name__)

SCRIPT = """\
#!/bin/bash
# Trial {id} of a sweep, written by lit-transdiff.
cd {here} || exit 2
{exports}
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-1}}" TORCH_NCCL_ASYNC_ERROR_HANDLING=1
{setup}
{command}
code=$?
if ((code == {requeue})) && [[ ! -e {stop} ]] && scontrol requeue "$SLURM_JOB_ID"; then
  exit 0
fi
echo "$SLURM_JOB_ID $code" >{ended}.new && mv {ended}.new {ended}
exit "$code"
"""


def srun(command: Sequence[str]) -> list[str]:
    """The command on all nodes of a job."""
    return ["srun", "--kill-on-bad-exit=0", f"--wait={LAST_RANK}", *command]


def on_all_nodes(command: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The command on all nodes of the job that this process is in, unless ``srun`` has started it already."""
    inside = "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment
    return srun(command) if inside else list(command)


@dataclass
class SlurmJob:
    """A trial's job. ``ended`` and ``stopped`` are files beside its log."""

    number: str
    name: str
    ended: Path
    stopped: Path
    state: str = "PENDING"
    absences: int = 0
    found: Outcome | None = None

    @property
    def record(self) -> Mapping[str, Any]:
        return {"job": self.number}

    @property
    def stopping(self) -> bool:
        return self.stopped.exists()

    @property
    def where(self) -> str:
        return f" as job {self.number} ({self.state.lower()})"

    def outcome(self) -> Outcome | None:
        return self.found

    def stop(self) -> None:
        self.stopped.touch()
        cancel(self.number, "--state=PENDING")
        cancel(self.number, "--signal=TERM")

    def kill(self) -> None:
        cancel(self.number)

    def clear(self) -> None:
        """Remove the files of an attempt that is over."""
        self.ended.unlink(missing_ok=True)
        self.stopped.unlink(missing_ok=True)

    def seen(self, number: str, state: str) -> None:
        """Record that the job is in the queue."""
        self.number, self.state, self.absences = number, state, 0

    def missed(self) -> None:
        """Record that the job is not in the queue, and read how it ended."""
        self.absences += 1
        code = self.code_left()
        if code == EXIT_STALLED:
            self.found = Outcome(code, "it has stalled", lost=True)
        elif code is not None:
            self.found = Outcome(code)
        elif self.absences >= ABSENCES:
            self.found = accounted(self.number)

    def code_left(self) -> int | None:
        """The exit code that the job's script has written; None if it has written none."""
        try:
            number, code = self.ended.read_text().split()
        except (OSError, ValueError):
            return None
        return int(code) if number == self.number else None


class SlurmLauncher:
    """Starts every trial as a job; the jobs go on without their controller."""

    def __init__(self, config: LauncherConfig, sweep: str, folder: Path) -> None:
        for tool in ("sbatch", "squeue", "scancel"):
            allowed = f"local, as no {tool} is on the PATH"
            require(shutil.which(tool) is not None, "launcher", "slurm", allowed)
        self.config = config
        self.sweep = re.sub(r"[^\w.-]", "_", sweep)
        self.folder = folder
        self.poll, self.patience = config.poll_seconds, max(60.0, config.signal_seconds)
        self.jobs: list[SlurmJob] = []
        self.unsure = False  # a submission was not answered: the job may be in the queue

    def has_room(self) -> bool:
        return len(self.jobs) < (self.config.parallel or JOBS_AT_ONCE)

    def name(self, id_: str) -> str:
        return f"{self.sweep}-{id_}"

    def job(self, order: Order, number: str) -> SlurmJob:
        return SlurmJob(
            number, self.name(order.id), order.log.with_suffix(".exit"), order.log.with_suffix(".stop")
        )

    def start(self, order: Order) -> SlurmJob | None:
        try:
            there = queue([self.name(order.id)]) if self.unsure else {}
            job = self.job(order, "")
            if job.name in there:
                job.seen(*there[job.name])
            else:
                job.clear()  # the files of an earlier attempt
                script = order.log.with_suffix(".sbatch")
                replace_file(script, self.script(order, job).encode())
                job = self.job(order, submit([*self.options(order), str(script)]))
            self.unsure = False
        except SlurmUnreachable as error:
            self.unsure = True
            log.warning("SLURM does not take the trial; the next attempt is in %g s (%s)", self.poll, error)
            return None
        self.jobs.append(job)
        return job

    def options(self, order: Order) -> list[str]:
        """The options of ``sbatch``."""
        config = self.config
        gpus = config.tasks_per_node if config.gpus_per_node is None else config.gpus_per_node
        given = {
            "job-name": self.name(order.id),
            "output": str(order.log).replace("%", "%%"),
            "open-mode": "append",
            "export": "ALL",
            "nodes": config.nodes,
            "ntasks-per-node": config.tasks_per_node,
            "gpus-per-node": gpus or None,
            "cpus-per-task": config.cpus_per_task,
            "mem": config.memory,
            "time": config.time,
            "partition": config.partition,
            "account": config.account,
            "signal": f"USR1@{config.signal_seconds}" if config.signal_seconds else None,
        }
        words = [f"--{name}={value}" for name, value in given.items() if value is not None]
        return ["--parsable", "--requeue", *words, *config.sbatch]

    def script(self, order: Order, job: SlurmJob) -> str:
        """The script of a trial's job."""
        return SCRIPT.format(
            id=order.id,
            here=shlex.quote(os.getcwd()),
            exports="\n".join(
                f"export {name}={shlex.quote(value)}" for name, value in order.environment.items()
            ),
            setup="\n".join(self.config.setup),
            command=shlex.join(srun(order.command)),
            requeue=EXIT_REQUEUE,
            stop=shlex.quote(str(job.stopped)),
            ended=shlex.quote(str(job.ended)),
        )

    def adopt(self, orders: Sequence[Order], known: Mapping[str, Mapping[str, Any]]) -> dict[str, TrialJob]:
        """The jobs that are in the queue, and those that have ended since the journal's last line."""
        there = queue([self.name(order.id) for order in orders])
        found: dict[str, TrialJob] = {}
        for order in orders:
            job = self.job(order, str(known.get(order.id, {}).get("job", "")))
            if job.name in there:
                job.seen(*there[job.name])
            elif not job.number and not job.ended.exists():
                continue  # it was never submitted
            else:
                job.number, job.state = job.number or job.ended.read_text().split()[0], "ENDED"
            self.jobs.append(job)
            found[order.id] = job
        return found

    def look(self) -> None:
        if not self.jobs:
            return
        try:
            there = queue([job.name for job in self.jobs])
        except SlurmUnreachable as error:
            return log.warning("SLURM does not answer; the jobs are left as they are (%s)", error)
        for job in self.jobs:
            if job.name in there:
                job.seen(*there[job.name])
            else:
                job.missed()

    def end(self, job: TrialJob) -> None:
        assert isinstance(job, SlurmJob)
        self.jobs.remove(job)
        job.clear()

    def leave(self, jobs: Sequence[TrialJob]) -> str:
        """Leave the jobs in the queue, where the same command finds them."""
        numbers = " ".join(job.number for job in self.jobs)
        many = f"{len(self.jobs)} jobs go on" if len(self.jobs) > 1 else "A job goes on"
        return f"{many}, and the same command takes over; to end: scancel {numbers}" if self.jobs else ""
