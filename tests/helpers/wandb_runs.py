"""Runs in W&B, as tests look at them: at the server of their own, and after ``wandb sync``."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers.wandb_stub import Stub

TRACKED = {"wandb": True, "project": "p", "group": "g", "tags": ["t"]}


def rows_of(stub: Stub, key: str) -> list[dict]:
    return [row for row in stub.state.only_run()["history"] if key in row]


def until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def sync(server: Stub, folder: Path) -> None:
    """``wandb sync``, as a user types it."""
    files = sorted((folder / "wandb").glob("*run-*-*"))
    command = [sys.executable, "-m", "wandb", "sync", "--include-online", *(str(f) for f in files)]
    environment = {**os.environ, **server.environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
