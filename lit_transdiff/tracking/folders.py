"""Runs from run folders: what ``train``, ``evaluate`` and sweeps leave, without W&B."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lit_transdiff.evaluation.scores import FOLDER
from lit_transdiff.loading import plain, read_yaml
from lit_transdiff.tracking.records import AXES, Evaluation, Pictures, Run, last_values

if TYPE_CHECKING:
    import pandas as pd

SIGNS = ("metrics.csv", "environment.json", FOLDER)  # a folder with config.yaml and one of these is a run's


def is_run_folder(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and any((folder / sign).exists() for sign in SIGNS)


def run_folders(root: Path) -> Iterator[Path]:
    """Run folders at and below ``root``, in the order of paths; inside of a run none is looked for."""
    if is_run_folder(root):
        yield root
        return
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        yield from run_folders(folder)


def read_folder(folder: Path) -> Run:
    """The run of a run folder; its history is read when it is asked for."""
    config = plain(read_yaml(folder / "config.yaml"))
    tracking = config.get("tracking") or {}
    devices = device_count(folder)
    history = read_metrics(folder / "metrics.csv", devices)
    id_file = folder / "wandb" / "run_id"
    return Run(
        id=id_file.read_text() if id_file.is_file() else str(folder),
        name=config["name"],
        stage=config["stage"],
        group=tracking.get("group") or "",
        tags=list(tracking.get("tags") or []),
        state=state_of(folder, config),
        config=config,
        summary=last_values(history),
        where=str(folder),
        read_history=lambda: history,
        evaluations=[read_evaluation(file) for file in sorted((folder / FOLDER).glob("*.json"))],
        open_pictures=partial(pictures_of, folder),
    )


def state_of(folder: Path, config: dict[str, Any]) -> str:
    """finished, when there is what the run is for; unfinished otherwise: a folder does not say whether a process runs."""
    if config["stage"] == "evaluate":
        return "finished" if any((folder / FOLDER).glob("*.json")) else "unfinished"
    export = folder / "export" / "export.json"
    last = json.loads(export.read_text())["step"] if export.is_file() else 0
    return "finished" if last >= config["training"]["max_steps"] else "unfinished"


def device_count(folder: Path) -> int:
    """Processes of the run's last start, on all nodes; each had one device."""
    file = folder / "environment.json"
    starts = json.loads(file.read_text()) if file.is_file() else []
    return starts[-1].get("num_processes", 1) if starts else 1


def read_metrics(file: Path, devices: int = 1) -> pd.DataFrame:
    """``metrics.csv`` as one row a step; seconds of all starts together make the device-hours."""
    import pandas as pd

    if not file.is_file():
        return pd.DataFrame(columns=list(AXES), dtype=float)
    rows = pd.read_csv(file)
    since = rows["seconds"].diff()
    rows["device_hours"] = since.where(since >= 0, rows["seconds"]).cumsum() * devices / 3600
    rows = rows.drop_duplicates(["step", "metric"], keep="last")
    axes = rows.groupby("step")[["images_seen", "device_hours"]].last()
    table = rows.pivot(index="step", columns="metric", values="value")
    return axes.join(table).reset_index()


def read_evaluation(file: Path) -> Evaluation:
    """One result file."""
    content = json.loads(file.read_text())
    picture = file.with_suffix(".png")
    return Evaluation(content["scores"], content["manifest"], opener(picture) if picture.is_file() else None)


def pictures_of(folder: Path) -> Pictures:
    """``step-...`` through training; grids by the name of their folder (``final``, ``references``), others by their own."""
    samples = folder / "samples"
    steps: Pictures = {file.stem: opener(file) for file in sorted(samples.glob("*.png"))}
    others = sorted(samples.glob("*/*.png"))
    return steps | {file.parent.name if file.stem == "grid" else file.stem: opener(file) for file in others}


def opener(file: Path) -> Callable[[], Image.Image]:
    """What reads a picture when it is wanted."""

    def load() -> Image.Image:
        with Image.open(file) as picture:
            return picture.convert("RGB")

    return load
