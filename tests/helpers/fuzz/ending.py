"""A command in this process, with little memory, that is asked to stop when it takes long: how it ends and
what it says.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import resource
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path

from lit_transdiff.__main__ import RESUMABLE, main

PATIENCE, GRACE = 5, 40  # seconds after which a command is asked to stop, and after which it hangs
MEMORY = 4 << 30  # bytes that an attempt may take: sizes that cannot work are refused before
NAMES = [function.__name__.removesuffix("_command") for function in RESUMABLE]


class Hangs(BaseException):
    """A command did not end when it was asked to."""


@contextlib.contextmanager
def asked_to_stop(command: str, patience: float) -> Iterator[None]:
    """After a while the command is asked to stop; when it does not, ``Hangs``."""
    asked = signal.SIGTERM if command in NAMES else signal.SIGINT
    rings = iter(["ask", "hang"])

    def ring(number: int, frame: object) -> None:
        if next(rings) == "hang":
            faulthandler.dump_traceback()
            raise Hangs
        signal.setitimer(signal.ITIMER_REAL, GRACE)
        os.kill(os.getpid(), asked)

    def too_late(number: int, frame: object) -> None:
        """The command has ended by itself just before it was asked to."""

    before = {signal.SIGALRM: signal.signal(signal.SIGALRM, ring), asked: signal.signal(asked, too_late)}
    signal.setitimer(signal.ITIMER_REAL, patience)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def told_by(words: list[str], patience: float = PATIENCE) -> tuple[object, str]:
    """The exit code of a command and its standard error, or its traceback."""
    said = io.StringIO()
    quiet = contextlib.redirect_stdout(io.StringIO())
    with contextlib.redirect_stderr(said), quiet, little_memory(), asked_to_stop(words[0], patience):
        try:
            return main(words), said.getvalue()
        except SystemExit as end:
            return end.code, said.getvalue()
        except (Exception, Hangs, KeyboardInterrupt):
            return "none", said.getvalue() + traceback.format_exc()
