"""Starting processes as a user would: one, or several through torchrun over gloo on this machine."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from lit_transdiff.config import RunConfig
from lit_transdiff.config.loading import to_dict
from tests.small import ROOT

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
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


def fit_all(folder: Path, processes: int, plan: list[tuple[RunConfig, int | None]]) -> str:
    """All fits of a plan in the same processes; see ``fits``. Returns the output."""
    file = folder / f"plan-{processes}-{len(plan)}.json"
    file.write_text(json.dumps([[to_dict(run), step] for run, step in plan]))
    return start(processes, "-m", "tests.distributed.fits", str(file))


def values(folder: Path, metric: str = "train/loss") -> dict[int, float]:
    """Step -> value of a metric of a run folder; each step is there once."""
    with open(folder / "metrics.csv", newline="") as file:
        rows: list[dict[str, Any]] = [row for row in csv.DictReader(file) if row["metric"] == metric]
    found = {int(row["step"]): float(row["value"]) for row in rows}
    assert len(found) == len(rows)
    return found
