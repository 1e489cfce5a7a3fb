"""A preempted trial of a sweep at W&B returns to the sweep's queue, and the next agent continues it."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

from lit_transdiff.base.endings import EXIT_REQUEUE, Preempted
from lit_transdiff.tracking.server import going_on_without

if TYPE_CHECKING:
    import wandb

ASKING = 10.0  # seconds for the server's answer, while a scheduler waits for the end of this process


def mark_preempting(error: Preempted) -> None:
    """Tell W&B of a process that a scheduler ends, if it has an open run.

    Not if the server itself wants the run to end (early termination): its agent sends the same signal, and
    the run would come back.
    """
    run = getattr(sys.modules.get("wandb"), "run", None)  # no import only to find that there is no run
    if error.code != EXIT_REQUEUE or run is None or run.offline or not run.settings.x_primary:
        return
    if not is_stopped(run):
        run.mark_preempting()


def is_stopped(run: wandb.Run) -> bool:
    """Whether the server wants the run to end; False if it does not say."""
    said: list[bool] = []

    def ask() -> None:
        from wandb.sdk.launch.api import LaunchApi

        with going_on_without("the question whether it stops the run"):
            said.append(LaunchApi().check_stop_requested(run.project, run.entity, run.id))

    thread = threading.Thread(target=ask, name="wandb stop", daemon=True)
    thread.start()
    thread.join(ASKING)
    return said == [True]
