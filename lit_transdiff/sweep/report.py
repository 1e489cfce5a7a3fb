"""The summary of a sweep as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lit_transdiff.base.files import replace_file
from lit_transdiff.study.compare import compare
from lit_transdiff.study.report import CLAIMS, read_sets, report_file, write_report
from lit_transdiff.study.runs import runs
from lit_transdiff.study.scored import entries_of
from lit_transdiff.study.text import frame
from lit_transdiff.sweep.definition import Sweep
from lit_transdiff.sweep.results import inputs_in_words
from lit_transdiff.sweep.study import study_in_words
from lit_transdiff.sweep.trial import Trial

if TYPE_CHECKING:
    import pandas as pd


def outcome(sweep: Sweep, trials: Sequence[Trial], folder: Path) -> str:
    """The table of the trials, best settings (averaged over seeds) first, and the place of their files."""
    count = Counter[str](trial.state for trial in trials)
    told = ", ".join(f"{count[state]} {state}" for state in ("finished", "stopped", "failed") if count[state])
    head = f"\n{len(trials)} trials: {told}"
    try:
        found = runs(folder)
    except FileNotFoundError:
        return f"{head}\n\nNo trial has produced a run. Their outputs: {folder / 'logs'}"
    metric = sweep.metric
    if metric is None or not any(metric in entry.scores() for run in found for entry in entries_of(run)):
        head += f"; none has logged {sweep.metric}" if sweep.metric else ""
        return told_of(head, compare(found).table, folder)
    compared = compare(found, [metric], {metric: sweep.maximize})
    mean = compared.table[metric].copy()
    for rows, of_group in zip(compared.members, compared.groups[f"{metric} mean"], strict=True):
        mean[rows] = of_group
    table = compared.table.assign(verdict=compared.verdict_of_rows(metric), mean=mean)
    table = table.sort_values(["mean", metric], ascending=not sweep.maximize)
    return told_of(head, table.drop(columns="mean"), folder)


def write_claims(sweep: Sweep, trials: Sequence[Trial], folder: Path) -> str:
    """The claims of a study as text, also written to ``study.md`` and shown on the page ``report.html``."""
    told = study_in_words(sweep, trials) + inputs_in_words(folder)
    replace_file(folder / CLAIMS, "".join(f"- {line}\n" for line in told).encode())
    text = "\n".join(["", *told, ""])
    try:
        page = write_report(read_sets([str(folder)]), report_file(str(folder)), title=sweep.name)
    except FileNotFoundError:
        return f"{text}\nNo trial has produced a run. Their outputs: {folder / 'logs'}"
    return f"{text}\n{page}"


def told_of(head: str, table: pd.DataFrame, folder: Path) -> str:
    """Format the summary with its table."""
    shown = frame(table.drop(columns=["seed", "judged by"]))
    return f"{head}\n\n{shown}\n\nTry next: lit-transdiff report {folder}"


def failures(trials: Sequence[Trial], folder: Path, tries: int) -> str | None:
    """A sentence about failed trials and how to try them again; None if no trial failed."""
    failed = [trial for trial in trials if trial.state == "failed"]
    if not failed:
        return None
    more = max(trial.failures for trial in failed) + 1
    enough = all(trial.failures < tries for trial in failed)
    again = "The same command" if enough else f"With --tries {more} the same command"
    log = folder / "logs" / f"{failed[-1].id}.log"
    return f"{len(failed)} of {len(trials)} trials failed; see {log}. {again} tries them again."
