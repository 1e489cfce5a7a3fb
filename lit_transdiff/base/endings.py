"""Exit codes for schedulers, and the errors behind them.

0 success; 1 training, or a trial of a sweep, failed; 2 a bad setting, a missing file, or a run that another
process trains; 75 stopped on request, to be started again; 76 stalled; 130 Ctrl-C.
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

EXIT_REQUEUE = 75  # "temporary failure" of sysexits.h: the same command continues
EXIT_STALLED = 76  # to be started again a limited number of times
EXIT_INTERRUPTED = 130  # the code of shells for Ctrl-C: nothing restarts it automatically

# Sent by a scheduler before a time limit or when it reclaims a machine, by a closed terminal, and by Ctrl-C.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
# Seconds in which a second SIGINT counts as the first Ctrl-C, because terminals and launchers both send it.
SAME_KEY = 1.0


class Preempted(BaseException):
    """The process was asked to end; finished work is on disk. No ``except Exception`` catches it."""

    def __init__(self, reason: str, code: int = EXIT_REQUEUE) -> None:
        super().__init__(reason)
        self.code = code


class TrialsFailed(Exception):
    """Some trials of a sweep failed; the results of the others are complete."""


class CheckpointError(OSError):
    """A checkpoint could not be written."""


class HubError(OSError):
    """The Hugging Face Hub did not answer, or could not."""


class RankFailed(RuntimeError):
    """A collective operation did not complete: another rank failed or is too slow."""


def code_of(number: int) -> int:
    """The exit code of a process that a signal asked to stop."""
    return EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_REQUEUE


def leave(number: int, frame: FrameType | None) -> None:
    """Signal handler: end the process with the exit code of one that should be started again."""
    name = signal.Signals(number).name
    raise Preempted(
        f"asked to stop ({name}): the same command goes on with what was not done yet.", code_of(number)
    )


def leave_undone(number: int, frame: FrameType | None) -> None:
    """Signal handler for commands that cannot continue: the same command begins again from the start."""
    name = signal.Signals(number).name
    raise Preempted(
        f"asked to stop ({name}): nothing is finished; the same command begins anew.", code_of(number)
    )


@contextmanager
def ending_when_asked(
    handler: Callable[[int, FrameType | None], Any] = leave, numbers: Sequence[int] = STOP_SIGNALS
) -> Iterator[None]:
    """Handle the signals by ``handler`` in the block, except ignored ones; a second Ctrl-C quits at once."""
    main = threading.current_thread() is threading.main_thread()  # Python takes signals only there
    # nohup ignores some
    heard = [number for number in numbers if main and signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        with asking_again(), quitting_when_asked_twice():
            yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def asking_again() -> Iterator[None]:
    """Send a signal again whose exception Python dropped because it was raised inside a ``__del__``."""
    before, timers = sys.unraisablehook, list[threading.Timer]()

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if isinstance(dropped.exc_value, Preempted):
            number = signal.SIGINT if dropped.exc_value.code == EXIT_INTERRUPTED else signal.SIGTERM
            # Later, because this may be inside another __del__.
            timers.append(threading.Timer(0.05, os.kill, (os.getpid(), number)))
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
    """Quit at the second Ctrl-C in the block, whatever the main thread waits for: another thread watches."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outer = signal.set_wakeup_fd(-1)
    if outer != -1:  # another listener exists
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
    """The thread's function: read signal numbers as they arrive."""
    first: float | None = None
    while number := os.read(reader, 1):
        if number[0] != signal.SIGINT:
            continue
        if first is None:
            first = time.monotonic()
        elif time.monotonic() - first > SAME_KEY:
            os.write(
                2, b"\nlit-transdiff: Ctrl-C again: quit at once. What was complete on disk is complete.\n"
            )
            os._exit(EXIT_INTERRUPTED)
    os.close(reader)
