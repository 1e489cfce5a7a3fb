"""What a sweep found, in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_transdiff.sweep.file import SweepFile
from lit_transdiff.sweep.trial import Trial
from lit_transdiff.tracking.compare import compare
from lit_transdiff.tracking.runs import runs


def outcome(sweep: SweepFile, trials: Sequence[Trial], folder: Path) -> str:
    """The table of the trials, best first, and where to look."""
    count = {state: sum(trial.state == state for trial in trials) for state in ("finished", "stopped", "failed")}
    told = ", ".join(f"{number} {state}" for state, number in count.items() if number)
    found = runs(folder)
    metrics = [sweep.metric] if sweep.metric else None
    table = compare(found, metrics).table
    if sweep.metric:
        table = table.sort_values(sweep.metric, ascending=not sweep.maximize)
    text = table.drop(columns=["seed"]).to_string(index=False, float_format=lambda value: f"{value:.4g}")
    return f"\n{len(trials)} trials: {told}\n\n{text}\n\nTry next: lit-transdiff report {folder}"
