"""The wait of the other ranks after the last step, while the first rank alone writes the trained model."""

from __future__ import annotations

import time

from lit_transdiff.base.endings import RankFailed
from lit_transdiff.base.locks import FolderLock
from lit_transdiff.checkpoints.run_folder import trained_steps
from lit_transdiff.config import RunConfig

EXPORT_PATIENCE = 60.0  # seconds in which a model appears on other machines
EXPORT_POLL = 0.5


def wait_for_export(run: RunConfig, step: int, lock: FolderLock) -> None:
    """Wait until the first rank, which holds the folder, has written the trained model.

    ``RankFailed`` soon after it has left the folder, because a signal or an error ended it.
    """
    deadline = time.monotonic() + 60 * run.distributed.timeout_minutes
    while trained_steps(run) < step:
        if lock.is_free:  # other machines may see the model later
            deadline = min(deadline, time.monotonic() + EXPORT_PATIENCE)
        if time.monotonic() > deadline:
            raise RankFailed(f"{run.folder / 'export'}: the first rank has not written it.")
        time.sleep(EXPORT_POLL)
