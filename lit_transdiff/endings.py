"""How a process ends when it has not done what it should: exit codes for schedulers, and the errors behind them.

0 done; 1 training failed; 2 a bad setting or a missing file; 75 asked to stop, start it again; 76 stalled.
"""

from __future__ import annotations

EXIT_REQUEUE = 75  # "temporary failure" of sysexits.h: the same command again goes on
EXIT_STALLED = 76  # to be started again a limited number of times


class Preempted(Exception):
    """Training has stopped because it was asked to; a checkpoint of the last step is there."""


class CheckpointError(OSError):
    """A checkpoint could not be written."""
