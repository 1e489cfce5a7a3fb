"""Reading runs from anywhere: ``runs("runs/fashion")``, ``runs("entity/project", {"group": "lr"})``."""

from __future__ import annotations

import io
import logging
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from lit_transdiff.base.files import NoSpaceError, folder_of_this_process, require_space, whole
from lit_transdiff.config import require
from lit_transdiff.config.paths import local_path
from lit_transdiff.config.targets import below, check_replaces
from lit_transdiff.evaluation.scores import FOLDER
from lit_transdiff.sampling.pictures import narrowed, opener
from lit_transdiff.study.folders import loose_results, read_folder, run_folders
from lit_transdiff.study.records import Run, check_filters, fits, opened_pictures
from lit_transdiff.study.wandb_logs import log_files, read_log, read_server

KEPT = ("config.yaml", "metrics.csv", "environment.json", "export/export.json")  # in archives
# Of a sweep or study, which continues where an archive is unpacked.
JOURNAL = ("sweep.yaml", "trials.jsonl", "inputs.json")
RESULTS, PICTURES = (f"{FOLDER}/*.json",), (f"{FOLDER}/*.png", "samples/*.png", "samples/*/*.png")
# Width of a picture in an archive, but at least a fraction of its own at which labels are legible.
SHRUNK, READABLE = 320, 0.45
COLOURS = 32
log = logging.getLogger(__name__)


def runs(where: str | Path, filters: Mapping[str, Any] | None = None) -> list[Run]:
    """All runs at ``where`` that match ``filters`` (see ``records.fits``), sorted by name.

    ``where`` is a folder of run folders, a run folder, an archive of them (``.zip``), a folder of offline W&B
    runs, a ``.wandb`` file, or ``entity/project`` at W&B. Raises ``FileNotFoundError`` for anything else.
    """
    check_filters(filters or {})
    path = local_path(where)
    if path is None:
        found = read_server(str(where), filters or {})
    else:
        found = read_local(unpacked(path.resolve(), path.stat().st_mtime) if path.suffix == ".zip" else path)
    return sorted((run for run in found if fits(run, filters or {})), key=lambda run: (run.group, run.name))


def of_group(candidates: Sequence[Run], *groups: str) -> list[Run]:
    """The runs of these groups (experiments or sweeps), or all runs if no run belongs to them."""
    return [run for run in candidates if run.group in groups] or list(candidates)


def read_local(path: Path) -> list[Run]:
    """Read the run folders at and below a path or, if there are none, W&B's logs."""
    folders = list(run_folders(path)) if path.is_dir() else []
    found = read_all(read_folder, folders) + (loose_results(path) if path.is_dir() else [])
    found = found or read_all(read_log, log_files(path))
    if not found:
        signs = f"config.yaml with metrics.csv or {FOLDER}/, or run-*.wandb"
        raise FileNotFoundError(f"{path} contains no run ({signs}).")
    return found


def read_all(read: Callable[[Any], Run], places: Sequence[Any]) -> list[Run]:
    """Read the runs at ``places``; unreadable ones are skipped with a warning."""
    found = []
    for place in places:
        try:
            found.append(read(place))
        except ValueError as error:
            log.warning("%s Skipped.", error)
    return found


@cache
def unpacked(file: Path, changed: float) -> Path:
    """Unpack an archive, once per version, to a temporary folder that lasts as long as this process.

    Raises ``ValueError`` that names the archive if it is not a zip file, damaged or encrypted, or if a name
    in it leads out of the folder.
    """
    folder = folder_of_this_process("lit-transdiff-runs-")
    try:
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                below(folder, name.rstrip("/"), f"{file}: entry")
            require_space(folder, sum(entry.file_size for entry in archive.infolist()))
            archive.extractall(folder)
    except NoSpaceError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
        text = f"{file} is not a complete zip archive of runs ({error}). Copy it again from its source."
        raise ValueError(text) from error
    return folder


def archive(
    folder: str | Path, file: str | Path, *, pictures_of: Callable[[Path], bool] = lambda run: True
) -> Path:
    """Write the run folders below ``folder``, without weights, and the journals of sweeps to a ``.zip``.

    Pictures are reduced in size, and included only for run folders for which ``pictures_of`` is true.
    """
    folder, file = Path(folder), Path(file)
    require(file.suffix == ".zip", "file", str(file), "a name ending in .zip")
    check_replaces(file, [KEPT[0], *JOURNAL], "an archive of runs")
    with whole(file) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as packed:
        found = list(run_folders(folder))
        journals = {run.parent / name for run in found for name in JOURNAL}
        for file_of_sweep in sorted(path for path in journals if path.is_file()):
            packed.write(file_of_sweep, file_of_sweep.relative_to(folder))
        for run in found:
            results = [file for pattern in RESULTS for file in sorted(run.glob(pattern))]
            for part in [*(run / name for name in KEPT), *results]:
                if part.is_file():
                    packed.write(part, part.relative_to(folder))
            places = [place for pattern in PICTURES for place in sorted(run.glob(pattern))]
            pictures = {str(place.relative_to(folder)): opener(place) for place in places}
            for name, picture in opened_pictures(pictures if pictures_of(run) else {}).items():
                packed.writestr(name, shrunk(picture))
    return file


def shrunk(picture: Image.Image) -> bytes:
    """Encode a picture as a small PNG."""
    buffer = io.BytesIO()
    small = narrowed(picture, max(SHRUNK, round(READABLE * picture.width)))
    small.quantize(COLOURS).save(buffer, format="png", optimize=True)
    return buffer.getvalue()
