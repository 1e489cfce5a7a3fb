"""The mirror of a run (``checkpoint.mirror``) around its training: fetched before, uploaded beside."""

from __future__ import annotations

import errno
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from lit_transdiff.base.endings import CheckpointError, RankFailed
from lit_transdiff.base.locks import FolderLock
from lit_transdiff.base.remote import is_remote
from lit_transdiff.checkpoints.export import INFO
from lit_transdiff.checkpoints.mirror import Mirror
from lit_transdiff.checkpoints.mirror_holder import MirrorTaken
from lit_transdiff.checkpoints.run_folder import (
    PLACES,
    changed,
    check_folder,
    last_checkpoint,
    refuse,
    trained_steps,
)
from lit_transdiff.config import RunConfig, require
from lit_transdiff.config.loading import load_run

WAIT = 2.0  # seconds between looks of the other ranks
log = logging.getLogger(__name__)


@contextmanager
def mirrored(run: RunConfig, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Fetch a run that is further in its mirror; the block gets the function that starts uploading.

    At the end of the block the rest is uploaded. ``CheckpointError`` then says if the mirror is incomplete,
    unless ``checkpoint.on_error`` is "continue".
    """
    if run.checkpoint.mirror is None:
        yield lambda: None
        return
    mirror = mirror_of(run)
    if getattr(rank_zero_only, "rank", 0) != 0:
        mirror.look()
        wait_for_first_rank(mirror, run)
        yield lambda: None
        return
    mirror.hold.take()
    try:
        mirror.look()
        if is_further(mirror, run):
            fetch(mirror, run, say)
        yield mirror.start
    except BaseException:
        tell(mirror, run, fails=False)
        raise
    tell(mirror, run, fails=run.checkpoint.on_error == "stop")


@rank_zero_only
def mirror_results(run: RunConfig) -> None:
    """Upload what later steps than training have written to the run folder.

    A process that trains it at the same time does this itself.
    """
    if run.checkpoint.mirror is not None:
        mirror = mirror_of(run)
        try:
            mirror.hold.take(patience=0)
        except MirrorTaken as error:
            log.warning("%s", error)
            return
        mirror.look()
        mirror.start()
        tell(mirror, run, fails=False)


def mirror_of(run: RunConfig) -> Mirror:
    """The mirror of a run, which must not be its own folder."""
    place = f"{run.checkpoint.mirror}/{run.name}"
    own = not is_remote(place) and Path(place).resolve() == run.folder.resolve()
    require(not own, "checkpoint.mirror", run.checkpoint.mirror, "another folder than output_dir")
    return Mirror(run.folder, place)


def is_further(mirror: Mirror, run: RunConfig) -> bool:
    """Whether the mirror has a newer checkpoint than the run folder, or the trained model that it lacks."""
    checkpoint = last_checkpoint(run)
    step = max(checkpoint.step if checkpoint else 0, trained_steps(run))
    return max(mirror.steps(), default=0) > step or (step == 0 and f"export/{INFO}" in mirror.there)


def fetch(mirror: Mirror, run: RunConfig, say: Callable[[str], None]) -> None:
    """Download the run. Refuses a mirror, or a folder, of a run with other settings."""
    check_folder(run)
    if "config.yaml" in mirror.there:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "config.yaml")
            file.write_bytes(mirror.remote.read(file.name))
            changes = changed(load_run(file), run, {})
        # the content at changed paths is compared when the checkpoint is there
        refuse(mirror.remote, {name: both for name, both in changes.items() if name not in PLACES})
    with FolderLock(run.folder) as lock:
        lock.take()
        step = mirror.fetch()
    what = "its trained model" if step is None else f"its checkpoint of step {step}"
    say(f"{run.name}: {what} comes from {mirror.remote}")


def wait_for_first_rank(mirror: Mirror, run: RunConfig) -> None:
    """Wait until the first rank has fetched the run."""
    deadline = time.monotonic() + 60 * run.distributed.timeout_minutes
    while is_further(mirror, run):
        if time.monotonic() > deadline:
            raise RankFailed(f"{run.folder}: the first rank has not fetched it from {mirror.remote}.")
        time.sleep(WAIT)
        mirror.look()


def tell(mirror: Mirror, run: RunConfig, fails: bool) -> None:
    """Upload the rest and say if that is impossible."""
    problem = mirror.finish()
    if not problem:
        return
    way = f"What {run.folder} holds is complete; the same command uploads the rest."
    text = f"{mirror.remote} is not complete: {problem} {way}"
    if fails:
        raise CheckpointError(errno.EIO, text)
    log.warning("checkpoint.mirror: %s", text)
