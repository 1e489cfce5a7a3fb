"""All results below a folder as one table (Markdown, CSV, text) and one picture of their samples beside each other."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lit_transdiff.base.files import read_json
from lit_transdiff.evaluation.metrics import METRICS
from lit_transdiff.evaluation.scores import Score, judged_by, result_files, value
from lit_transdiff.sampling.pictures import beside


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
    """The rows, the table as aligned text, and the files written."""

    rows: list[Row]
    text: str
    markdown: Path
    csv: Path
    picture: Path

    def __str__(self) -> str:
        return self.text


def collect(folder: str | Path) -> list[Row]:
    """Every ``evaluations/*.json`` at or below ``folder``, in the order of paths.

    Raises ``FileNotFoundError`` when there is none and ``ValueError`` for a file that is not a result.
    """
    return [read_row(file) for file in result_files(folder)]


def read_row(file: Path) -> Row:
    """Read one result file."""
    try:
        content = read_json(file)
        return Row(file, content["scores"], content["manifest"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a result of evaluate ({error}); remove it or evaluate again.") from error


def compare(folder: str | Path, output: str | Path) -> Comparison:
    """Write ``comparison.md``, ``.csv`` and ``.png`` of the results below ``folder`` into the folder ``output``.

    The best value of a score is marked among the rows that were judged alike (see ``Row.judged_by``).
    """
    rows, output = collect(folder), Path(output)
    settings = settings_of(rows)
    output.mkdir(parents=True, exist_ok=True)
    names = [name for name in METRICS if any(name in row.scores for row in rows)]
    head = [*settings, *(f"{METRICS[name].title} {'↑' if METRICS[name].higher_is_better else '↓'}" for name in names), *SPEED]
    best = {name: best_rows(rows, name) for name in names}

    def table(mark: str) -> list[list[str]]:
        cells = [[marked(row, name, mark * (i in best[name])) for name in names] for i, row in enumerate(rows)]
        return [line(row, settings, scores) for row, scores in zip(rows, cells, strict=True)]

    notes = footnotes(rows)
    paths = {end: output / f"comparison.{end}" for end in ("md", "csv", "png")}
    paths["md"].write_text(markdown(head, table("**")) + "\n" + notes)
    paths["csv"].write_text(csv_text(rows, settings, names))
    samples(rows, names).save(paths["png"])
    text = aligned(head, table("*")) + "\n" + notes
    return Comparison(rows, text, paths["md"], paths["csv"], paths["png"])


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


Cell = Callable[[Row], str]
SETTINGS: dict[str, Cell] = {
    "run": lambda row: row.manifest["run"],
    "stage": lambda row: row.manifest["stage"],
    "references": lambda row: str(row.manifest["num_references"]),
    "images seen": images_seen,
    "sampler, steps x guidance": sampler,
}
SPEED: dict[str, Cell] = {
    "images/s": lambda row: f"{row.manifest['images_per_second']:.3g}",
    "judged by": judge,
}


def settings_of(rows: list[Row]) -> dict[str, Cell]:
    """The columns before the scores; the weights are among them where the rows are of different ones."""
    return SETTINGS | ({"weights": weights} if len(set(map(weights, rows))) > 1 else {})


def line(row: Row, settings: dict[str, Cell], scores: list[str]) -> list[str]:
    """The cells of a row around its scores."""
    return [cell(row) for cell in settings.values()] + scores + [cell(row) for cell in SPEED.values()]


def shown(score: Score | None) -> str:
    """A score in a table, with four digits."""
    if score is None:
        return "-"
    return f"{value(score):.4g}" + (f" ± {score['std']:.2g}" if isinstance(score, dict) else "")


def marked(row: Row, name: str, mark: str) -> str:
    """A row's score in a table, between marks."""
    return f"{mark}{shown(row.scores.get(name))}{mark}"


def best_rows(rows: list[Row], name: str) -> set[int]:
    """The rows with the best score among those judged alike; where all are equal none is marked."""
    groups: dict[tuple[Any, ...], dict[int, float]] = {}
    for i, row in enumerate(rows):
        if name in row.scores:
            groups.setdefault(row.judged_by, {})[i] = value(row.scores[name])
    choose = max if METRICS[name].higher_is_better else min
    best: set[int] = set()
    for scores in groups.values():
        winner = choose(scores.values())
        if any(score != winner for score in scores.values()):
            best |= {i for i, score in scores.items() if score == winner}
    return best


def footnotes(rows: list[Row]) -> str:
    """How to read the table."""
    notes = ["↑ higher is better, ↓ lower is better; the best of the rows that are judged alike is marked."]
    if len({row.judged_by for row in rows}) > 1:
        notes.append(
            "Not all rows are judged alike (extractor, its weights, reference, number and choice of images): compare only those."
        )
    if any(row.manifest["extractor"] == "classifier" for row in rows):
        notes.append(
            "Scores by 'classifier' are analogues on its features: they are no FID, IS or KID and compare only with each other."
        )
    return "\n".join(notes) + "\n"


def markdown(head: list[str], table: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *table]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n" for cells in lines)


def aligned(head: list[str], table: list[list[str]]) -> str:
    """The same table for a terminal, columns aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *table, strict=True)]
    lines = [head, ["-" * width for width in widths], *table]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() + "\n" for cells in lines
    )


def csv_text(rows: list[Row], settings: dict[str, Cell], names: list[str]) -> str:
    """Plain numbers: the settings, each score (and its std), speed, and the hashes of what judged."""
    extra = ["decoder_evaluations_per_image", "extractor_fingerprint", "reference_hash", "weights_fingerprint", "seed", "date"]
    spread = {name for name in names if any(isinstance(row.scores.get(name), dict) for row in rows)}
    head = [
        *settings,
        *(column for name in names for column in [name, f"{name}_std"][: 1 + (name in spread)]),
        *SPEED,
        *extra,
        "file",
    ]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        scores: list[str] = []
        for name in names:
            score = row.scores.get(name)
            scores.append("" if score is None else repr(value(score)))
            if name in spread:
                scores.append(repr(score["std"]) if isinstance(score, dict) else "")
        writer.writerow([*line(row, settings, scores), *(row.manifest[key] for key in extra), row.file])
    return buffer.getvalue()


def samples(rows: list[Row], names: list[str]) -> Image.Image:
    """The sample grids beside each other, each under its run's name and scores."""
    pictures, captions = [], []
    for row in rows:
        if not row.picture.is_file():
            raise FileNotFoundError(f"{row.picture} is missing: evaluate {row.manifest['run']} again.")
        with Image.open(row.picture) as picture:
            pictures.append(picture.convert("RGB"))
        scores = [f"{METRICS[name].title} {shown(row.scores[name])}" for name in names if name in row.scores]
        captions.append(f"{row.manifest['run']}\n{', '.join(scores)}\n{sampler(row)}")
    return beside(pictures, captions)
