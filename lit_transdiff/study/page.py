"""The content of runs for a page, within limits that let a browser open it at once: curves and pictures."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from lit_transdiff.evaluation.scores import nearest_file
from lit_transdiff.sampling.pictures import narrowed, opener
from lit_transdiff.study.records import AXES, Run, opened_pictures
from lit_transdiff.study.scored import (
    FULL,
    Entry,
    entries_of,
    evaluation_in_words,
    higher_is_better,
    pooled_scores,
    title_of,
)

if TYPE_CHECKING:
    import pandas as pd

MAX_POINTS, MIN_POINTS = 500, 50  # points of a curve; longer ones are thinned evenly
MAX_GRIDS = 12  # grids of a run, evenly over training
WIDEST, NARROWEST = 520, 290  # the largest width of a picture in pixels; the second is that on the page
ALL_POINTS, ALL_GRIDS = 750_000, 600  # points and grids of a page


@dataclass(frozen=True)
class Limits:
    """The largest number of points of a curve and of sample grids of a run, and the width of pictures."""

    points: int = MAX_POINTS
    grids: int = MAX_GRIDS
    width: int = WIDEST


def limits_for(runs: Sequence[Run]) -> Limits:
    """The limits of a page about ``runs``: the more there are, the less it holds of each."""
    curves = sum(len(metrics_of(run)) for run in runs)
    points = min(MAX_POINTS, max(MIN_POINTS, ALL_POINTS // max(curves, 1)))
    grids = min(MAX_GRIDS, max(1, ALL_GRIDS // max(len(runs), 1)))
    return Limits(points, grids, WIDEST if grids == MAX_GRIDS else NARROWEST)


def metrics_of(run: Run) -> list[str]:
    """The logged metrics of a run."""
    return [column for column in run.history() if column not in AXES]


def content_of(run: Run, limits: Limits) -> dict[str, Any]:
    """The content of a run on a page: settings, curves, pictures and evaluations."""
    pictures = run.open_pictures()
    grids = {name: load for name, load in pictures.items() if name.startswith("step-")}
    chosen = evenly(sorted(grids, key=step_of), limits.grids)
    samples = opened_pictures({name: grids[name] for name in chosen})
    others = (
        {} if samples else opened_pictures({name: pictures[name] for name in pictures if name not in grids})
    )
    return {
        "name": run.name,
        "stage": run.stage,
        "group": run.group,
        "state": "diverged" if run.diverged else run.state,
        "settings": {name: as_json(value) for name, value in run.settings.items()},
        **curves_of(run, limits.points),
        "samples": [
            {"step": step_of(name), "picture": embedded(picture, limits.width)}
            for name, picture in samples.items()
        ],
        "pictures": [
            {"name": name, "picture": embedded(picture, limits.width)} for name, picture in others.items()
        ],
        "evaluations": [
            evaluation_of(entry, limits.width) | {"shown": run.evaluation in entry.repeats}
            for entry in entries_of(run)
            if entry.repeats
        ],
    }


def step_of(name: str) -> int:
    """The step in the name of a sample grid."""
    return int(name.removeprefix("step-"))


def curves_of(run: Run, points: int) -> dict[str, Any]:
    """The curves of all metrics, thinned to ``points``; metrics logged at the same steps share their axes."""
    history = run.history()
    numbered = history[list(AXES)].notna().all(axis=1)
    places: dict[tuple[int, ...], int] = {}
    curves = {}
    for metric in metrics_of(run):
        kept = evenly(np.flatnonzero(numbered & history[metric].notna()).tolist(), points)
        place = places.setdefault(tuple(kept), len(places))
        curves[metric] = {"axes": place, "value": seven_digits(history[metric].iloc[kept])}
    axes = [{axis: seven_digits(history[axis].iloc[[*kept]]) for axis in AXES} for kept in places]
    return {"axes": axes, "curves": curves}


def seven_digits(values: pd.Series) -> list[float | None]:
    """Numbers with seven significant digits, integers as they are; non-finite ones become null."""
    if values.dtype.kind in "iu":
        return values.tolist()
    return [float(f"{value:.7g}") if math.isfinite(value) else None for value in values]


def evaluation_of(entry: Entry, width: int) -> dict[str, Any]:
    """The content of an evaluation with its repeats: scores, description, manifest and pictures."""
    scores = pooled_scores(entry.repeats)
    newest = entry.repeats[0]
    picture = opened_pictures({"picture": newest.open_picture} if newest.open_picture else {}).get("picture")
    return {
        "scores": [
            titled(f"{FULL}{name}") | {"value": as_json(score.mean), "std": as_json(score.std), "n": score.n}
            for name, score in scores.items()
        ],
        "label": evaluation_in_words(entry.repeats),
        "manifest": as_json(newest.manifest),
        "picture": embedded(picture, width) if picture else None,
        "nearest": nearest_pairs(newest.where, width),
    }


def titled(key: str) -> dict[str, Any]:
    """The title of a score, and whether higher is better."""
    return {"key": key, "title": title_of(key), "higher": higher_is_better(key)}


def nearest_pairs(where: str, width: int) -> str | None:
    """The picture of samples beside their nearest training images as a data URI, if a result has one."""
    file = nearest_file(Path(where))
    if not where or not file.is_file():
        return None
    found = opened_pictures({"nearest": opener(file)}).get("nearest")
    return embedded(found, width) if found else None


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of the items at even distances, among them the last and, of several, the first."""
    if len(items) <= count:
        return list(items)
    return [items[-1 - round(i * (len(items) - 1) / max(count - 1, 1))] for i in reversed(range(count))]


def embedded(picture: Image.Image, width: int) -> str:
    """A picture as a data URI."""
    buffer = io.BytesIO()
    narrowed(picture, width).save(buffer, format="WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def as_json(value: Any) -> Any:
    """Convert a value for JSON; non-finite numbers become null."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    return (value if isinstance(value, int) else float(value)) if math.isfinite(value) else None
