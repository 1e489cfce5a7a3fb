"""Reading runs of W&B: logs of offline runs (``run-*.wandb``), and the server through its public API."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_transdiff.base.files import folder_of_this_process
from lit_transdiff.checkpoints.format import warn_once
from lit_transdiff.config.targets import below
from lit_transdiff.sampling.pictures import opener
from lit_transdiff.study.records import AXES, Evaluation, Pictures, Run, number
from lit_transdiff.tracking.origin import COPIED_FROM
from lit_transdiff.tracking.server import answer_timeout, answers
from lit_transdiff.tracking.wandb_run import IMAGES_SEEN, NUM_DEVICES, STEP

if TYPE_CHECKING:
    import pandas as pd

ROW_DEVICES = "_devices"  # key added to a row of an offline log: the devices of the start that wrote it
HIDDEN = ("_wandb", "manifest", COPIED_FROM, NUM_DEVICES)  # not settings
LOGGED_PICTURES = {"eval/samples": "final", "samples/references": "references"}  # made after training
AT_SERVER = {"group": "group", "state": "state", "name": "display_name", "stage": "jobType"}  # applied there


def log_files(root: Path) -> list[list[Path]]:
    """The ``.wandb`` files at and below ``root``, grouped by run (with restarts) in chronological order."""
    files = [root] if root.is_file() else list(root.rglob("run-*.wandb"))
    files.sort(key=lambda file: file.parent.name.removeprefix("offline-"))
    by_run: dict[tuple[Path, str], list[Path]] = {}
    for file in files:
        by_run.setdefault((file.parent.parent, file.stem), []).append(file)
    return list(by_run.values())


def records(file: Path) -> Iterable[dict[str, Any]]:
    """The records in a ``.wandb`` file, from W&B's own reader. Raises ``ValueError`` for an unreadable file.

    The reader stops at a record with a wrong checksum, which gives a warning.
    """
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"{file}: {done.stderr.decode().strip() or 'wandb cannot read it'}")
    if b"corrupt" in done.stderr:
        warn_once(f"{file} is damaged: W&B's reader skipped a part, and the last values may be missing.")
    return (json.loads(line) for line in done.stdout.splitlines())


def last_step(start: Iterable[dict[str, Any]]) -> int:
    """The last training step logged by a start of a run."""
    rows = (record["history"]["item"] for record in start if record["type"] == "history")
    return max((int(row[STEP]) for row in rows if STEP in row), default=-1)


def with_media(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the log with its media (``KEY._type``, ``KEY.path``, ...) as one dictionary per key."""
    for key in [key.removesuffix("._type") for key in row if key.endswith("._type")]:
        parts = {name: row[name] for name in row if name.startswith(f"{key}.")}
        row = {name: value for name, value in row.items() if name not in parts}
        row[key] = {name.removeprefix(f"{key}."): value for name, value in parts.items()}
    return row


def read_log(files: list[Path]) -> Run:
    """Read one run from its log files."""
    run: dict[str, Any] = {}
    config: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    state = "unfinished"
    # By step, because the clock may have been set back between starts.
    starts = sorted(([*records(file)] for file in files), key=last_step)
    for start in starts:
        state = "unfinished"
        for record in start:
            kind = record["type"]
            if kind == "run":
                run |= {key: value for key, value in record["run"].items() if value}
                config |= record["run"].get("config", {}).get("update", {})
            elif kind == "config":
                config |= record["config"].get("update", {})
            elif kind == "history":
                rows.append(with_media(record["history"]["item"]) | {ROW_DEVICES: devices_of(config)})
            elif kind == "exit":
                state = "failed" if record["exit"].get("exit_code") else "finished"
    joined = by_step(rows)
    folder = files[-1].parent
    pictures = {
        name: opener(below(folder / "files", path, f"{files[-1]}: picture"))
        for name, path in picture_paths(rows).items()
    }
    summary = last_of_steps(joined)
    return Run(
        id=run.get("run_id", folder.name),
        name=run.get("display_name") or run.get("run_id", ""),
        stage=run.get("job_type", ""),
        group=run.get("run_group", ""),
        tags=list(run.get("tags", [])),
        state=state,
        config=own_settings(config),
        where=str(folder),
        read_summary=lambda: summary,
        read_history=lambda: history_of_steps(joined),
        read_step=lambda: max(joined, default=None),
        evaluations=evaluations_of(config, summary),
        open_pictures=lambda: pictures,
    )


def read_server(project: str, filters: Mapping[str, Any]) -> list[Run]:
    """The runs of ``entity/project``. Raises ``FileNotFoundError`` with W&B's reason if it refuses."""
    import wandb

    plain = {
        AT_SERVER[key]: value for key, value in filters.items() if key in AT_SERVER and isinstance(value, str)
    }
    try:
        api = wandb.Api(timeout=math.ceil(answer_timeout()))  # here, as it may ask for a key
        return [
            read_server_run(found)
            for found in answers(lambda: api.runs(project, filters=plain), f"runs of {project}")
        ]
    except (wandb.errors.Error, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        way_on = "Name a folder of runs, or try again later (WANDB_HTTP_TIMEOUT waits longer)."
        raise FileNotFoundError(
            f"{project} is neither a folder nor a project at W&B ({reason}). {way_on}"
        ) from error


def read_server_run(source: Any) -> Run:
    """One run of the public API; its history is fetched once, on first use."""
    config = dict(source.config)
    summary = {key: number(value) for key, value in dict(source.summary).items() if not key.startswith("_")}

    @cache
    def rows() -> list[dict[str, Any]]:
        return list(answers(source.scan_history, f"the metrics of {source.name}"))

    @cache
    def folder() -> Path:
        return folder_of_this_process("wandb-pictures-")

    def fetch(path: str) -> Any:
        place = below(folder(), path, f"{source.name}: picture")
        list(
            answers(
                lambda: [source.file(path).download(root=str(folder()), exist_ok=True)],
                f"the picture {path} of {source.name}",
            )
        )
        return opener(place)()

    def pictures() -> Pictures:
        return {name: lambda path=path: fetch(path) for name, path in picture_paths(rows()).items()}  # type: ignore[misc]

    kept = {key: value for key, value in summary.items() if isinstance(value, int | float)}
    joined = cache(lambda: by_step(rows(), devices_of(config)))
    return Run(
        id=source.id,
        name=source.name,
        stage=source.job_type or "",
        group=source.group or "",
        tags=list(source.tags),
        state=source.state,
        config=own_settings(config),
        where=source.url,
        read_summary=lambda: kept,
        read_history=cache(lambda: history_of_steps(joined())),
        read_step=lambda: int(kept[STEP]) if STEP in kept else max(joined(), default=None),
        evaluations=evaluations_of(config, summary),
        open_pictures=pictures,
    )


def by_step(rows: list[dict[str, Any]], devices: int = 1) -> dict[int, dict[str, Any]]:
    """W&B's rows by training step, in order and without media; rows of one step are merged.

    Device-hours are summed over all starts, because a start that continues offline counts from zero.
    ``devices`` is the default for rows without their own number.
    """
    joined: dict[int, dict[str, Any]] = {}
    seconds = clock = 0.0
    for i, row in enumerate(rows):
        step = int(row.get(STEP, row.get("_step", i)))
        numbers = {
            key: number(value) for key, value in row.items() if not key.startswith("_") and key != STEP
        }
        line = {
            key: value
            for key, value in numbers.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        before, clock = clock, float(row.get("_runtime", clock))
        seconds += (clock - before if clock >= before else clock) * row.get(ROW_DEVICES, devices)
        axes = {"step": step, "images_seen": line.pop(IMAGES_SEEN, step), "device_hours": seconds / 3600}
        joined.setdefault(step, {}).update(axes | line)
    return {step: joined[step] for step in sorted(joined)}


def history_of_steps(joined: Mapping[int, dict[str, Any]]) -> pd.DataFrame:
    """Merged rows as a table with one row per training step."""
    import pandas as pd

    return pd.DataFrame(list(joined.values())) if joined else pd.DataFrame(columns=list(AXES), dtype=float)


def last_of_steps(joined: Mapping[int, dict[str, Any]]) -> dict[str, float]:
    """The last logged value of each metric, which may be NaN."""
    found: dict[str, float] = {}
    for row in joined.values():
        found |= {name: float(value) for name, value in row.items() if name not in AXES}
    return found


def own_settings(config: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration without entries of W&B and evaluations, and a sweep's copies by dotted name."""
    return {key: value for key, value in config.items() if key not in HIDDEN and "." not in key}


def devices_of(config: dict[str, Any]) -> int:
    """The number of devices on all nodes; 1 for runs of other programs, which do not record it."""
    return config.get(NUM_DEVICES) or 1


def evaluations_of(config: dict[str, Any], summary: Mapping[str, Any]) -> list[Evaluation]:
    """The evaluation logged by a run: scores from the summary, the manifest from the configuration."""
    scores = {
        key[5:]: value
        for key, value in summary.items()
        if key.startswith("eval/") and isinstance(value, int | float)
    }
    plain = {name: value for name, value in scores.items() if not name.endswith("_std")}
    both = {
        name: {"mean": value, "std": scores[f"{name}_std"]} if f"{name}_std" in scores else value
        for name, value in plain.items()
    }
    return [Evaluation(both, config.get("manifest") or {})] if both else []


def picture_paths(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The paths of a run's pictures below its files: ``step-...`` from training, others once per run."""
    found: dict[str, str] = {}
    for row in rows:
        for key, name in {"samples": f"step-{row.get(STEP, 0):08d}", **LOGGED_PICTURES}.items():
            if isinstance(row.get(key), dict) and "path" in row[key]:
                found[name] = row[key]["path"]
    return found
