"""How a process ends when it has not done what it should: exit codes for schedulers, and the errors behind them.

0 done; 1 training, or a trial of a sweep, failed; 2 a bad setting, a missing file, or a run that another process trains; 75 asked
to stop, start it again; 76 stalled.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_REQUEUE = 75  # "temporary failure" of sysexits.h: the same command again goes on
EXIT_STALLED = 76  # to be started again a limited number of times


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # as schedulers send them before a time limit and when they take a machine back


class Preempted(BaseException):
    """The process ends because it was asked to; what was done is on disk. Like Ctrl-C, no ``except Exception`` keeps it."""


class TrialsFailed(Exception):
    """Trials of a sweep have failed; the others are there."""


class CheckpointError(OSError):
    """A checkpoint could not be written."""


def leave(number: int, frame: FrameType | None) -> None:
    """A signal handler that ends the process as one that is to be started again."""
    raise Preempted(f"asked to stop ({signal.Signals(number).name}): the same command goes on with what was not done yet.")


@contextmanager
def ending_when_asked() -> Iterator[None]:
    """STOP_SIGNALS end the block with ``Preempted``; training in it takes them itself, and ends between two steps."""
    main = threading.current_thread() is threading.main_thread()  # only there can signals be taken
    before = {number: signal.signal(number, leave) for number in STOP_SIGNALS} if main else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
