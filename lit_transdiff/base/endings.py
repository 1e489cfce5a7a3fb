"""How a process ends when it has not done what it should: exit codes for schedulers, and the errors behind them.

0 done; 1 training, or a trial of a sweep, failed; 2 a bad setting, a missing file, or a run that another process trains; 75 asked
to stop, start it again; 76 stalled; 130 Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

EXIT_REQUEUE = 75  # "temporary failure" of sysexits.h: the same command again goes on
EXIT_STALLED = 76  # to be started again a limited number of times
EXIT_INTERRUPTED = 130  # as shells say of Ctrl-C: nothing starts it again by itself

# A scheduler before a time limit and when it takes a machine back, a closed terminal, Ctrl-C.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
SAME_KEY = 1.0  # seconds in which a second SIGINT is still that of the first Ctrl-C: terminals and launchers both send it


class Preempted(BaseException):
    """The process ends because it was asked to; what was done is on disk. Like Ctrl-C, no ``except Exception`` keeps it."""

    def __init__(self, reason: str, code: int = EXIT_REQUEUE) -> None:
        super().__init__(reason)
        self.code = code


class TrialsFailed(Exception):
    """Trials of a sweep have failed; the others are there."""


class CheckpointError(OSError):
    """A checkpoint could not be written."""


class RankFailed(RuntimeError):
    """What this process waited for did not come: another rank has failed, or is too slow."""


def code_of(number: int) -> int:
    """The exit code of a process that a signal asked to stop."""
    return EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_REQUEUE


def leave(number: int, frame: FrameType | None) -> None:
    """A signal handler that ends the process as one that is to be started again."""
    name = signal.Signals(number).name
    raise Preempted(f"asked to stop ({name}): the same command goes on with what was not done yet.", code_of(number))


def leave_undone(number: int, frame: FrameType | None) -> None:
    """The same where nothing is left to go on with."""
    name = signal.Signals(number).name
    raise Preempted(f"asked to stop ({name}): nothing is finished; the same command begins anew.", code_of(number))


@contextmanager
def ending_when_asked(
    handler: Callable[[int, FrameType | None], Any] = leave, numbers: Sequence[int] = STOP_SIGNALS
) -> Iterator[None]:
    """Signals go to ``handler`` in the block, but those that the process ignores; a second Ctrl-C there quits at once."""
    main = threading.current_thread() is threading.main_thread()  # only there can signals be taken
    heard = [number for number in numbers if main and signal.getsignal(number) != signal.SIG_IGN]  # under nohup not all
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        with asking_again(), quitting_when_asked_twice():
            yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def asking_again() -> Iterator[None]:
    """A signal of the block that came while Python took an object apart (``__del__``), where it drops errors, is sent again."""
    before, timers = sys.unraisablehook, list[threading.Timer]()

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if isinstance(dropped.exc_value, Preempted):
            number = signal.SIGINT if dropped.exc_value.code == EXIT_INTERRUPTED else signal.SIGTERM
            timers.append(threading.Timer(0.05, os.kill, (os.getpid(), number)))  # later: this may be inside of another __del__
            timers[-1].start()
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in timers:
            timer.cancel()


@contextmanager
def quitting_when_asked_twice() -> Iterator[None]:
    """The second Ctrl-C in the block ends the process at once, whatever it waits for: a thread hears it beside the handler."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outer = signal.set_wakeup_fd(-1)
    if outer != -1:  # someone listens already
        signal.set_wakeup_fd(outer, warn_on_full_buffer=False)
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=quit_at_the_second, args=(reader,), daemon=True, name="Ctrl-C").start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        os.close(writer)


def quit_at_the_second(reader: int) -> None:
    """The thread: reads the numbers of the signals as they come."""
    first: float | None = None
    while number := os.read(reader, 1):
        if number[0] != signal.SIGINT:
            continue
        if first is None:
            first = time.monotonic()
        elif time.monotonic() - first > SAME_KEY:
            os.write(2, b"\nlit-transdiff: Ctrl-C again: quit at once. What was complete on disk is complete.\n")
            os._exit(EXIT_INTERRUPTED)
    os.close(reader)
