"""The memory of a local sweep: ``sweep.yaml`` and ``trials.jsonl`` in its folder, one line an event, written before it counts."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_transdiff.sweep.file import SweepFile
from lit_transdiff.sweep.trial import Trial


@dataclass(frozen=True)
class Past:
    """A trial of an earlier start, and the process that ran it."""

    trial: Trial
    pid: int | None


class Journal:
    """Opens the folder for one controller alone; raises ``ValueError`` when it holds another sweep or another controller runs."""

    def __init__(self, folder: Path, sweep: SweepFile, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.lock = open(folder / "lock", "w")  # noqa: SIM115 - held until the process ends
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{folder}: another process runs this sweep.") from error
        file = folder / "sweep.yaml"
        given = {"seed": seed, "sweep": sweep.source}
        if file.exists():
            there = yaml.safe_load(file.read_text())
            if without_cap(there) != without_cap(given):
                raise ValueError(f"{folder} holds another sweep (see sweep.yaml there). Choose another --output.")
        file.write_text(yaml.safe_dump(given, sort_keys=False))
        self.file = folder / "trials.jsonl"

    def write(self, event: str, **content: Any) -> None:
        """Append an event, on disk when this returns."""
        with open(self.file, "a") as file:
            file.write(json.dumps({"event": event, **content}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[Past]:
        """All trials in the order of their start. A last line that a kill cut short is left out."""
        past: dict[str, Past] = {}
        for line in self.file.read_text().splitlines() if self.file.exists() else []:
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue
            kind, id_ = event["event"], event["id"]
            if kind == "start":
                past[id_] = Past(Trial(id_, event["settings"]), None)
            elif kind == "process":
                past[id_] = Past(past[id_].trial, event["pid"])
            else:
                past[id_].trial.state, past[id_].trial.values = event["state"], event["values"]
        return list(past.values())


def without_cap(given: dict[str, Any]) -> dict[str, Any]:
    """A sweep may be made longer."""
    return {**given, "sweep": {key: value for key, value in given["sweep"].items() if key != "run_cap"}}
