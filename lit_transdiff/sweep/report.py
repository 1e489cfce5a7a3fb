"""What a sweep found, in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_transdiff.study.compare import compare
from lit_transdiff.study.runs import runs
from lit_transdiff.study.scored import scores_of
from lit_transdiff.sweep.definition import Sweep
from lit_transdiff.sweep.trial import Trial


def outcome(sweep: Sweep, trials: Sequence[Trial], folder: Path) -> str:
    """The table of the trials, best first, and where to look."""
    count = {state: sum(trial.state == state for trial in trials) for state in ("finished", "stopped", "failed")}
    told = ", ".join(f"{number} {state}" for state, number in count.items() if number)
    head = f"\n{len(trials)} trials: {told}"
    try:
        found = runs(folder)
    except FileNotFoundError:
        return f"{head}\n\nNo trial has left a run. Their outputs: {folder / 'logs'}"
    logged = sweep.metric is not None and any(sweep.metric in scores_of(run) for run in found)
    table = compare(found, [str(sweep.metric)] if logged else None).table
    if logged:
        table = table.sort_values(sweep.metric, ascending=not sweep.maximize)
    elif sweep.metric is not None:
        head += f"; none has logged {sweep.metric}"
    text = table.drop(columns=["seed", "judged by"]).to_string(index=False, float_format=lambda value: f"{value:.4g}")
    return f"{head}\n\n{text}\n\nTry next: lit-transdiff report {folder}"
