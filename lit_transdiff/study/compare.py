"""Comparison of runs: the settings that differ, mean and spread over seeds, and verdicts against noise."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_transdiff.config import require, require_known
from lit_transdiff.study.records import Run
from lit_transdiff.study.repeats import Pooled
from lit_transdiff.study.scored import FULL, Entry, default_metrics, entries_of, higher_is_better, title_of
from lit_transdiff.study.spread import moments, seed_spread, tukey, with_verdict
from lit_transdiff.study.text import frame
from lit_transdiff.study.verdicts import BEST, word_against_best

if TYPE_CHECKING:
    import pandas as pd

SEEDS = ("seed", "evaluation.seed")  # runs that differ only in these are repeats
NOT_SETTINGS = ("name", "output_dir", "tracking.")  # names and paths do not affect results
MAX_NOTES = 10  # the most notes to print
MAX_IN_LABEL = 6  # the most settings in a label


def is_setting(name: str) -> bool:
    return name not in SEEDS and not any(
        name == word or (word.endswith(".") and name.startswith(word)) for word in NOT_SETTINGS
    )


def differing(compared: Sequence[Run | Entry]) -> list[str]:
    """Dotted names of the settings in which runs differ, except seeds.

    A setting that a run does not have (runs of earlier versions have fewer) does not count as a difference.
    """
    settings = [one.settings for one in compared]
    names = dict.fromkeys(name for config in settings for name in config if is_setting(name))
    return [name for name in names if len({repr(config[name]) for config in settings if name in config}) > 1]


def labels(runs: Sequence[Run]) -> dict[str, str]:
    """Labels for figures by ``where``: the settings that differ, as in ``num_noise_draws 4, seed 1``.

    Runs without differences, or with more than ``MAX_IN_LABEL``, are labelled by their names.
    """
    seeds = [name for name in SEEDS if len({run.settings.get(name) for run in runs}) > 1]
    names = [*differing(runs), *seeds]
    if not 0 < len(names) <= MAX_IN_LABEL:
        return distinct(runs, {run.where: run.name for run in runs})
    return distinct(
        runs, {run.where: label({name: run.settings.get(name) for name in names}) for run in runs}
    )


def distinct(runs: Sequence[Run], texts: Mapping[str, str]) -> dict[str, str]:
    """Labels of runs by ``where``; equal ones also get the parent folder and the run's name or id."""
    clash = Counter(texts.values())
    told = {
        run.where: f"{texts[run.where]} ({Path(run.where).parent.name}/{Path(run.where).name})"
        for run in runs
        if clash[texts[run.where]] > 1
    }
    return {**texts, **told}


def label(settings: Mapping[str, Any]) -> str:
    """Settings as text, each with the last part of its dotted name."""
    words = [
        (name.split(".")[-1], f"{value:.3g}" if isinstance(value, float) else str(value))
        for name, value in settings.items()
    ]
    return ", ".join(f"{name} {value}" for name, value in words)


@dataclass(frozen=True, repr=False)
class Comparison:
    """A comparison of runs; the display in Python, the command, a sweep's summary and the page show it.

    ``table`` has one row per run, and one per evaluation with other settings than the run's own. ``groups``
    has one row per set of finished runs that differ only in their seeds, with mean, std and count.
    ``settings`` are the columns of settings in both, ``metrics`` the others. ``notes`` list what is not
    averaged and why. ``entries`` and ``scores`` correspond to the rows of ``table``. ``members`` are the rows
    averaged in each group, ``others`` those with the same settings that are not averaged. ``judges`` are the
    judges of each group by metric: None if the members have different ones.
    """

    table: pd.DataFrame
    groups: pd.DataFrame
    settings: list[str]
    metrics: list[str]
    notes: list[str]
    entries: list[Entry]
    scores: list[dict[str, Pooled]]
    members: list[list[int]]
    others: list[list[int]]
    judges: dict[str, list[Any]]
    higher: dict[str, bool]

    def verdicts(self, metric: str) -> pd.DataFrame:
        """The difference of each group to the best one in ``metric``, its noise, and a verdict.

        The noise is Tukey's honestly significant difference at 95 %, which holds for all pairs of groups at
        once: q s sqrt((1/n_1 + 1/n_2) / 2), where s is the standard deviation over seeds, pooled over all
        groups with several. If all have the same seeds, only what differs between groups within a seed
        counts. If no group has two seeds, the verdict is "unknown". Groups are compared only with groups of
        the same judge; a group without any is "alone", and groups with equal means are "equal".
        """
        require(metric in self.metrics, "metric", metric, ", ".join(self.metrics))
        mean, count = (self.groups[f"{metric} {part}"] for part in ("mean", "n"))
        result = self.groups[self.settings].assign(mean=mean, n=count, difference=math.nan, noise=math.nan)
        result["verdict"] = [self.unjudged(metric, i) or "alone" for i in range(len(result))]
        alike: dict[Any, list[int]] = {}
        for i, judge in enumerate(self.judges[metric]):
            if not self.unjudged(metric, i):
                alike.setdefault(judge, []).append(i)
        for among in alike.values():
            if len(among) > 1:
                found = self.differences(metric, among)
                result.loc[among, ["difference", "noise"]] = found
                equal = all(gap == 0 for gap, _ in found)
                result.loc[among, "verdict"] = [
                    "equal" if equal else word_against_best(gap, noise) for gap, noise in found
                ]
        return result

    def verdict_of_rows(self, metric: str) -> list[str]:
        """The verdict of the group of each row of ``table``; empty for rows that are not averaged."""
        found = [""] * len(self.entries)
        for word, rows in zip(self.verdicts(metric)["verdict"], self.members, strict=True):
            for i in rows:
                found[i] = word if metric in self.scores[i] else ""
        return found

    def unjudged(self, metric: str, i: int) -> str | None:
        """The reason why a group has no verdict, or None."""
        group = self.groups.iloc[i]
        if group["runs"] == 0:
            return "no finished run"
        if self.judges[metric][i] is None:
            return "judged differently"
        if group[f"{metric} n"] == 0:
            return "not measured"
        return "diverged" if group["diverged"] or not math.isfinite(group[f"{metric} mean"]) else None

    def differences(self, metric: str, among: Sequence[int]) -> list[list[float]]:
        """The differences of groups to the best of them, and the noise of each difference."""
        mean, count = (self.groups[f"{metric} {part}"].loc[list(among)] for part in ("mean", "n"))
        best = mean.idxmax() if self.higher[metric] else mean.idxmin()
        spread, free = seed_spread([self.by_seed(metric, k) for k in among])
        noise = tukey(len(among), free) * spread * (1 / count + 1 / count[best]) ** 0.5
        return [[gap, size] for gap, size in zip(mean - mean[best], noise, strict=True)]

    def by_seed(self, metric: str, group: int) -> dict[Hashable, float]:
        """The values of a group's runs by their seeds, or by their rows if they have no known seed."""
        rows = [i for i in self.members[group] if metric in self.scores[i]]
        return {seed_of(self.entries[i], i): self.scores[i][metric].mean for i in rows}

    @property
    def summary(self) -> pd.DataFrame:
        """Mean, spread and verdict of every metric as text, one row per group."""
        keys = self.settings or ["first run"]
        shown = self.groups[[*keys, "runs"]].copy()
        for metric in self.metrics:
            found = self.verdicts(metric).assign(std=self.groups[f"{metric} std"])
            parts = found[["mean", "std", "verdict", "difference", "noise"]].itertuples(index=False)
            shown[metric] = [with_verdict(*part) for part in parts]
        return shown

    def shown(self) -> tuple[list[pd.DataFrame], list[str]]:
        """The parts to print: the table, the groups if one has several runs, and the notes."""
        judges, notes, table = self.table["judged by"], self.shown_notes(), self.table
        if judges.nunique() <= 1:
            table = table.drop(columns="judged by")
            if judges.iloc[0] and any(metric.startswith(FULL) for metric in self.metrics):
                notes.append(f"scores by {judges.iloc[0]}")
        if self.groups["runs"].max() > 1:
            return [table, self.summary], notes
        for metric in self.metrics:
            best = [
                self.table["run"][i] for i, word in enumerate(self.verdict_of_rows(metric)) if word == BEST
            ]
            notes += [f"best {title_of(metric)}: {', '.join(best)}"] if best else []
        return [table], [*notes, "noise is unknown: no settings have two finished runs with different seeds"]

    def shown_notes(self) -> list[str]:
        """The first ``MAX_NOTES`` notes, and the number of the others."""
        more = len(self.notes) - MAX_NOTES
        return self.notes[:MAX_NOTES] + ([f"and {more} more are not averaged"] if more > 0 else [])

    def __str__(self) -> str:
        tables, notes = self.shown()
        texts = [frame(table) for table in tables]
        return "\n\n".join([*texts, "\n".join(notes)]).rstrip()

    __repr__ = __str__  # for consoles

    def _repr_html_(self) -> str:
        tables, notes = self.shown()
        texts = [table.to_html(index=False, float_format=lambda value: f"{value:.4g}") for table in tables]
        return "".join([*texts, *(f"<div>{html.escape(note)}</div>" for note in notes)])


def compare(
    runs: Sequence[Run], metrics: Sequence[str] | None = None, higher: Mapping[str, bool] | None = None
) -> Comparison:
    """Compare runs in a table with only the settings that differ, and group finished runs over their seeds.

    ``metrics`` default to the scores of evaluations and the losses; ``higher`` tells for metrics other than
    scores whether higher is better. Raises ``ValueError`` for a metric that no run has.
    """
    import pandas as pd

    require(len(runs) > 0, "runs", len(runs), "at least one")
    entries = [entry for run in runs for entry in entries_of(run)]
    settings, scores = differing(entries), [entry.scores() for entry in entries]
    there = dict.fromkeys(name for found in scores for name in found)
    for name in metrics or []:
        require_known("metrics", name, there)
    chosen = list(metrics) if metrics is not None else default_metrics(there)
    rows = [row_of(entry, found, settings, chosen) for entry, found in zip(entries, scores, strict=True)]
    groups: dict[Hashable, list[int]] = {}
    for i, (entry, row) in enumerate(zip(entries, rows, strict=True)):
        groups.setdefault((entry.stage, entry.identity, *(repr(row[name]) for name in settings)), []).append(
            i
        )
    kept = [averaged(entries, group) for group in groups.values()]
    members, notes = [rows for rows, _ in kept], [note for _, why in kept for note in why]
    others = [
        [i for i in group if i not in rows] for group, rows in zip(groups.values(), members, strict=True)
    ]
    judges = {name: [one_judge(entries, scores, name, group) for group in members] for name in chosen}
    means = []
    for k, (group, averages) in enumerate(zip(groups.values(), members, strict=True)):
        about: dict[str, Any] = {name: rows[group[0]][name] for name in settings}
        diverged = sum(entries[i].run.diverged for i in averages)
        about |= {"runs": len(averages), "diverged": diverged, "first run": entries[group[0]].run.name}
        for name in chosen:
            alike = [] if judges[name][k] is None else averages
            about |= moments(name, [scores[i][name].mean for i in alike if name in scores[i]])
        means.append(about)
    upwards = {name: (higher or {}).get(name, higher_is_better(name)) for name in chosen}
    tables = pd.DataFrame(rows), pd.DataFrame(means)
    return Comparison(*tables, settings, chosen, notes, entries, scores, members, others, judges, upwards)


def row_of(
    entry: Entry, scores: Mapping[str, Pooled], settings: Sequence[str], metrics: Sequence[str]
) -> dict[str, Any]:
    """The row of an entry in the table."""
    run, config = entry.run, entry.settings
    row = {
        "run": run.name,
        "seed": config.get("seed"),
        "state": "diverged" if run.diverged else run.state,
        "step": run.step,
    }
    row |= {name: groupable(config[name]) if name in config else math.nan for name in settings}
    row |= {name: scores[name].mean if name in scores else math.nan for name in metrics}
    return row | {"judged by": entry.judge_in_words()}


def seed_of(entry: Entry, row: int) -> Hashable:
    """The seeds of a run; its row if they are not known."""
    settings = entry.run.settings
    return tuple(settings.get(name) for name in SEEDS) if "seed" in settings else row


def averaged(entries: Sequence[Entry], group: Sequence[int]) -> tuple[list[int], list[str]]:
    """Select the runs of a group to average: finished, same step, each seed once. Notes cover the others."""
    finished = [i for i in group if entries[i].run.state == "finished"]
    last = max((entries[i].run.step or 0 for i in finished), default=0)
    kept: dict[Hashable, int] = {}
    notes = []
    for i in group:
        run = entries[i].run
        seed = seed_of(entries[i], i)
        if i not in finished:
            notes.append(f"{run.name} is not averaged: {run.state} at step {run.step}")
        elif (run.step or 0) != last:
            notes.append(
                f"{run.name} is not averaged: it ended at step {run.step}, others of its settings at {last}"
            )
        elif seed in kept:
            same = entries[kept[seed]].run.name
            notes.append(f"{run.name} is not averaged: its settings and seed are those of {same}")
        else:
            kept[seed] = i
    return list(kept.values()), list(dict.fromkeys(notes))


def one_judge(
    entries: Sequence[Entry], scores: Sequence[Mapping[str, Pooled]], metric: str, kept: Sequence[int]
) -> Any:
    """The common judge of the ``kept`` entries in ``metric``, or None if they have different ones."""
    judges = {entries[i].judge(metric) for i in kept if metric in scores[i]}
    return None if len(judges) > 1 else next(iter(judges), ())


def groupable(value: Any) -> Any:
    """A value for grouping tables; None becomes text, because missing means that a run lacks the setting."""
    return str(value) if isinstance(value, list | dict | None) else value
