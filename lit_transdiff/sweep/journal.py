"""The memory of a local sweep: ``sweep.yaml`` and ``trials.jsonl`` in its folder, one line an event, written before it counts."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from lit_transdiff.base.files import json_of, replace_file, unsealed, with_seal
from lit_transdiff.base.locks import FolderLock
from lit_transdiff.config import is_folder_name, require
from lit_transdiff.config.yaml_text import dump, read_file
from lit_transdiff.sweep.definition import Sweep
from lit_transdiff.sweep.trial import Trial
from lit_transdiff.tracking.origin import COPIED_FROM, is_copy, keep_record, read_record
from lit_transdiff.tracking.place import SWEEP_SIGN

log = logging.getLogger(__name__)


class SweepJournal:
    """Opens the folder for one controller alone; raises ``ValueError`` when it holds another sweep or another controller runs."""

    def __init__(self, folder: Path, sweep: Sweep, seed: int) -> None:
        self.folder = folder
        self.lock = FolderLock(folder, "runs this sweep")  # held until the process ends
        self.lock.take()
        file = folder / SWEEP_SIGN
        given = {"seed": seed, "sweep": sweep.source}
        there = settings_in(file) if file.exists() else given
        if without_cap(there) != without_cap(given):
            raise ValueError(f"{folder} holds another sweep (see sweep.yaml there). Choose another --output.")
        copied = (
            {"folder": read_record(file)["folder"]} if file.exists() and is_copy(file) else read_record(file).get(COPIED_FROM)
        )
        replace_file(file, dump(given).encode())
        keep_record(file, copied)
        self.file = folder / "trials.jsonl"
        drop_cut_line(self.file)

    def write(self, event: str, **content: Any) -> None:
        """Append an event, on disk when this returns."""
        with open(self.file, "a") as file:
            file.write(json.dumps(with_seal({"event": event, **content})) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[Trial]:
        """All trials in the order of their start, each as its last attempt ended.

        A trial's events are ``start``, ``process`` (one for each process), ``end`` (one for each attempt), and ``again`` before
        an attempt after a failure. Damaged lines, and events of trials whose start is in one, are left out.
        """
        past: dict[str, Trial] = {}
        for line in self.file.read_text(errors="replace").splitlines() if self.file.exists() else []:
            if not (event := event_in(line, self.file)):
                continue
            kind, id_ = event.get("event"), str(event.get("id"))
            require(is_folder_name(id_), f"{self.file}: id", id_, "the id of a trial")
            if kind == "start" and "settings" in event:
                past[id_] = Trial(id_, event["settings"])
            elif id_ not in past:
                log.warning("%s: an event of a trial of which no start is there: %s", self.file, line)
            elif kind == "end" and "state" in event:
                past[id_].end(event["state"], event.get("values", []))
            elif kind == "again":
                past[id_].begin_again()
        return list(past.values())


def event_in(line: str, file: Path) -> dict[str, Any]:
    """An event of the journal ``file``; empty, with a warning, for a line that is none, or is not what was written."""
    try:
        event = unsealed(json_of(line))
    except ValueError as error:
        log.warning("%s: a damaged line is left out (%s): %s", file, error, line)
        return {}
    return event if isinstance(event, dict) else {}


def settings_in(file: Path) -> dict[str, Any]:
    """The sweep that a folder was made for. Raises ``ValueError`` naming the file when it holds none."""
    try:
        found = read_file(file)
    except ValueError:
        found = None
    if not isinstance(found, dict) or "sweep" not in found:
        raise ValueError(f"{file} is damaged: it holds no sweep. Remove it if this is the sweep that the folder was made for.")
    return found


def drop_cut_line(file: Path) -> None:
    """Cut a file of lines back to its last whole one; what is written next would go on with a line that a kill cut short."""
    if file.exists():
        content = file.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(file, content.rfind(b"\n") + 1)


def without_cap(given: dict[str, Any]) -> dict[str, Any]:
    """A sweep may be made longer."""
    return {**given, "sweep": {key: value for key, value in given["sweep"].items() if key != "run_cap"}}
