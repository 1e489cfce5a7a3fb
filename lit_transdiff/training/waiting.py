"""What the other ranks wait for, because the first rank writes it."""

from __future__ import annotations

import time

from lit_transdiff.base.endings import RankFailed
from lit_transdiff.checkpoints.run_folder import trained_steps
from lit_transdiff.config import RunConfig


def wait_for_export(run: RunConfig, step: int) -> None:
    """Wait until the first rank has written the trained model."""
    deadline = time.monotonic() + 60 * run.distributed.timeout_minutes
    while trained_steps(run) < step:
        if time.monotonic() > deadline:
            raise RankFailed(f"{run.folder / 'export'}: the first rank has not written it.")
        time.sleep(0.1)
