"""What a W&B server and its folder may cost a run: waits that end, and what is gone without."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from lit_transdiff.base.files import is_full

if TYPE_CHECKING:
    import wandb

FINISH_TIMEOUT = 300.0  # seconds that its end may, with the upload of a model; WANDB_FINISH_TIMEOUT says otherwise
MARGIN = 20.0  # seconds after that; before they are over the client has written its log to disk, as it does every 15 s
log = logging.getLogger(__name__)


@contextmanager
def going_on_without(name: str) -> Iterator[None]:
    """What the client must ask the server for in the block is left out, with a warning, when the server does not answer.

    The client has an error of its own for each of its parts; what the server keeps beside the numbers is worth no run.
    """
    try:
        yield
    except Exception as error:
        log.warning("W&B does not answer, and goes without %s; the numbers are not lost (%s)", name, " ".join(str(error).split()))


@contextmanager
def writing_below(place: Path) -> Iterator[None]:
    """A folder of W&B's that cannot be written to is a refusal that says how to go on."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise
        allowed = "a folder that can be written to; tracking.wandb=false goes without W&B"
        raise ValueError(f"{place}: got {error.strerror!r}; allowed: {allowed}.") from error


def finish_timeout() -> float:
    """Seconds that the end of a run may wait for the server."""
    return float(os.environ.get("WANDB_FINISH_TIMEOUT", FINISH_TIMEOUT))


def finished_within(seconds: float, opened: wandb.Run, exit_code: int) -> bool:
    """Close a run, whose log is on disk before; whether that has ended in about this time.

    The client waits for a server that takes questions and does not answer, or answers with an error, for as long as it does so,
    whatever its ``finish_timeout``; and its service would do the same when this process ends.
    """

    def finish() -> None:
        with going_on_without("the end of the run"):
            opened.finish(exit_code)

    thread = threading.Thread(target=finish, name="wandb finish", daemon=True)
    thread.start()
    thread.join(seconds + MARGIN)
    if thread.is_alive():
        end_service()
        return False
    return True


def end_service() -> None:
    """End the client's service, which would wait for the server; the next run starts another."""
    import wandb

    services = [child for child in psutil.Process().children() if "wandb" in child.name()]
    for service in services:
        service.kill()
    psutil.wait_procs(services, MARGIN)
    os.environ.pop("WANDB_SERVICE", None)  # where this process and its children look for it
    with going_on_without("the end of its service"):
        wandb.teardown()
