"""Reading runs from the run folders of ``train``, ``evaluate`` and sweeps, without W&B.

A damaged file is skipped with a warning that names it; the rest of its run and the other runs are still read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_transdiff.base.files import crc32_of, read_json
from lit_transdiff.checkpoints.version import read_versioned
from lit_transdiff.config.yaml_text import read_file
from lit_transdiff.evaluation.scores import EVALUATE, FOLDER, value
from lit_transdiff.sampling.pictures import opener
from lit_transdiff.study.records import AXES, Evaluation, Pictures, Run
from lit_transdiff.study.repeats import repeats
from lit_transdiff.tracking.metrics_file import (
    devices_of_starts,
    last_logged,
    read_rows,
    starts_of,
    unless_damaged,
)

if TYPE_CHECKING:
    import pandas as pd

SIGNS = ("metrics.csv", "environment.json", FOLDER)  # beside config.yaml, one of these marks a run folder
log = logging.getLogger(__name__)


def is_run_folder(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and any((folder / sign).exists() for sign in SIGNS)


def run_folders(root: Path, seen: set[Path] | None = None) -> Iterator[Path]:
    """Run folders at and below ``root`` in the order of paths, links last, each only once despite links.

    Run folders are not searched for further runs.
    """
    seen = set() if seen is None else seen
    if root.resolve() in seen:
        return
    seen.add(root.resolve())
    if is_run_folder(root):
        yield root
        return
    below = sorted(
        (path for path in root.iterdir() if path.is_dir()), key=lambda path: (path.is_symlink(), path)
    )
    for folder in below:
        if not root.resolve().is_relative_to(folder.resolve()):  # skip links to a parent folder
            yield from run_folders(folder, seen)


def read_folder(folder: Path) -> Run:
    """Read the run of a run folder; its metrics are read on first use.

    Raises ``ValueError`` if ``config.yaml`` is not the configuration of a run, or a newer version wrote the
    folder.
    """
    devices = devices_of_starts(folder)
    try:
        config = read_file(folder / "config.yaml")  # plain settings, as written at the start of the run
        name, stage, _ = config["name"], config["stage"], config["training"]["max_steps"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / 'config.yaml'} is not the configuration of a run ({error!r})."
        ) from error
    warn_of_other_config(folder)
    tracking = config.get("tracking") or {}
    rows = cache(partial(read_rows, folder / "metrics.csv"))
    id_file = folder / "wandb" / "run_id"
    return Run(
        id=id_file.read_text() if id_file.is_file() else str(folder),
        name=name,
        stage=stage,
        group=tracking.get("group") or "",
        tags=list(tracking.get("tags") or []),
        state=state_of(folder, config),
        config=config,
        where=str(folder),
        read_summary=cache(lambda: last_logged(rows())),
        read_history=cache(lambda: history_of_rows(rows(), devices)),
        read_step=lambda: int(rows()["step"].max()) if len(rows()) else None,
        evaluations=evaluations_in(folder / FOLDER),
        open_pictures=partial(pictures_of, folder),
    )


def warn_of_other_config(folder: Path) -> None:
    """Warn if ``config.yaml`` was changed after the run's last start."""
    starts = starts_of(folder) or [{}]
    file = folder / "config.yaml"
    if starts[-1].get("config_crc32") not in (None, crc32_of(file)):
        log.warning("%s is damaged or was edited after the start of the run.", file)


def state_of(folder: Path, config: dict[str, Any]) -> str:
    """finished if the run's result exists, else unfinished; a folder does not show running processes."""
    if config["stage"] == EVALUATE:
        return "finished" if any((folder / FOLDER).glob("*.json")) else "unfinished"
    export = unless_damaged(read_versioned, folder / "export" / "export.json") or {}
    step = export.get("step")
    return "finished" if isinstance(step, int) and step >= config["training"]["max_steps"] else "unfinished"


def history_of_rows(rows: pd.DataFrame, devices: Sequence[int]) -> pd.DataFrame:
    """Rows of ``metrics.csv`` as one row per step, with device-hours from the ``devices`` of each start."""
    since, start = rows["seconds"].diff(), rows["start"]
    since = since.where((since >= 0) & (start.diff() == 0), rows["seconds"])  # a start counts from 0
    ranks = start.map(lambda k: devices[min(int(k), len(devices) - 1)]).astype(float)
    rows = rows.assign(device_hours=(since * ranks).cumsum() / 3600).drop_duplicates(
        ["step", "metric"], keep="last"
    )
    axes = rows.groupby("step")[["images_seen", "device_hours"]].last()
    table = rows.pivot(index="step", columns="metric", values="value")
    return axes.join(table).reset_index()


def loose_results(root: Path) -> list[Run]:
    """Results below ``root`` outside of run folders, as runs known only from their manifests."""
    folders = (
        folder
        for folder in sorted(root.rglob(FOLDER))
        if folder.is_dir() and not is_run_folder(folder.parent)
    )
    found = [result for folder in folders for result in evaluations_in(folder)]
    return [run_of_results(group) for group in repeats(found)]


def run_of_results(group: list[Evaluation]) -> Run:
    """A run made from the repeats of an evaluation."""
    import pandas as pd

    manifest = group[0].manifest
    evaluation = {
        name: manifest[name]
        for name in ("extractor", "num_images", "label_mode", "num_neighbours")
        if name in manifest
    }
    return Run(
        id=group[0].where,
        name=manifest["run"],
        stage=manifest.get("stage") or EVALUATE,
        group="",
        tags=[],
        state="finished",
        config={"sampling": manifest.get("sampling") or {}, "evaluation": evaluation},
        where=group[0].where,
        read_summary=dict,
        read_history=lambda: pd.DataFrame(columns=list(AXES), dtype=float),
        read_step=lambda: (manifest.get("training") or {}).get("step"),
        evaluations=group,
    )


def evaluations_in(folder: Path) -> list[Evaluation]:
    """The results in the folder ``evaluations``."""
    found = ((file, unless_damaged(read_json, file)) for file in sorted(folder.glob("*.json")))
    return [
        read_evaluation(file, content)
        for file, content in found
        if content is not None and is_result(file, content)
    ]


def is_result(file: Path, content: Any) -> bool:
    """Whether a JSON file is a result; any other content gives a warning."""
    try:
        numbers = [float(value(score)) for score in content["scores"].values()]
        result = (
            len(numbers) > 0
            and isinstance(content["manifest"]["run"], str)
            and has_sampler(content["manifest"])
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        result = False
    if not result:
        log.warning("%s is not a result of evaluate and is left out; remove it or evaluate again.", file)
    return result


def has_sampler(manifest: dict[str, Any]) -> bool:
    """Whether the manifest's sampler, if it has one, has valid numbers."""
    sampling = manifest.get("sampling") or {}
    several = [
        sampling.get(name) or [] for name in ("reference_steps", "reference_guidance", "guidance_interval")
    ]
    numbers = [sampling.get(name, 1) for name in ("guidance_scale", "drift_scale", "noise_scale")]
    numbers += [number for values in several for number in values]
    return all(isinstance(values, list) for values in several) and all(
        isinstance(n, int | float) for n in numbers
    )


def read_evaluation(file: Path, content: dict[str, Any]) -> Evaluation:
    """Read one result with the picture beside its file."""
    picture = file.with_suffix(".png")
    return Evaluation(
        content["scores"], content["manifest"], opener(picture) if picture.is_file() else None, str(file)
    )


def pictures_of(folder: Path) -> Pictures:
    """The pictures of a run by name: ``step-...`` from training, folders of grids (``final``), others."""
    samples = folder / "samples"
    steps = [file for file in sorted(samples.glob("*.png")) if not odd_name(file)]
    others = sorted(samples.glob("*/*.png"))
    names = {file.stem: file for file in steps} | {
        file.parent.name if file.stem == "grid" else file.stem: file for file in others
    }
    return {name: opener(file) for name, file in names.items()}


def odd_name(file: Path) -> bool:
    """Whether a name resembles that of a step but is none, such as ``step-00000006 (copy).png``."""
    odd = file.stem.startswith("step-") and not re.fullmatch(r"step-\d+", file.stem)
    if odd:
        log.warning("%s is not the name of a training step and is skipped.", file)
    return odd
