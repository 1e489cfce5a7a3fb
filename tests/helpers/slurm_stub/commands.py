"""SLURM's commands, ``python commands.py NAME WORDS``: jobs are files of JSON, and run on this machine."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WAITING, RUNNING = "PENDING", "RUNNING"
LATER = "sbatch: error: Batch job submission failed: Job violates policy (QOSMaxSubmitJobPerUserLimit)"


@contextmanager
def changing(state: Path, number: str) -> Iterator[dict[str, Any]]:
    """A job's content, written back after the block."""
    file = state / "jobs" / f"{number}.json"
    with open(state / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        job = json.loads(file.read_text()) if file.exists() else {}
        yield job
        if job:
            file.with_suffix(".new").write_text(json.dumps(job))
            file.with_suffix(".new").rename(file)


def read(state: Path, number: str) -> dict[str, Any]:
    file = state / "jobs" / f"{number}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def value_of(words: list[str], name: str, otherwise: str = "") -> str:
    found = [word.split("=", 1)[1] for word in words if word.startswith(f"--{name}=")]
    return found[-1] if found else otherwise


def sbatch(state: Path, words: list[str]) -> int:
    if (state / "full").exists():
        print(LATER, file=sys.stderr)
        return 1
    if value_of(words, "partition") == "nowhere":
        print("sbatch: error: invalid partition specified: nowhere", file=sys.stderr)
        return 1
    number = str(1000 + len(list((state / "jobs").glob("*.submitted"))))
    (state / "jobs" / f"{number}.submitted").touch()
    with changing(state, number) as job:
        job |= dict(id=int(number), name=value_of(words, "job-name"), state=WAITING, restarts=0, code=0)
        job |= dict(words=words, nodes=int(value_of(words, "nodes", "1")), requeued=False, group=0)
        job |= dict(tasks=job["nodes"] * int(value_of(words, "ntasks-per-node", "1")), inside=inside())
    supervisor = [sys.executable, "-SE", __file__, "supervise", number]
    null = subprocess.DEVNULL
    subprocess.Popen(supervisor, stdin=null, stdout=null, stderr=null, start_new_session=True)
    print(number)
    return 0


def inside() -> list[str]:
    """The variables of an outer job that a submission must not see."""
    return [name for name in os.environ if name.startswith("SLURM_")]


def supervise(state: Path, words: list[str]) -> int:
    """Run a job, again after each requeueing, and write down how it ended."""
    (number,) = words
    while True:
        while (state / "hold").exists() and read(state, number).get("state") == WAITING:
            time.sleep(0.05)
        with changing(state, number) as job:
            if job.get("state") != WAITING:
                return 0
            job["state"] = RUNNING
            process = start_batch(job)
            job["group"] = process.pid
        code = process.wait()
        with changing(state, number) as job:
            if job.get("requeued"):
                job |= dict(state=WAITING, requeued=False, restarts=job["restarts"] + 1, group=0)
            elif job.get("state") == RUNNING:
                job |= dict(state="COMPLETED" if code == 0 else "FAILED", code=code)


def start_batch(job: dict[str, Any]) -> subprocess.Popen[bytes]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = dict(JOB_ID=job["id"], JOB_NAME="trial", NTASKS=job["tasks"], NNODES=job["nodes"], NODEID=0)
    given |= dict(
        NODELIST="localhost", JOB_NODELIST="localhost", NTASKS_PER_NODE=job["tasks"] // job["nodes"]
    )
    variables = {f"SLURM_{name}": str(value) for name, value in given.items()} | {"MASTER_PORT": str(port)}
    with open(value_of(job["words"], "output").replace("%%", "%"), "ab") as log:
        return subprocess.Popen(
            ["bash", job["words"][-1]],
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def srun(state: Path, words: list[str]) -> int:
    """Start the tasks, and end with the highest of their codes."""
    while words[0].startswith("--"):
        words.pop(0)
    tasks, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NNODES"])
    each, processes = tasks // nodes, []
    for task in range(tasks):
        place = dict(SLURM_PROCID=task, SLURM_LOCALID=task % each, SLURM_NODEID=task // each, SLURM_STEP_ID=0)
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        processes.append(subprocess.Popen(words, env=environment))
    file = state / f"tasks-{os.environ['SLURM_JOB_ID']}"
    file.write_text(" ".join(str(process.pid) for process in processes))
    codes = [process.wait() for process in processes]
    file.unlink(missing_ok=True)
    return max(code if code >= 0 else 128 - code for code in codes)


def signal_tasks(state: Path, number: str, which: signal.Signals) -> None:
    file = state / f"tasks-{number}"
    for pid in file.read_text().split() if file.exists() else []:
        try:
            os.kill(int(pid), which)
        except ProcessLookupError:
            continue


def end_job(state: Path, number: str, how: str) -> None:
    with changing(state, number) as job:
        if job.get("state") in (WAITING, RUNNING):
            group, job["state"], job["requeued"] = job["group"], how, False
            if group:
                try:
                    os.killpg(group, signal.SIGKILL)
                except ProcessLookupError:
                    return


def squeue(state: Path, words: list[str]) -> int:
    names = value_of(words, "name").split(",")
    for file in sorted((state / "jobs").glob("*.json")):
        job = json.loads(file.read_text())
        if job["name"] in names and job["state"] in (WAITING, RUNNING):
            print(f"{job['id']}|{job['state']}|{job['name']}")
    return 0


def scontrol(state: Path, words: list[str]) -> int:
    if words[0] == "requeue":
        with changing(state, words[1]) as job:
            job["requeued"] = job["state"] == RUNNING
        return 0
    job = read(state, words[2])
    if not job or not (state / "remember").exists():
        print("slurm_load_jobs error: Invalid job id specified", file=sys.stderr)
        return 1
    print(f"JobId={job['id']} JobName=x\n   JobState={job['state']} ExitCode={job['code']}:0")
    return 0


def scancel(state: Path, words: list[str]) -> int:
    number = words[-1]
    if which := value_of(words, "signal"):
        signal_tasks(state, number, signal.Signals[f"SIG{which}"])
    elif not value_of(words, "state") or read(state, number).get("state") == WAITING:
        end_job(state, number, "CANCELLED by 1000")
    return 0


def sacct(state: Path, words: list[str]) -> int:
    job = read(state, value_of(words, "jobs"))
    if (state / "no_accounts").exists():
        print("Slurm accounting storage is disabled", file=sys.stderr)
        return 1
    if job:
        print(f"{job['state']}|{job['code']}:0")
    return 0


COMMANDS: dict[str, Callable[[Path, list[str]], int]] = {
    function.__name__: function for function in (sbatch, supervise, srun, squeue, scontrol, scancel, sacct)
}


def main() -> int:
    name, *words = sys.argv[1:]
    state = Path(os.environ["STUB_SLURM"])
    with open(state / "calls", "a") as calls:
        print(name, *(re.sub(r"\s+", " ", word) for word in words), file=calls)
    if (state / "down").exists() and name in ("squeue", "sbatch", "sacct", "scancel"):
        print(f"{name}: error: Unable to contact slurm controller (connect failure)", file=sys.stderr)
        return 1
    return COMMANDS[name](state, words)


if __name__ == "__main__":
    sys.exit(main())
