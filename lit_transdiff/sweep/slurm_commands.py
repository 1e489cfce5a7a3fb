"""SLURM's commands: submission, queue, accounts and cancelling, as far as the jobs of a sweep need them."""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Sequence

from lit_transdiff.sweep.launching import Outcome

ANSWER = 60.0  # seconds for the answer of a command
# Words of sbatch about a job that it may take later.
LATER = re.compile(
    r"timed out|contact|connect|temporarily|try again|retry|QOSMax|AssocMax|MaxSubmit|limit.*reached|busy",
    re.IGNORECASE,
)
# States of jobs that the machine has ended and not the trial. COMPLETED is one without the exit code that our
# script writes: it was to be requeued.
ENDED_BY_MACHINE = (
    "NODE_FAIL",
    "BOOT_FAIL",
    "PREEMPTED",
    "REVOKED",
    "REQUEUED",
    "TIMEOUT",
    "DEADLINE",
    "COMPLETED",
)
log = logging.getLogger(__name__)


class SlurmUnreachable(ConnectionError):
    """SLURM gave no answer, or refused for now."""


def ask(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command of SLURM. Raises ``SlurmUnreachable`` if it gives no answer.

    It does not see the job that the controller itself may run in, nor a Ctrl-C in the controller's terminal.
    """
    outer = {
        name: value for name, value in os.environ.items() if not re.match("SLURM_(?!CONF)|SBATCH_", name)
    }
    try:
        return subprocess.run(
            command,
            env=outer,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ANSWER,
            start_new_session=True,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmUnreachable(f"{command[0]}: {error}") from error


def submit(words: Sequence[str]) -> str:
    """Submit a job and return its number. Raises ``ValueError`` with sbatch's words if it never takes it."""
    done = ask(["sbatch", *words])
    said = " ".join(done.stderr.split())
    if done.returncode == 0 and (number := done.stdout.split(";")[0].strip()):  # "17" or "17;cluster"
        return number
    if LATER.search(said):
        raise SlurmUnreachable(said)
    raise ValueError(f"sbatch refuses the trial: {said or f'exit status {done.returncode}'}")


def queue(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The number and state of the jobs with these names that wait or run."""
    if not names:
        return {}
    done = ask(["squeue", "--noheader", "--format=%i|%T|%j", f"--name={','.join(names)}"])
    if done.returncode != 0:
        raise SlurmUnreachable(" ".join(done.stderr.split()) or "squeue failed")
    lines = [line.strip().split("|", 2) for line in done.stdout.splitlines() if line.count("|") >= 2]
    return {name: (number, state) for number, state, name in lines}


def accounted(number: str) -> Outcome:
    """How a job ended that left no exit code: by the accounts, or what the scheduler still remembers."""
    state, _, code = (from_accounts(number) or from_memory(number)).partition("|")
    state = state.split("+")[0]
    first = state.split(" ")[0]  # "CANCELLED by 1000"
    if not first or first in ENDED_BY_MACHINE:
        return Outcome(1, f"job {number} {f'ended as {state}' if state else 'has gone'}", lost=True)
    status, _, number_of_signal = code.partition(":")
    exit_code = int(status or 0) or 128 + int(number_of_signal or 0)
    return Outcome(exit_code, f"job {number} ended as {state}")


def from_accounts(number: str) -> str:
    """``STATE|CODE:SIGNAL`` of a job in the accounts; empty without accounts."""
    try:
        words = ["--noheader", "--parsable2", "--allocations", "--format=State,ExitCode", f"--jobs={number}"]
        done = ask(["sacct", *words])
    except SlurmUnreachable:
        return ""
    return done.stdout.splitlines()[-1].strip() if done.returncode == 0 and done.stdout.strip() else ""


def from_memory(number: str) -> str:
    """``STATE|CODE:SIGNAL`` of a job that ended in the last minutes, from the scheduler."""
    try:
        told = ask(["scontrol", "show", "job", number]).stdout
    except SlurmUnreachable:
        return ""
    state, code = re.search(r"JobState=(\S+)", told), re.search(r"\bExitCode=(\S+)", told)
    return f"{state[1]}|{code[1] if code else ''}" if state else ""


def cancel(number: str, *options: str) -> None:
    """End a job, or signal it. A job that has ended in the meantime is no error."""
    try:
        ask(["scancel", *options, number])
    except SlurmUnreachable as error:
        log.warning("job %s was not signalled (%s)", number, error)
