"""The command ``compare``: the comparison of results below a folder as Markdown, CSV, text, and a picture of their samples."""

from __future__ import annotations

import csv
import io
import logging
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lit_transdiff.base.files import replace_file, whole
from lit_transdiff.config.targets import check_replaces, contents
from lit_transdiff.evaluation.scores import result_files, value
from lit_transdiff.sampling.pictures import captioned
from lit_transdiff.study.compare import Comparison, compare
from lit_transdiff.study.differences import gaps_in_words
from lit_transdiff.study.records import opened_pictures
from lit_transdiff.study.repeats import Pooled, over, seeds
from lit_transdiff.study.runs import runs
from lit_transdiff.study.scored import FULL, Entry, higher_is_better, judge_in_words, metric_of, sampler_in_words, title_of
from lit_transdiff.study.text import WIDTH, aligned, markdown

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """The table as aligned text, and the files written; without pictures of samples there is none of them."""

    text: str
    markdown: Path
    csv: Path
    picture: Path | None

    def __str__(self) -> str:
        return self.text


def write_comparison(folder: str | Path, output: str | Path) -> Written:
    """Write ``comparison.md``, ``.csv`` and ``.png`` of the results below ``folder`` into the folder ``output``.

    What differs in seeds alone is one line, with mean and spread; verdicts are those of ``compare``. The CSV has every result
    file. Raises ``FileNotFoundError`` when there is no such file, and ``ValueError`` when none is a result.
    """
    result_files(folder)
    compared, output = compare_results(folder), Path(output)
    check_output(output)
    names = [name for name in compared.metrics if name.startswith(FULL)]
    lines = lines_of(compared, names)
    columns, shared = columns_of(lines)
    output.mkdir(parents=True, exist_ok=True)
    head = [*columns, *(f"{title_of(name)} {'↑' if higher_is_better(name) else '↓'}" for name in names), *SPEED]

    def cells(mark: str) -> list[list[str]]:
        scores = [[line.shown(name, mark) for name in names] for line in lines]
        return [around(line, columns, middle) for line, middle in zip(lines, scores, strict=True)]

    notes = footnotes(lines, shared, compared)
    paths = {end: output / f"comparison.{end}" for end in ("md", "csv", "png")}
    picture = beside_each_other(lines, names)
    replace_file(paths["md"], (markdown(head, cells("**")) + "\n" + notes).encode())
    replace_file(paths["csv"], csv_text([entry for line in lines for entry in line.entries], names).encode())
    if picture is not None:
        with whole(paths["png"]) as partial:
            picture.save(partial, format="png")
    text = aligned(head, cells("*")) + "\n" + notes
    return Written(text, paths["md"], paths["csv"], paths["png"] if picture is not None else None)


def check_output(folder: Path) -> None:
    """Refuse a folder with files of these names that are no comparison."""
    contents(folder)
    check_replaces(folder / "comparison.md", ["| run |"], "a comparison")
    check_replaces(folder / "comparison.csv", ["run,stage,"], "a comparison")
    if not (folder / "comparison.md").exists():
        check_replaces(folder / "comparison.png", [], "a comparison")


def compare_results(folder: str | Path) -> Comparison:
    """The comparison of what is below ``folder``. Raises ``ValueError`` when nothing there has a result."""
    none = f"{folder}: none of the files in evaluations/ is a result of evaluate. Evaluate a trained run first."
    try:
        found = runs(folder)
    except FileNotFoundError as error:
        raise ValueError(none) from error
    if not any(run.evaluations for run in found):
        raise ValueError(none)
    return compare(found)


@dataclass(frozen=True)
class TableRow:
    """A line of the table: results that differ in their seeds alone, with their scores over these and the verdicts on them."""

    entries: list[Entry]
    scores: dict[str, Pooled]
    verdicts: dict[str, str]

    @property
    def manifest(self) -> dict[str, Any]:
        """Of the newest result of the first run."""
        return self.entries[0].manifest

    @property
    def name(self) -> str:
        """Of the first run, and how many more there are."""
        more = len(self.entries) - 1
        return self.entries[0].run.name + (f" and {more} of other seeds" if more else "")

    def shown(self, name: str, mark: str = "") -> str:
        """A score with four digits, its number of seeds where there are several, and marks for the best and what is as good."""
        if (score := self.scores.get(name)) is None:
            return "-"
        count = max(len(self.entries), *(len(entry.repeats) for entry in self.entries))
        text = f"{score} (n={score.n})" if count > 1 else str(score)
        verdict = self.verdicts.get(name) if mark else None
        return f"{mark}{text}{mark}" if verdict == "best" else f"{text} ≈" if verdict == "within noise" else text


def lines_of(compared: Comparison, names: Sequence[str]) -> list[TableRow]:
    """A line for each group of the comparison, and for each result that it does not average."""
    lines, verdicts = [], {name: compared.verdict_of_rows(name) for name in names}
    for k, (members, others) in enumerate(zip(compared.members, compared.others, strict=True)):
        together = all(compared.judges[name][k] is not None for name in names)
        for rows in ([members] if together else [[i] for i in members]) + [[i] for i in others]:
            scored = [i for i in rows if compared.entries[i].repeats]
            if not scored:
                continue
            scores = {name: score for name in names if (score := over_runs([compared.scores[i].get(name) for i in scored]))}
            lines.append(
                TableRow([compared.entries[i] for i in scored], scores, {name: verdicts[name][scored[0]] for name in names})
            )
    return lines


def over_runs(scores: Sequence[Pooled | None]) -> Pooled | None:
    """Scores of runs of several seeds as one; that of one run as it is."""
    there = [score for score in scores if score is not None]
    return there[0] if len(there) == 1 else over([score.mean for score in there])


def images_seen(line: TableRow) -> str:
    """Of the training, where the model comes from a folder that says so."""
    training = line.manifest.get("training")
    return f"{training['images_seen']:,}" if training else "-"


def weights(line: TableRow) -> str:
    """Which weights were scored; what the export says goes over the manifest, which once said ema of all of them."""
    return str((line.manifest.get("training") or {}).get("weights", line.manifest.get("weights")))


def checkpoint(line: TableRow) -> str:
    """The folder of the weights that were scored, and the step that they are of."""
    step = (line.manifest.get("training") or {}).get("step")
    return Path(line.manifest.get("checkpoint") or "-").name + ("" if step is None else f", step {step:,}")


Cell = Callable[[TableRow], str]
SETTINGS: dict[str, Cell] = {
    "run": lambda line: line.name,
    "stage": lambda line: str(line.manifest.get("stage")),
    "references": lambda line: str(line.manifest.get("num_references")),
    "images seen": images_seen,
    "sampler, steps x guidance": lambda line: sampler_in_words(line.manifest),
    "weights": weights,
    "checkpoint": checkpoint,
    "precision of sampling": lambda line: str(line.manifest.get("precision")),
    "scored reference": lambda line: str(line.manifest.get("scored_reference")),
    "judged by": lambda line: judge_in_words(line.manifest),
}
SPEED: dict[str, Cell] = {"images/s": lambda line: f"{line.manifest.get('images_per_second', float('nan')):.3g}"}


def columns_of(lines: Sequence[TableRow]) -> tuple[dict[str, Cell], dict[str, str]]:
    """The columns before the scores, of what differs between the lines; and what all lines share.

    Seeds are a column where the settings leave two lines alike or there are repeats; the result's name, where these do, too.
    """
    found: dict[str, Cell] = {}
    shared: dict[str, str] = {}
    judges = {line.entries[0].judge(FULL) for line in lines}
    for name, cell in SETTINGS.items():
        values = judges if name == "judged by" else {cell(line) for line in lines}
        if name == "run" or len(values) > 1:
            found[name] = cell
        else:
            shared[name] = cell(lines[0])
    if any(len(entry.repeats) > 1 for line in lines for entry in line.entries) or alike(lines, found):
        found["seeds"] = lambda line: seeds([result for entry in line.entries for result in entry.repeats])
    if alike(lines, found):
        found["result"] = lambda line: Path(line.entries[0].repeats[0].where).stem.rsplit("-", 1)[-1]
    return found, shared


def alike(lines: Sequence[TableRow], columns: dict[str, Cell]) -> bool:
    """Whether two lines look the same in these columns."""
    return len({tuple(cell(line) for cell in columns.values()) for line in lines}) < len(lines)


def around(line: TableRow, columns: dict[str, Cell], scores: list[str]) -> list[str]:
    """The cells of a line around its scores."""
    return [cell(line) for cell in columns.values()] + scores + [cell(line) for cell in SPEED.values()]


def footnotes(lines: Sequence[TableRow], shared: dict[str, str], compared: Comparison) -> str:
    """What all lines share, and how to read the table."""
    told = ", ".join(f"{name.split(',')[0]} {value}" for name, value in shared.items() if value not in ("-", "None", ""))
    notes = [f"All rows: {told}."] if told else []
    notes.append("↑ higher is better, ↓ lower is better; the best of the rows that are judged alike is marked.")
    verdicts = {verdict for line in lines for verdict in line.verdicts.values()}
    if "within noise" in verdicts:
        notes.append("≈ differs from the best by no more than noise (95 %, from the spread over runs of other seeds).")
    if any(len(line.entries) > 1 or len(line.entries[0].repeats) > 1 for line in lines):
        notes.append("Results that differ in their seed alone are one row: mean ± standard deviation over n seeds.")
    if len({line.entries[0].judge(FULL) for line in lines}) > 1:
        notes.append(
            "Not all rows are judged alike (extractor, its weights, reference, number and choice of images): compare only those."
        )
    for name in sorted({"classifier", "judge"} & {line.manifest.get("extractor") for line in lines}):
        notes.append(
            f"Scores by {name!r} are analogues on its features: they are no FID, IS or KID and compare only with each other."
        )
    notes += gaps_in_words([line.entries[0] for line in lines if len(line.entries) == 1], compared.metrics)
    notes += compared.shown_notes()
    return "\n".join(textwrap.fill(note, WIDTH, break_long_words=False, break_on_hyphens=False) for note in notes) + "\n"


def csv_text(entries: Sequence[Entry], names: Sequence[str]) -> str:
    """Plain numbers of every result: the settings, each score (and its std), speed, and the hashes of what judged."""
    extra = ["decoder_evaluations_per_image", "extractor_fingerprint", "reference_hash", "weights_fingerprint", "seed", "date"]
    metrics = [str(metric_of(name)) for name in names]
    results = [(entry, result) for entry in entries for result in entry.repeats]
    spread = {name for name in metrics if any(isinstance(result.scores.get(name), dict) for _, result in results)}
    columns = [column for name in metrics for column in [name, f"{name}_std"][: 1 + (name in spread)]]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*SETTINGS, *columns, *SPEED, *extra, "file"])
    for entry, result in results:
        line = TableRow([Entry(entry.run, [result], entry.own)], {}, {})
        scores: list[str] = []
        for name in metrics:
            score = result.scores.get(name)
            scores.append("" if score is None else repr(value(score)))
            if name in spread:
                scores.append(repr(score["std"]) if isinstance(score, dict) else "")
        cells = [[cell(line) for cell in about.values()] for about in (SETTINGS, SPEED)]
        writer.writerow([*cells[0], *scores, *cells[1], *(result.manifest.get(key) for key in extra), result.where])
    return buffer.getvalue()


def beside_each_other(lines: Sequence[TableRow], names: Sequence[str]) -> Image.Image | None:
    """The sample grids, each under its run's name and scores; a warning names those that are missing or cannot be read."""
    newest = [line.entries[0].repeats[0] for line in lines]
    for result in newest:
        if result.open_picture is None:
            log.warning("%s is missing.", Path(result.where).with_suffix(".png"))
    found = opened_pictures({str(i): result.open_picture for i, result in enumerate(newest) if result.open_picture})
    captions = []
    for line in (lines[int(i)] for i in found):
        scores = [f"{title_of(name)} {line.shown(name)}" for name in names if name in line.scores]
        captions.append(f"{line.name}\n{', '.join(scores)}\n{sampler_in_words(line.manifest)}")
    return captioned(list(found.values()), captions) if found else None
