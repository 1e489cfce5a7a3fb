"""All results below a folder as one table (Markdown, CSV, text) and one picture of their samples beside each other."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lit_transdiff.base.files import read_json, replace_file, whole
from lit_transdiff.config.targets import check_replaces, contents
from lit_transdiff.evaluation.metrics import METRICS
from lit_transdiff.evaluation.scores import Score, judged_by, result_files, value
from lit_transdiff.sampling.pictures import beside
from lit_transdiff.study.folders import opener
from lit_transdiff.study.records import opened
from lit_transdiff.study.repeats import Pooled, pooled, repeats, seeds
from lit_transdiff.study.text import aligned, markdown

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One result file."""

    file: Path
    scores: dict[str, Score]
    manifest: dict[str, Any]

    @property
    def picture(self) -> Path:
        return self.file.with_suffix(".png")

    @property
    def judged_by(self) -> tuple[Any, ...]:
        return judged_by(self.manifest)


@dataclass(frozen=True)
class Comparison:
    """The result files, the table as aligned text, and the files written; without pictures of samples there is none of them."""

    rows: list[Row]
    text: str
    markdown: Path
    csv: Path
    picture: Path | None

    def __str__(self) -> str:
        return self.text


def collect(folder: str | Path) -> list[Row]:
    """Every ``evaluations/*.json`` at or below ``folder`` that is a result, in the order of paths; a warning names the others.

    Raises ``FileNotFoundError`` when there is no file, and ``ValueError`` when none is a result.
    """
    rows = []
    for file in result_files(folder):
        try:
            rows.append(read_row(file))
        except ValueError as error:
            log.warning("%s It is left out.", error)
    if not rows:
        raise ValueError(f"{folder}: none of the files in evaluations/ is a result of evaluate. Evaluate a trained run first.")
    return rows


def read_row(file: Path) -> Row:
    """Read one result file."""
    try:
        content = read_json(file)
        row = Row(file, content["scores"], content["manifest"])
        for cell in (*SETTINGS.values(), *SPEED.values()):
            cell(row)
        for score in row.scores.values():
            float(value(score))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a result of evaluate ({error!r}); remove it or evaluate again.") from error
    return row


def compare(folder: str | Path, output: str | Path) -> Comparison:
    """Write ``comparison.md``, ``.csv`` and ``.png`` of the results below ``folder`` into the folder ``output``.

    Results that differ in their seed alone are one line, with mean and spread. The best mean is marked among the lines that were
    judged alike (see ``Row.judged_by``). The CSV has every result file.
    """
    rows, output = collect(folder), Path(output)
    check_output(output)
    lines, names = repeats(rows), [name for name in METRICS if any(name in row.scores for row in rows)]
    settings, shared = settings_of(lines)
    output.mkdir(parents=True, exist_ok=True)
    head = [*settings, *(f"{METRICS[name].title} {'↑' if METRICS[name].higher_is_better else '↓'}" for name in names), *SPEED]
    best = {name: best_lines(lines, name) for name in names}

    def table(mark: str) -> list[list[str]]:
        cells = [[marked(line, name, mark * (i in best[name])) for name in names] for i, line in enumerate(lines)]
        return [around(line, settings, scores) for line, scores in zip(lines, cells, strict=True)]

    notes = footnotes(lines, shared)
    paths = {end: output / f"comparison.{end}" for end in ("md", "csv", "png")}
    picture = samples(lines, names)
    replace_file(paths["md"], (markdown(head, table("**")) + "\n" + notes).encode())
    replace_file(paths["csv"], csv_text(rows, names).encode())
    if picture is not None:
        with whole(paths["png"]) as partial:
            picture.save(partial, format="png")
    text = aligned(head, table("*")) + "\n" + notes
    return Comparison(rows, text, paths["md"], paths["csv"], paths["png"] if picture is not None else None)


def check_output(folder: Path) -> None:
    """Refuse a folder with files of these names that are no comparison."""
    contents(folder)
    check_replaces(folder / "comparison.md", ["| run |"], "a comparison")
    check_replaces(folder / "comparison.csv", ["run,stage,"], "a comparison")
    if not (folder / "comparison.md").exists():
        check_replaces(folder / "comparison.png", [], "a comparison")


def sampler(row: Row) -> str:
    """Solver, steps and guidance; interval and scales only where they are not the plain ones."""
    sampling = row.manifest["sampling"]
    guidance = "/".join(f"{s:g}" for s in sampling["reference_guidance"] or [sampling["guidance_scale"]])
    low, high = sampling["guidance_interval"]
    interval = "" if (low, high) == (0, 1) else f" in [{low:g}, {high:g}]"
    scales = sampling["drift_scale"], sampling["noise_scale"]
    steps = "/".join(map(str, sampling.get("reference_steps") or [sampling["num_steps"]]))
    return f"{sampling['solver']} {steps} x {guidance}{interval}" + (
        "" if scales == (1, 1) else ", scales {:g} {:g}".format(*scales)
    )


def judge(row: Row) -> str:
    """Extractor, reference, number and choice of images."""
    reference = Path(row.manifest["reference"]).stem if row.manifest["reference"] else "no reference"
    return f"{row.manifest['extractor']}, {reference}, {row.manifest['num_images']:,} {row.manifest['label_mode']}"


def images_seen(row: Row) -> str:
    """Of the training, where the model comes from a folder that says so."""
    training = row.manifest["training"]
    return f"{training['images_seen']:,}" if training else "-"


def weights(row: Row) -> str:
    """Which weights were scored; what the export says goes over the manifest, which once said ema of all of them."""
    return (row.manifest["training"] or {}).get("weights", row.manifest["weights"])


def checkpoint(row: Row) -> str:
    """The folder of the weights that were scored, and the step that they are of."""
    step = (row.manifest["training"] or {}).get("step")
    return Path(row.manifest.get("checkpoint") or "-").name + ("" if step is None else f", step {step:,}")


Line = list[Row]  # results that differ in their seed alone, the newest first
Cell = Callable[[Row], str]
SETTINGS: dict[str, Cell] = {
    "run": lambda row: row.manifest["run"],
    "stage": lambda row: row.manifest["stage"],
    "references": lambda row: str(row.manifest["num_references"]),
    "images seen": images_seen,
    "sampler, steps x guidance": sampler,
    "weights": weights,
    "checkpoint": checkpoint,
    "precision of sampling": lambda row: str(row.manifest.get("precision")),
    "scored reference": lambda row: str(row.manifest.get("scored_reference")),
    "judged by": judge,
}
SPEED: dict[str, Cell] = {"images/s": lambda row: f"{row.manifest['images_per_second']:.3g}"}


def settings_of(lines: Sequence[Line]) -> tuple[dict[str, Callable[[Line], str]], dict[str, str]]:
    """The columns before the scores, of what differs between the lines; and what all lines share.

    Seeds are a column where the settings leave two lines alike or there are repeats; the result's name, where these do, too.
    """
    found: dict[str, Callable[[Line], str]] = {}
    shared: dict[str, str] = {}
    judges = {line[0].judged_by for line in lines}
    for name, cell in SETTINGS.items():
        values = judges if name == "judged by" else {cell(line[0]) for line in lines}
        if name == "run" or len(values) > 1:
            found[name] = lambda line, cell=cell: cell(line[0])  # type: ignore[misc]
        else:
            shared[name] = cell(lines[0][0])
    if any(len(line) > 1 for line in lines) or alike(lines, found):
        found["seeds"] = seeds
    if alike(lines, found):
        found["result"] = lambda line: line[0].file.stem.rsplit("-", 1)[-1]
    return found, shared


def alike(lines: Sequence[Line], settings: dict[str, Callable[[Line], str]]) -> bool:
    """Whether two lines look the same in these columns."""
    return len({tuple(cell(line) for cell in settings.values()) for line in lines}) < len(lines)


def around(line: Line, settings: dict[str, Callable[[Line], str]], scores: list[str]) -> list[str]:
    """The cells of a line around its scores."""
    return [cell(line) for cell in settings.values()] + scores + [cell(line[0]) for cell in SPEED.values()]


def shown(score: Pooled | None, repeats: int) -> str:
    """A score in a table, with four digits; its number of seeds where there are repeats."""
    return "-" if score is None else f"{score} (n={score.n})" if repeats > 1 else str(score)


def marked(line: Line, name: str, mark: str) -> str:
    """A line's score in a table, between marks."""
    return f"{mark}{shown(pooled(line, name), len(line))}{mark}"


def best_lines(lines: Sequence[Line], name: str) -> set[int]:
    """The lines with the best mean among those judged alike; where all are equal none is marked."""
    groups: dict[tuple[Any, ...], dict[int, float]] = {}
    for i, line in enumerate(lines):
        if score := pooled(line, name):
            groups.setdefault(line[0].judged_by, {})[i] = score.mean
    choose = max if METRICS[name].higher_is_better else min
    best: set[int] = set()
    for scores in groups.values():
        winner = choose((score for score in scores.values() if score == score), default=None)
        if any(score != winner for score in scores.values()):
            best |= {i for i, score in scores.items() if score == winner}
    return best


def footnotes(lines: Sequence[Line], shared: dict[str, str]) -> str:
    """What all lines share, and how to read the table."""
    rows = [row for line in lines for row in line]
    told = ", ".join(f"{name.split(',')[0]} {value}" for name, value in shared.items() if value not in ("-", "None"))
    notes = [f"All rows: {told}."] if told else []
    notes.append("↑ higher is better, ↓ lower is better; the best of the rows that are judged alike is marked.")
    if any(len(line) > 1 for line in lines):
        notes.append("Results that differ in their seed alone are one row: mean ± standard deviation over n seeds.")
    if len({row.judged_by for row in rows}) > 1:
        notes.append(
            "Not all rows are judged alike (extractor, its weights, reference, number and choice of images): compare only those."
        )
    if any(row.manifest["extractor"] == "classifier" for row in rows):
        notes.append(
            "Scores by 'classifier' are analogues on its features: they are no FID, IS or KID and compare only with each other."
        )
    return "\n".join(notes) + "\n"


def csv_text(rows: list[Row], names: list[str]) -> str:
    """Plain numbers of every result: the settings, each score (and its std), speed, and the hashes of what judged."""
    extra = ["decoder_evaluations_per_image", "extractor_fingerprint", "reference_hash", "weights_fingerprint", "seed", "date"]
    spread = {name for name in names if any(isinstance(row.scores.get(name), dict) for row in rows)}
    columns = [column for name in names for column in [name, f"{name}_std"][: 1 + (name in spread)]]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*SETTINGS, *columns, *SPEED, *extra, "file"])
    for row in rows:
        scores: list[str] = []
        for name in names:
            score = row.scores.get(name)
            scores.append("" if score is None else repr(value(score)))
            if name in spread:
                scores.append(repr(score["std"]) if isinstance(score, dict) else "")
        cells = [[cell(row) for cell in about.values()] for about in (SETTINGS, SPEED)]
        writer.writerow([*cells[0], *scores, *cells[1], *(row.manifest.get(key) for key in extra), row.file])
    return buffer.getvalue()


def samples(lines: Sequence[Line], names: list[str]) -> Image.Image | None:
    """The sample grids beside each other, each under its run's name and scores; a warning names those that cannot be read."""
    found = opened({str(i): opener(line[0].picture) for i, line in enumerate(lines)})
    captions = []
    for line in (lines[int(i)] for i in found):
        scores = [f"{METRICS[name].title} {shown(score, len(line))}" for name in names if (score := pooled(line, name))]
        captions.append(f"{line[0].manifest['run']}\n{', '.join(scores)}\n{sampler(line[0])}")
    return beside(list(found.values()), captions) if found else None
