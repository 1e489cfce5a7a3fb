"""Limits on the effect of a W&B server or folder in trouble: bounded waits, and skipped uploads."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeVar

import psutil

from lit_transdiff.base.files import is_full
from lit_transdiff.base.remote_errors import one_line
from lit_transdiff.config import require

if TYPE_CHECKING:
    import wandb

FINISH_TIMEOUT = 300.0  # seconds for the end of a run with the upload of a model; see WANDB_FINISH_TIMEOUT
ANSWER_TIMEOUT = 60.0  # seconds for a request about runs; see WANDB_HTTP_TIMEOUT
MARGIN = 20.0  # further seconds, in which the client writes its log to disk (it does so every 15 s)
Answer = TypeVar("Answer")
log = logging.getLogger(__name__)


@contextmanager
def going_on_without(name: str) -> Iterator[None]:
    """Skip the requests in the block with a warning if the server does not answer.

    Any error is caught, because the parts of the client raise errors of different types and nothing that the
    server stores beside the numbers is worth a failed run.
    """
    try:
        yield
    except Exception as error:
        log.warning("W&B does not answer and skips %s; the numbers are not lost (%s)", name, one_line(error))


@contextmanager
def writing_below(place: Path) -> Iterator[None]:
    """Turn an error of writing to W&B's folder into a ``ValueError`` that tells how to continue."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise
        allowed = "a folder that can be written to; tracking.wandb=false goes without W&B"
        raise ValueError(f"{place}: got {error.strerror!r}; allowed: {allowed}.") from error


def wait_of(variable: str, otherwise: float) -> float:
    """The number of seconds in one of W&B's environment variables."""
    said = os.environ.get(variable) or str(otherwise)
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0.0
    require(0 < seconds < threading.TIMEOUT_MAX, variable, said, "seconds above 0, or not set")
    return seconds


def finish_timeout() -> float:
    """The most seconds that the end of a run waits for the server."""
    return wait_of("WANDB_FINISH_TIMEOUT", FINISH_TIMEOUT)


def finished_within(seconds: float, run: wandb.Run, exit_code: int) -> bool:
    """Close a run, whose log is already on disk, and return whether that took at most about ``seconds``.

    The client ignores its ``finish_timeout`` and waits indefinitely for a server that accepts requests
    without answering, or answers with errors; its service would do the same at the end of this process.
    """

    def finish() -> None:
        with going_on_without("the end of the run"):
            run.finish(exit_code)

    thread = threading.Thread(target=finish, name="wandb finish", daemon=True)
    thread.start()
    thread.join(seconds + MARGIN)
    if thread.is_alive():
        end_service()
        return False
    return True


def answer_timeout() -> float:
    """The most seconds that a request about runs waits for the server."""
    return wait_of("WANDB_HTTP_TIMEOUT", ANSWER_TIMEOUT)


def answers(question: Callable[[], Iterable[Answer]], what: str) -> Iterator[Answer]:
    """The parts of the server's answer to a request of the public API; ``what`` describes it in messages.

    Raises ``ConnectionError`` if the client raises an error, or the server is silent for ``answer_timeout``
    seconds. For rows and files, the client itself would wait indefinitely.
    """
    seconds = answer_timeout()
    parts: SimpleQueue[tuple[list[Answer], Exception | None]] = SimpleQueue()

    def ask() -> None:
        try:
            for part in question():
                parts.put(([part], None))
            parts.put(([], None))
        except Exception as error:  # the parts of the client raise errors of different types
            parts.put(([], error))

    threading.Thread(target=ask, name="wandb question", daemon=True).start()
    while True:
        try:
            part, error = parts.get(timeout=seconds)
        except Empty:
            error = TimeoutError(f"no answer in {seconds:g} s")
        if error is not None:
            end_service()  # otherwise it repeats the request and delays the end of this process
            way_on = "Try again later (WANDB_HTTP_TIMEOUT waits longer), or name a folder of runs."
            raise ConnectionError(f"W&B does not give {what} ({one_line(error)}). {way_on}") from error
        if not part:
            return
        yield part[0]


def end_service() -> None:
    """End the client's service, which would wait for the server; the next run starts a new one."""
    import wandb

    services = [child for child in psutil.Process().children() if "wandb" in child.name()]
    for service in services:
        service.kill()
    psutil.wait_procs(services, MARGIN)
    os.environ.pop("WANDB_SERVICE", None)  # the address of the service for this process and its children
    with going_on_without("the end of its service"):
        wandb.teardown()
