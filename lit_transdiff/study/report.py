"""``lit-transdiff report``: a single HTML page about runs, with curves, samples, scores and differences.

The page contains its data, pictures and script, so that it works without a server or network and can be
shared. If it is about several sets of runs (sweeps, say), it compares all of them, or those of one set.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lit_transdiff.base.files import replace_file
from lit_transdiff.config import require
from lit_transdiff.config.targets import check_replaces
from lit_transdiff.study.compare import Comparison, compare, differing, distinct
from lit_transdiff.study.differences import notes_on_scores
from lit_transdiff.study.page import as_json, content_of, limits_for, titled
from lit_transdiff.study.records import AXES, Run
from lit_transdiff.study.repeats import Pooled
from lit_transdiff.study.runs import runs

TEMPLATE = Path(__file__).with_name("report.html")
# The marks of our pages; the second one is from earlier versions.
PAGE_SIGNS = ('<meta name="generator" content="lit-transdiff">', ":root { --ink: #1c1e22;")
CLAIMS = "study.md"  # the claims of a study, in its folder


@dataclass(frozen=True)
class RunSet:
    """Runs that belong together, such as those of a sweep, and the claims of a study about them."""

    runs: Sequence[Run]
    name: str = ""
    claims: Sequence[str] = field(default_factory=list)


def read_sets(places: Sequence[str]) -> list[RunSet]:
    """Read the runs at each of ``places`` (see ``runs``). Their names are the last parts of the paths.

    Raises ``ValueError`` if a run is at two of the places.
    """
    count = Counter(Path(place).name for place in places)
    names = [Path(place).name if count[Path(place).name] == 1 else place for place in places]
    sets = [
        RunSet(runs(place), name, claims_in(Path(place))) for place, name in zip(places, names, strict=True)
    ]
    seen: dict[str, str] = {}
    for place, one in zip(places, sets, strict=True):
        for run in one.runs:
            first = seen.setdefault(run.where, place)
            require(first is place, "folder", place, f"no run twice; {run.where} is also one of {first}")
    return sets


def claims_in(folder: Path) -> list[str]:
    """The claims of the study whose folder this is; empty for other folders."""
    file = folder / CLAIMS
    return [line.removeprefix("- ") for line in file.read_text().splitlines()] if file.is_file() else []


def report_file(place: str, *others: str) -> Path:
    """The default file of the page: in a folder, beside a file, or here with the name of a W&B project.

    The page of several places lies beside the first one.
    """
    path = Path(place)
    if others:
        return path.parent / "report.html" if path.exists() else Path("report.html")
    if path.is_dir():
        return path / "report.html"
    return path.with_suffix(".html") if path.is_file() else Path(place.replace("/", "-") + ".html")


def write_report(sets: Sequence[RunSet], file: Path, title: str = "Runs") -> Path:
    """Write the page about the runs of ``sets`` to ``file``."""
    require(any(one.runs for one in sets), "runs", 0, "at least one")
    check_replaces(file, PAGE_SIGNS, "a report")
    # "<" is escaped so that no text of a run can open or close a script.
    data = json.dumps(page_data(sets), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    page = TEMPLATE.read_text().replace("{{title}}", html.escape(title)).replace("{{data}}", data)
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, page.encode())
    return file


def page_data(sets: Sequence[RunSet]) -> dict[str, Any]:
    """The data of the page as plain lists and dictionaries.

    ``runs`` are the contents of all runs; ``views`` are comparisons: of all runs and, if there are several
    sets, of each set.
    """
    sets = with_own_names(sets)
    every = [run for one in sets for run in one.runs]
    limits = limits_for(every)
    claims = [f"{one.name}: {claim}" if len(sets) > 1 else claim for one in sets for claim in one.claims]
    views = [RunSet(every, "all", claims), *(sets if len(sets) > 1 else ())]
    places = {run.where: i for i, run in enumerate(every)}
    return {
        "runs": [content_of(run, limits) | {"set": one.name} for one in sets for run in one.runs],
        "metrics": sorted({str(column) for run in every for column in run.history() if column not in AXES}),
        "views": [view_data(view) | {"runs": [places[run.where] for run in view.runs]} for view in views],
    }


def with_own_names(sets: Sequence[RunSet]) -> list[RunSet]:
    """The sets with runs of distinct names: the name of the set follows a name that is in several sets."""
    count = Counter(name for one in sets for name in {run.name for run in one.runs})
    texts = {
        run.where: f"{run.name} ({one.name})" if count[run.name] > 1 else run.name
        for one in sets
        for run in one.runs
    }
    if len(sets) > 1:
        texts = distinct([run for one in sets for run in one.runs], texts)
    return [replace(one, runs=[replace(run, name=texts[run.where]) for run in one.runs]) for one in sets]


def view_data(view: RunSet) -> dict[str, Any]:
    """A comparison of runs: the columns of their table, the row of each run, and remarks."""
    compared = compare(view.runs)
    verdicts = {key: compared.verdict_of_rows(key) for key in compared.metrics}
    scored = [entry for entry in compared.entries if entry.repeats]
    return {
        "name": view.name,
        "differing": [name for name in differing(view.runs) if name != "stage"],  # it has a column
        "scores": [titled(key) for key in compared.metrics],
        "remarks": [*view.claims, *notes_on_scores(scored, compared.metrics)],
        "rows": [row_data(run, compared, verdicts) for run in view.runs],
    }


def row_data(run: Run, compared: Comparison, verdicts: dict[str, list[str]]) -> dict[str, Any]:
    """The scores of a run's main evaluation among other runs, and the verdicts on all its evaluations."""
    rows = [i for i, entry in enumerate(compared.entries) if entry.run is run]
    scored = next((i for i in rows if run.evaluation in compared.entries[i].repeats), rows[0])
    row = {key: scored if key in compared.scores[scored] else rows[0] for key in compared.metrics}
    scores = {key: compared.scores[i][key] for key, i in row.items() if key in compared.scores[i]}
    return {
        "scores": {key: as_json(score.mean) for key, score in scores.items()},
        "spreads": {key: spread_in_words(score) for key, score in scores.items() if score.n > 1},
        "verdicts": {key: verdicts[key][row[key]] for key in scores},
        "judge": compared.entries[scored].judge_in_words(),
        "of_evaluations": [
            {key: verdicts[key][i] for key in verdicts if verdicts[key][i]}
            for i in rows
            if compared.entries[i].repeats
        ],
    }


def spread_in_words(score: Pooled) -> str:
    """The text after a mean over repeats: spread and number."""
    return f"± {score.std:.2g} (n={score.n})" if score.std is not None else f"(n={score.n})"
