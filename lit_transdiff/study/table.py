"""The command ``compare``: results below a folder as Markdown, CSV, text, and a picture of their samples."""

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
from lit_transdiff.study.differences import notes_on_scores
from lit_transdiff.study.records import opened_pictures
from lit_transdiff.study.repeats import Pooled, over, seeds
from lit_transdiff.study.runs import runs
from lit_transdiff.study.scored import (
    FULL,
    Entry,
    higher_is_better,
    judge_in_words,
    metric_of,
    sampler_in_words,
    title_of,
)
from lit_transdiff.study.text import WIDTH, aligned, markdown
from lit_transdiff.study.verdicts import BEST, NO_DIFFERENCE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """The table as aligned text, and the written files; the picture only if there are sample grids."""

    text: str
    markdown: Path
    csv: Path
    picture: Path | None

    def __str__(self) -> str:
        return self.text


def write_comparison(folder: str | Path, output: str | Path) -> Written:
    """Write ``comparison.md``, ``.csv`` and ``.png`` of the results below ``folder`` to ``output``.

    Results that differ only in seeds are one line with mean and spread; verdicts are those of ``compare``.
    The CSV has every result file. Raises ``FileNotFoundError`` if there is no such file, and ``ValueError``
    if none is a result.
    """
    result_files(folder)
    compared, output = compare_results(folder), Path(output)
    check_output(output)
    names = [name for name in compared.metrics if name.startswith(FULL)]
    lines = lines_of(compared, names)
    columns, shared = columns_of(lines)
    output.mkdir(parents=True, exist_ok=True)
    titles = [f"{title_of(name)} {'↑' if higher_is_better(name) else '↓'}" for name in names]
    head = [*columns, *titles, *SPEED]

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
    """Refuse a folder whose files of these names are not comparisons."""
    contents(folder)
    check_replaces(folder / "comparison.md", ["| run |"], "a comparison")
    check_replaces(folder / "comparison.csv", ["run,stage,"], "a comparison")
    if not (folder / "comparison.md").exists():
        check_replaces(folder / "comparison.png", [], "a comparison")


def compare_results(folder: str | Path) -> Comparison:
    """Compare the results below ``folder``. Raises ``ValueError`` if there is no result."""
    none = f"{folder}: none of the files in evaluations/ is a result. Evaluate a trained run first."
    try:
        found = runs(folder)
    except FileNotFoundError as error:
        raise ValueError(none) from error
    if not any(run.evaluations for run in found):
        raise ValueError(none)
    return compare(found)


@dataclass(frozen=True)
class TableRow:
    """A line of the table: results that differ only in their seeds, with pooled scores and verdicts."""

    entries: list[Entry]
    scores: dict[str, Pooled]
    verdicts: dict[str, str]

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the newest result of the first run."""
        return self.entries[0].manifest

    @property
    def name(self) -> str:
        """The name of the first run, and the number of others."""
        more = len(self.entries) - 1
        return self.entries[0].run.name + (f" and {more} with other seeds" if more else "")

    def shown(self, name: str, mark: str = "") -> str:
        """A score with four digits, the number of seeds if several, and marks for the best and its equals."""
        if (score := self.scores.get(name)) is None:
            return "-"
        count = max(len(self.entries), *(len(entry.repeats) for entry in self.entries))
        text = f"{score} (n={score.n})" if count > 1 else str(score)
        verdict = self.verdicts.get(name) if mark else None
        return f"{mark}{text}{mark}" if verdict == BEST else text + " ≈" * (verdict == NO_DIFFERENCE)


def lines_of(compared: Comparison, names: Sequence[str]) -> list[TableRow]:
    """One line per group of the comparison, and per result that is not averaged."""
    lines, verdicts = [], {name: compared.verdict_of_rows(name) for name in names}
    for k, (members, others) in enumerate(zip(compared.members, compared.others, strict=True)):
        together = all(compared.judges[name][k] is not None for name in names)
        for rows in ([members] if together else [[i] for i in members]) + [[i] for i in others]:
            scored = [i for i in rows if compared.entries[i].repeats]
            if not scored:
                continue
            pooled = {name: over_runs([compared.scores[i].get(name) for i in scored]) for name in names}
            scores = {name: score for name, score in pooled.items() if score is not None}
            told = {name: verdicts[name][scored[0]] for name in names}
            lines.append(TableRow([compared.entries[i] for i in scored], scores, told))
    return lines


def over_runs(scores: Sequence[Pooled | None]) -> Pooled | None:
    """Pool the scores of several runs; the score of a single run is unchanged."""
    there = [score for score in scores if score is not None]
    return there[0] if len(there) == 1 else over([score.mean for score in there])


def images_seen(line: TableRow) -> str:
    """The images seen in training, if the model's folder records them."""
    training = line.manifest.get("training")
    return f"{training['images_seen']:,}" if training else "-"


def weights(line: TableRow) -> str:
    """The weights that were scored: from the export, because early manifests always said ema."""
    return str((line.manifest.get("training") or {}).get("weights", line.manifest.get("weights")))


def checkpoint(line: TableRow) -> str:
    """The folder and training step of the weights that were scored."""
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
SPEED: dict[str, Cell] = {
    "images/s": lambda line: f"{line.manifest.get('images_per_second', float('nan')):.3g}"
}


def columns_of(lines: Sequence[TableRow]) -> tuple[dict[str, Cell], dict[str, str]]:
    """The columns before the scores, for properties that differ between lines, and the shared properties.

    Seeds get a column if two lines have equal settings or there are repeats; the result's name gets one if
    lines are still alike.
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
    """Whether two lines are equal in these columns."""
    return len({tuple(cell(line) for cell in columns.values()) for line in lines}) < len(lines)


def around(line: TableRow, columns: dict[str, Cell], scores: list[str]) -> list[str]:
    """The cells of a line, with its scores in the middle."""
    return [cell(line) for cell in columns.values()] + scores + [cell(line) for cell in SPEED.values()]


def footnotes(lines: Sequence[TableRow], shared: dict[str, str], compared: Comparison) -> str:
    """The properties that all lines share, and notes on reading the table."""
    known = {name.split(",")[0]: value for name, value in shared.items() if value not in ("-", "None", "")}
    told = ", ".join(f"{name} {value}" for name, value in known.items())
    notes = [f"All rows: {told}."] if told else []
    notes.append("↑ higher is better, ↓ lower is better; the best row of each judge is marked.")
    verdicts = {verdict for line in lines for verdict in line.verdicts.values()}
    if NO_DIFFERENCE in verdicts:
        notes.append("≈ no difference from the best (95 %, from the spread over seeds).")
    if any(len(line.entries) > 1 or len(line.entries[0].repeats) > 1 for line in lines):
        notes.append("Results that differ only in their seed are one row: mean ± std over n seeds.")
    if len({line.entries[0].judge(FULL) for line in lines}) > 1:
        of_a_judge = "(extractor, weights, reference, images)"
        notes.append(f"Not all rows have the same judge {of_a_judge}: compare those that do.")
    for name in sorted({"classifier", "judge"} & {line.manifest.get("extractor") for line in lines}):
        notes.append(
            f"Scores by {name!r} are analogues on its features, not to be compared with FID, IS or KID."
        )
    notes += notes_on_scores([line.entries[0] for line in lines if len(line.entries) == 1], compared.metrics)
    notes += compared.shown_notes()
    filled = [textwrap.fill(note, WIDTH, break_long_words=False, break_on_hyphens=False) for note in notes]
    return "\n".join(filled) + "\n"


def csv_text(entries: Sequence[Entry], names: Sequence[str]) -> str:
    """All results as CSV: settings, scores (and their std), speed, and hashes of extractor and reference."""
    extra = [
        "decoder_evaluations_per_image",
        "extractor_fingerprint",
        "reference_hash",
        "weights_fingerprint",
        "seed",
        "date",
    ]
    metrics = [str(metric_of(name)) for name in names]
    results = [(entry, result) for entry in entries for result in entry.repeats]
    spread = {name for _, result in results for name in metrics if isinstance(result.scores.get(name), dict)}
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
        before, after = ([cell(line) for cell in about.values()] for about in (SETTINGS, SPEED))
        more = [result.manifest.get(key) for key in extra]
        writer.writerow([*before, *scores, *after, *more, result.where])
    return buffer.getvalue()


def beside_each_other(lines: Sequence[TableRow], names: Sequence[str]) -> Image.Image | None:
    """The sample grids, each under its run's name and scores; missing or unreadable ones give a warning."""
    newest = [line.entries[0].repeats[0] for line in lines]
    for result in newest:
        if result.open_picture is None:
            log.warning("%s is missing.", Path(result.where).with_suffix(".png"))
    there = {str(i): result.open_picture for i, result in enumerate(newest) if result.open_picture}
    found = opened_pictures(there)
    captions = []
    for line in (lines[int(i)] for i in found):
        scores = [f"{title_of(name)} {line.shown(name)}" for name in names if name in line.scores]
        captions.append(f"{line.name}\n{', '.join(scores)}\n{sampler_in_words(line.manifest)}")
    return captioned(list(found.values()), captions) if found else None
