"""The journal of a local sweep: ``sweep.yaml``, and ``trials.jsonl`` with one line per event."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_transdiff.base.files import json_of, replace_file, unsealed, with_seal
from lit_transdiff.base.locks import FolderLock
from lit_transdiff.config import is_folder_name, require
from lit_transdiff.config.yaml_text import dump, read_file
from lit_transdiff.sweep.definition import Sweep
from lit_transdiff.sweep.trial import Trial
from lit_transdiff.tracking.metrics_file import drop_cut_line
from lit_transdiff.tracking.origin import COPIED_FROM, is_copy, keep_record, read_record
from lit_transdiff.tracking.place import SWEEP_SIGN

CAPS = ("run_cap", "budget", "launcher")
log = logging.getLogger(__name__)


class SweepJournal:
    """The journal in a sweep's folder, open for a single controller.

    Raises ``ValueError`` if the folder belongs to another sweep or another controller is running.
    """

    def __init__(self, folder: Path, sweep: Sweep, seed: int) -> None:
        self.folder = folder
        self.lock = FolderLock(folder, "runs this sweep")  # locked until the process ends
        self.lock.take()
        file = folder / SWEEP_SIGN
        given = {"seed": seed, "sweep": sweep.source}
        there = settings_in(file) if file.exists() else given
        if without_cap(there) != without_cap(given):
            raise ValueError(f"{folder} holds another sweep (see sweep.yaml there). Choose another --output.")
        record = read_record(file)
        is_new_copy = file.exists() and is_copy(file)
        copied = {"folder": record["folder"]} if is_new_copy else record.get(COPIED_FROM)
        replace_file(file, dump(given).encode())
        keep_record(file, copied)
        self.file = folder / "trials.jsonl"
        drop_cut_line(self.file)

    def write(self, event: str, **content: Any) -> None:
        """Append an event and flush it to disk."""
        with open(self.file, "a") as file:
            file.write(json.dumps(with_seal({"event": event, **content})) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[Trial]:
        """All trials in the order of their start, each in the state of its last attempt.

        The events of a trial are ``start``, ``process`` (per process), ``end`` (per attempt), and ``again``
        before another attempt after a failure. Damaged lines are skipped, and so are the events of a trial
        whose start was in a damaged line.
        """
        past: dict[str, Trial] = {}
        for event in self.events():
            kind, id_ = event.get("event"), event["id"]
            if kind == "start" and "settings" in event:
                past[id_] = Trial(id_, event["settings"])
            elif id_ not in past:
                log.warning("%s: an event of a trial without a start: %s", self.file, json.dumps(event))
            elif kind == "end" and "state" in event:
                past[id_].end(event["state"], event.get("values", []))
            elif kind == "again":
                past[id_].begin_again()
        return list(past.values())

    def records(self) -> dict[str, dict[str, Any]]:
        """The record of the process or job of every attempt that has not ended, by trial."""
        found: dict[str, dict[str, Any]] = {}
        for event in self.events():
            found.pop(event["id"], None)
            if event.get("event") == "process":
                found[event["id"]] = event
        return found

    def events(self) -> Iterator[dict[str, Any]]:
        """The events in their order."""
        for line in self.file.read_text(errors="replace").splitlines() if self.file.exists() else []:
            if event := event_in(line, self.file):
                id_ = str(event.get("id"))
                require(is_folder_name(id_), f"{self.file}: id", id_, "the id of a trial")
                yield {**event, "id": id_}


def event_in(line: str, file: Path) -> dict[str, Any]:
    """Parse an event of the journal ``file``; empty, with a warning, for a damaged line."""
    try:
        event = unsealed(json_of(line))
    except ValueError as error:
        log.warning("%s: a damaged line is skipped (%s): %s", file, error, line)
        return {}
    return event if isinstance(event, dict) else {}


def settings_in(file: Path) -> dict[str, Any]:
    """The sweep settings of a folder. Raises ``ValueError`` that names the file if it has none."""
    try:
        found = read_file(file)
    except ValueError:
        found = None
    if not isinstance(found, dict) or "sweep" not in found:
        way = "Remove it if this is the sweep that the folder was made for."
        raise ValueError(f"{file} is damaged: it holds no sweep. {way}")
    return found


def without_cap(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without those that may change between calls: ``run_cap``, ``budget`` and ``launcher``."""
    return {**settings, "sweep": {key: value for key, value in settings["sweep"].items() if key not in CAPS}}
