"""What a sweep found, in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_transdiff.study.compare import compare
from lit_transdiff.study.runs import runs
from lit_transdiff.study.scored import scores_of
from lit_transdiff.study.text import frame
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
    text = frame(table.drop(columns=["seed", "judged by"]))
    return f"{head}\n\n{text}\n\nTry next: lit-transdiff report {folder}"


def failures(trials: Sequence[Trial], folder: Path, tries: int) -> str | None:
    """What to say of the trials that have failed, and how to try them again; nothing, if none has."""
    failed = [trial for trial in trials if trial.state == "failed"]
    if not failed:
        return None
    more = max(trial.failures for trial in failed) + 1
    again = "The same command" if all(trial.failures < tries for trial in failed) else f"With --tries {more} the same command"
    log = folder / "logs" / f"{failed[-1].id}.log"
    return f"{len(failed)} of {len(trials)} trials failed; see {log}. {again} tries them again."
