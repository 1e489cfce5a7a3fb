"""Kept results of a study: an archive beside its file, from which the same command continues anywhere.

The results are those of certain input files, as a checkpoint. Their hashes are kept with the results, and a
study whose inputs have changed is refused: old and new scores do not compare.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lit_transdiff.base.files import read_json, replace_file, short_hash
from lit_transdiff.config import require
from lit_transdiff.study.runs import JOURNAL, archive, unpacked
from lit_transdiff.sweep.definition import Sweep
from lit_transdiff.sweep.journal import settings_in, without_cap
from lit_transdiff.tracking.place import SWEEP_SIGN

INPUTS = JOURNAL[-1]  # the hashes of a study's input files


def results_file(file: str | Path) -> Path:
    """The archive of the results of a study's ``file``."""
    return Path(file).with_suffix(".zip")


def bring_results(sweep: Sweep, file: str | Path, folder: Path) -> str | None:
    """Copy the kept results of a study's ``file`` to ``folder``, unless there are none or it has its own.

    Returns a sentence about them. Results for other inputs than today's are left where they are. Raises
    ``ValueError`` if they are of another version of the file.
    """
    kept = results_file(file)
    if (folder / SWEEP_SIGN).exists() or not kept.is_file():
        return None
    found = unpacked(kept.resolve(), kept.stat().st_mtime)
    there, given = settings_in(found / SWEEP_SIGN), {"seed": 0, "sweep": sweep.source}
    if without_cap(there) != without_cap(given):
        raise ValueError(f"{kept} has the results of another version of {file}. Rename one of them.")
    if hashes(sweep.study.inputs) != known_inputs(found):
        return f"{kept} has results for other inputs; this begins anew."
    shutil.copytree(found, folder, dirs_exist_ok=True)
    return f"This continues the results of {kept}."


def check_same_inputs(sweep: Sweep, folder: Path) -> None:
    """Keep the hashes of a study's inputs in ``folder``; refuse inputs other than those of its results."""
    now = hashes(sweep.study.inputs)
    if (folder / SWEEP_SIGN).exists():
        before = known_inputs(folder)
        for path, own in now.items():
            allowed = f"{before.get(path)}, as when they began; or move this folder away to begin anew"
            require(before.get(path) == own, f"results in {folder}: inputs: {path}", own, allowed)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / INPUTS, json.dumps(now, indent=1).encode())


def known_inputs(folder: Path) -> dict[str, str]:
    """The hashes of the input files of the results in ``folder``."""
    known: dict[str, str] = read_json(folder / INPUTS) if (folder / INPUTS).is_file() else {}
    return known


def inputs_in_words(folder: Path) -> list[str]:
    """A sentence about the input files of the results in ``folder``, if any."""
    known = known_inputs(folder)
    return [f"For {', '.join(f'{path} ({own})' for path, own in known.items())}."] if known else []


def hashes(paths: list[str]) -> dict[str, str]:
    """The short hash of every file."""
    for path in paths:
        require(Path(path).is_file(), "inputs", path, "files that exist")
    return {path: short_hash(Path(path)) for path in paths}


def keep_results(folder: Path, file: str | Path) -> Path:
    """Write the results in ``folder``, without weights and pictures, to the archive of a study's ``file``."""
    return archive(folder, results_file(file), pictures_of=lambda run: False)
