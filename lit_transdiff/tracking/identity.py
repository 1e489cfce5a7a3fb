"""The W&B id of a run folder: one run for all its starts, and another one for its copy."""

from __future__ import annotations

import logging
import secrets
from pathlib import Path

from lit_transdiff.base.files import replace_file
from lit_transdiff.tracking.origin import (
    COPIED_FROM,
    RECORD,
    has_older_sibling,
    is_copy,
    keep_record,
    read_record,
)
from lit_transdiff.tracking.place import SWEEP_SIGN, trial_place
from lit_transdiff.tracking.server import writing_below

log = logging.getLogger(__name__)


def run_id(folder: Path) -> str:
    """The W&B id of a run folder: the id of the sweep's trial, or one generated once.

    A lost id is recovered from W&B's last local files. A copy of a run folder gets a new id, and its record
    names the run that it is a copy of.
    """
    with writing_below(folder / "wandb"):
        return known_id(folder, folder.resolve() / "wandb" / "run_id")


def known_id(folder: Path, file: Path) -> str:
    """The id of a run folder, stored in ``file``."""
    known = file.read_text().strip("\0\n ") if file.exists() else ""
    record = read_record(file)
    if not known:
        file.parent.mkdir(parents=True, exist_ok=True)
        known = first_id(file.parent)
        replace_file(file, known.encode())
    elif is_copy(file) or (not record and has_older_sibling(file)):
        origin = {"run": known, "folder": str(Path(record.get("folder", "")).parent) if record else None}
        known = secrets.token_hex(4)
        text = (
            "%s is a copy of %s, which is the W&B run %s: this one continues as run %s. If no other folder "
            "writes to the first (after a move from another disk), write its id into %s and remove %s there."
        )
        log.warning(text, folder, origin["folder"] or "another folder", origin["run"], known, file, RECORD)
        replace_file(file, known.encode())
        record = {COPIED_FROM: origin}
    keep_record(file, record.get(COPIED_FROM))
    return known


def first_id(wandb_folder: Path) -> str:
    """The W&B id of a folder that has no id yet, or has lost it."""
    earlier = sorted(wandb_folder.glob("*run-*_*-*"), key=lambda place: place.name.split("run-")[-1])
    trial = trial_place()
    # The trials of a copied sweep have the ids of the original's.
    if trial and not (trial.folder and read_record(trial.folder / SWEEP_SIGN).get(COPIED_FROM)):
        return trial.id
    return earlier[-1].name.rpartition("-")[2] if earlier else secrets.token_hex(4)
