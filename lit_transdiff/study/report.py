"""``lit-transdiff report``: a single HTML page about runs, with curves, samples, scores and differences.

The page contains its data, pictures and script, so that it works without a server or network and can be
shared.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lit_transdiff.base.files import replace_file
from lit_transdiff.config import require
from lit_transdiff.config.targets import check_replaces
from lit_transdiff.evaluation.scores import nearest_file
from lit_transdiff.sampling.pictures import narrowed, opener
from lit_transdiff.study.compare import Comparison, compare, differing
from lit_transdiff.study.differences import notes_on_scores
from lit_transdiff.study.records import AXES, Run, opened_pictures
from lit_transdiff.study.repeats import Pooled
from lit_transdiff.study.scored import FULL, evaluation_in_words, higher_is_better, pooled_scores, title_of

TEMPLATE = Path(__file__).with_name("report.html")
# The marks of our pages; the second one is from earlier versions.
PAGE_SIGNS = ('<meta name="generator" content="lit-transdiff">', ":root { --ink: #1c1e22;")
CLAIMS = "study.md"  # the claims of a study, in its folder
MAX_POINTS = 500  # per curve; longer curves are thinned evenly
MAX_GRIDS = 12  # per run, evenly over training
WIDEST = 520  # the largest width of a picture in pixels


def write_report(runs: Sequence[Run], file: Path, title: str = "Runs") -> Path:
    """Write the page about ``runs`` to ``file``."""
    require(len(runs) > 0, "runs", len(runs), "at least one")
    check_replaces(file, PAGE_SIGNS, "a report")
    content = page_data(runs) | {"claims": claims_in(file.parent)}
    # "<" is escaped so that no text of a run can open or close a script.
    data = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    page = TEMPLATE.read_text().replace("{{title}}", html.escape(title)).replace("{{data}}", data)
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, page.encode())
    return file


def claims_in(folder: Path) -> list[str]:
    """The claims of the study whose folder this is; empty for other folders."""
    file = folder / CLAIMS
    return [line.removeprefix("- ") for line in file.read_text().splitlines()] if file.is_file() else []


def report_file(where: str) -> Path:
    """The default file of the page: in a folder, beside a file, or here with the name of a W&B project."""
    path = Path(where)
    if path.is_dir():
        return path / "report.html"
    return path.with_suffix(".html") if path.is_file() else Path(where.replace("/", "-") + ".html")


def page_data(runs: Sequence[Run]) -> dict[str, Any]:
    """The data of the page as plain lists and dictionaries."""
    compared = compare(runs)
    verdicts = {key: compared.verdict_of_rows(key) for key in compared.metrics}
    return {
        "runs": [run_data(run, compared, verdicts) for run in runs],
        "differing": [name for name in differing(runs) if name != "stage"],  # which has a column already
        "scores": [
            {"key": key, "title": title_of(key), "higher": higher_is_better(key)} for key in compared.metrics
        ],
        "notes": notes_on_scores([entry for entry in compared.entries if entry.repeats], compared.metrics),
        "metrics": sorted({str(column) for run in runs for column in run.history() if column not in AXES}),
    }


def run_data(run: Run, compared: Comparison, verdicts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The data of one run: logged values, the scores of its main evaluation, and all evaluations."""
    rows = [i for i, entry in enumerate(compared.entries) if entry.run is run]
    scored = next((i for i in rows if run.evaluation in compared.entries[i].repeats), rows[0])
    row = {key: scored if key in compared.scores[scored] else rows[0] for key in compared.metrics}
    scores = {key: compared.scores[i][key] for key, i in row.items() if key in compared.scores[i]}
    return {
        "name": run.name,
        "stage": run.stage,
        "group": run.group,
        "state": "diverged" if run.diverged else run.state,
        "where": run.where,
        "settings": {name: as_json(value) for name, value in run.settings.items()},
        "scores": {key: as_json(score.mean) for key, score in scores.items()},
        "spreads": {key: spread_in_words(score) for key, score in scores.items() if score.n > 1},
        "verdicts": {key: verdicts[key][row[key]] for key in scores},
        "judge": compared.entries[scored].judge_in_words(),
        "curves": thinned_curves(run),
        "samples": [
            {"step": step, "picture": embedded(picture)}
            for step, picture in evenly(list(run.samples().items()))
        ],
        "pictures": [
            {"name": name, "picture": embedded(picture)} for name, picture in run.pictures().items()
        ],
        "evaluations": [
            evaluation_data(compared, verdicts, i, i == scored) for i in rows if compared.entries[i].repeats
        ],
    }


def thinned_curves(run: Run) -> dict[str, dict[str, list[Any]]]:
    """The axes and values of each metric at its logged steps, thinned."""
    history, found = run.history(), {}
    for column in [column for column in history if column not in AXES]:
        rows = history[[*AXES, column]].dropna()
        rows = rows.iloc[:: max(1, math.ceil(len(rows) / MAX_POINTS))]
        axes = {axis: [as_json(value) for value in rows[axis]] for axis in AXES}
        found[str(column)] = axes | {"value": [as_json(value) for value in rows[column]]}
    return found


def evaluation_data(
    compared: Comparison, verdicts: Mapping[str, Sequence[str]], i: int, shown: bool
) -> dict[str, Any]:
    """The data of an evaluation with its repeats: scores, verdicts, description, manifest and picture."""
    scores, group = [], compared.entries[i].repeats
    for name, score in pooled_scores(group).items():
        key = f"{FULL}{name}"
        about = {
            "title": title_of(key),
            "higher": higher_is_better(key),
            "verdict": verdicts[key][i] if key in verdicts else "",
        }
        scores.append(about | {"value": as_json(score.mean), "std": as_json(score.std), "n": score.n})
    newest = group[0]
    picture = opened_pictures({"picture": newest.open_picture} if newest.open_picture else {}).get("picture")
    return {
        "scores": scores,
        "label": evaluation_in_words(group),
        "manifest": as_json(newest.manifest),
        "picture": embedded(picture) if picture else None,
        "nearest": nearest_pairs(newest.where),
        "shown": shown,
    }


def nearest_pairs(where: str) -> str | None:
    """The picture of samples beside their nearest training images as a data URI, if a result has one."""
    file = nearest_file(Path(where))
    if not where or not file.is_file():
        return None
    found = opened_pictures({"nearest": opener(file)}).get("nearest")
    return embedded(found) if found else None


def spread_in_words(score: Pooled) -> str:
    """The text after a mean over repeats: spread and number."""
    return f"± {score.std:.2g} (n={score.n})" if score.std is not None else f"(n={score.n})"


def evenly(items: list[Any]) -> list[Any]:
    """At most MAX_GRIDS of the items, including the first and the last."""
    if len(items) <= MAX_GRIDS:
        return items
    return [items[round(i * (len(items) - 1) / (MAX_GRIDS - 1))] for i in range(MAX_GRIDS)]


def embedded(picture: Image.Image) -> str:
    """A picture as a data URI."""
    buffer = io.BytesIO()
    narrowed(picture, WIDEST).save(buffer, format="WEBP", quality=80)
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
