"""Runs beside each other: only the settings that differ, mean and spread over seeds, which differences exceed noise."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_transdiff.config import require, unknown
from lit_transdiff.study.records import Run
from lit_transdiff.study.scored import FULL, default_metrics, higher_is_better, judge_in_words, judge_of, scores_of
from lit_transdiff.study.text import frame

if TYPE_CHECKING:
    import pandas as pd

SEEDS = ("seed", "evaluation.seed")  # runs that differ in these alone are repeats of one another
NOT_SETTINGS = ("name", "output_dir", "tracking.")  # names and places decide no number
CONFIDENCE = 0.95
MAX_NOTES = 10  # on runs that are not averaged, of those printed
MAX_IN_LABEL = 6  # settings that a label may name


def is_setting(name: str) -> bool:
    return name not in SEEDS and not any(name == word or (word.endswith(".") and name.startswith(word)) for word in NOT_SETTINGS)


def differing(runs: Sequence[Run]) -> list[str]:
    """Dotted names of the settings in which the runs differ, seeds left out.

    A setting that a run does not have (an earlier version's run has fewer) is no difference.
    """
    settings = [run.settings for run in runs]
    names = dict.fromkeys(name for config in settings for name in config if is_setting(name))
    return [name for name in names if len({repr(config[name]) for config in settings if name in config}) > 1]


def labels(runs: Sequence[Run]) -> dict[str, str]:
    """For figures: what tells each run from the others, as ``num_noise_draws 4, seed 1``, by where the run is.

    Runs that differ in nothing, or in more than ``MAX_IN_LABEL`` settings, keep their names.
    """
    seeds = [name for name in SEEDS if len({run.settings.get(name) for run in runs}) > 1]
    names = [*differing(runs), *seeds]
    if not 0 < len(names) <= MAX_IN_LABEL:
        return distinct(runs, {run.where: run.name for run in runs})
    return distinct(runs, {run.where: label({name: run.settings.get(name) for name in names}) for run in runs})


def distinct(runs: Sequence[Run], texts: Mapping[str, str]) -> dict[str, str]:
    """Texts of runs by where they are; those that say the same also say the folder that holds the run, and its name or id."""
    clash = Counter(texts.values())
    told = {
        run.where: f"{texts[run.where]} ({Path(run.where).parent.name}/{Path(run.where).name})"
        for run in runs
        if clash[texts[run.where]] > 1
    }
    return {**texts, **told}


def label(settings: Mapping[str, Any]) -> str:
    """Settings in words, each by the last word of its dotted name."""
    words = [
        (name.split(".")[-1], f"{value:.3g}" if isinstance(value, float) else str(value)) for name, value in settings.items()
    ]
    return ", ".join(f"{name} {value}" for name, value in words)


@dataclass(frozen=True, repr=False)
class Comparison:
    """``table``: one row a run. ``groups``: one row for finished runs that differ in their seeds alone, with mean, std and count.

    ``settings`` are the columns of settings in both, ``metrics`` the others. ``notes`` say which runs are not averaged and why.
    ``members`` are the rows of ``table`` that each group averages, ``judges`` who judged them, by metric: nothing where they do
    not agree.
    """

    table: pd.DataFrame
    groups: pd.DataFrame
    settings: list[str]
    metrics: list[str]
    notes: list[str]
    members: list[list[int]]
    judges: dict[str, list[Any]]

    def verdicts(self, metric: str) -> pd.DataFrame:
        """Each group against the best in ``metric``: its difference, how large noise makes one, and which it is.

        Noise is the least significant difference of Fisher at 95 %: t s sqrt(1/n_1 + 1/n_2), where s is the standard deviation
        over seeds, pooled over all groups that have several. Where no group has two seeds, the verdict is "unknown". Groups are
        compared with those that were judged alike, and one that has none such is "alone".
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
                result.loc[among, ["difference", "noise"]] = self.differences(metric, among)
                best = self.best(metric, among)
                found = result.loc[among, ["difference", "noise"]].itertuples()
                result.loc[among, "verdict"] = [verdict(gap, noise, i == best) for i, gap, noise in found]
        return result

    def unjudged(self, metric: str, i: int) -> str | None:
        """Why a group has no verdict, if it has none."""
        group = self.groups.iloc[i]
        if group["runs"] == 0:
            return "no finished run"
        if self.judges[metric][i] is None:
            return "judged differently"
        if group[f"{metric} n"] == 0:
            return "not measured"
        return "diverged" if group["diverged"] or not math.isfinite(group[f"{metric} mean"]) else None

    def best(self, metric: str, among: Sequence[int]) -> int:
        """The group with the best mean."""
        mean = self.groups[f"{metric} mean"].loc[list(among)]
        return int(mean.idxmax() if higher_is_better(metric) else mean.idxmin())

    def differences(self, metric: str, among: Sequence[int]) -> Any:
        """Differences of groups to the best of them, and how large noise makes each, as two columns."""
        mean, std, count = (self.groups[f"{metric} {part}"].loc[list(among)] for part in ("mean", "std", "n"))
        best, free = self.best(metric, among), (count - 1).clip(lower=0)
        pooled = ((std.fillna(0) ** 2 * free).sum() / free.sum()) ** 0.5 if free.sum() else math.nan
        noise = student(int(free.sum())) * pooled * (1 / count + 1 / count[best]) ** 0.5
        return [[gap, size] for gap, size in zip(mean - mean[best], noise, strict=True)]

    @property
    def summary(self) -> pd.DataFrame:
        """Each group in words: mean, spread and verdict of every metric."""
        keys = self.settings or ["first run"]
        shown = self.groups[[*keys, "runs"]].copy()
        for metric in self.metrics:
            verdicts = self.verdicts(metric)["verdict"]
            parts = zip(self.groups[f"{metric} mean"], self.groups[f"{metric} std"], verdicts, strict=True)
            shown[metric] = [in_words(mean, std, word) for mean, std, word in parts]
        return shown

    def shown(self) -> tuple[list[pd.DataFrame], list[str]]:
        """What is printed: the table, the groups where one has several runs, and the notes."""
        judges, notes = self.table["judged by"], self.notes[:MAX_NOTES]
        notes += [f"and {len(self.notes) - MAX_NOTES} more are not averaged"] if len(self.notes) > MAX_NOTES else []
        table = self.table
        if judges.nunique() <= 1:
            table = table.drop(columns="judged by")
            notes += [f"scores by {judges.iloc[0]}"] if judges.iloc[0] and any(m.startswith(FULL) for m in self.metrics) else []
        if self.groups["runs"].max() > 1:
            return [table, self.summary], notes
        return [table], [*notes, "no settings have two finished runs of other seeds: how large noise is, is not known"]

    def __str__(self) -> str:
        tables, notes = self.shown()
        texts = [frame(table) for table in tables]
        return "\n\n".join([*texts, "\n".join(notes)]).rstrip()

    __repr__ = __str__  # what a console shows

    def _repr_html_(self) -> str:
        tables, notes = self.shown()
        texts = [table.to_html(index=False, float_format=lambda value: f"{value:.4g}") for table in tables]
        return "".join([*texts, *(f"<div>{html.escape(note)}</div>" for note in notes)])


def in_words(mean: float, std: float, verdict: str) -> str:
    """``10.5 ± 0.2, within noise``."""
    spread = f" ± {std:.2g}" if math.isfinite(std) else ""
    return f"{mean:.4g}{spread}, {verdict}" if math.isfinite(mean) else verdict


def verdict(gap: float, noise: float, best: bool) -> str:
    """In words."""
    if best:
        return "best"
    if noise != noise:
        return "unknown"
    return "within noise" if abs(gap) <= noise else "worse"


def student(freedom: int) -> float:
    """The t beyond which a fraction 1 - CONFIDENCE lies, two-sided; NaN without a degree of freedom."""
    if freedom == 0:
        return float("nan")
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))


def compare(runs: Sequence[Run], metrics: Sequence[str] | None = None) -> Comparison:
    """Runs as a table with only the settings that differ, and the finished ones grouped over their seeds.

    ``metrics`` default to the scores of their evaluations and the losses. Raises ``ValueError`` for one that no run has.
    """
    import pandas as pd

    require(len(runs) > 0, "runs", len(runs), "at least one")
    settings, scores = differing(runs), [scores_of(run) for run in runs]
    there = dict.fromkeys(name for found in scores for name in found)
    for name in metrics or []:
        if name not in there:
            raise unknown("metrics", name, there)
    chosen = list(metrics) if metrics is not None else default_metrics(runs)
    rows = [row_of(run, found, settings, chosen) for run, found in zip(runs, scores, strict=True)]
    groups: dict[Hashable, list[int]] = {}
    for i, (run, row) in enumerate(zip(runs, rows, strict=True)):
        groups.setdefault((run.stage, *(repr(row[name]) for name in settings)), []).append(i)
    chosen_runs = [averaged(runs, group) for group in groups.values()]
    members, notes = [kept for kept, _ in chosen_runs], [note for _, why in chosen_runs for note in why]
    judges = {name: [one_judge(runs, scores, name, kept) for kept in members] for name in chosen}
    means = []
    for k, (group, kept) in enumerate(zip(groups.values(), members, strict=True)):
        about: dict[str, Any] = {name: rows[group[0]][name] for name in settings}
        about |= {"runs": len(kept), "diverged": sum(runs[i].diverged for i in kept), "first run": runs[group[0]].name}
        for name in chosen:
            alike = [] if judges[name][k] is None else kept
            about |= moments(name, [scores[i][name] for i in alike if name in scores[i]])
        means.append(about)
    return Comparison(pd.DataFrame(rows), pd.DataFrame(means), settings, chosen, notes, members, judges)


def row_of(run: Run, scores: Mapping[str, float], settings: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    """A run's row of the table."""
    config = run.settings
    row = {"run": run.name, "seed": config.get("seed"), "state": "diverged" if run.diverged else run.state, "step": run.step}
    row |= {name: plain(config[name]) if name in config else math.nan for name in settings}
    return row | {name: scores.get(name, math.nan) for name in metrics} | {"judged by": judge_in_words(run)}


def averaged(runs: Sequence[Run], group: Sequence[int]) -> tuple[list[int], list[str]]:
    """Of runs that differ in their seeds alone those to average, finished at the same step, each seed once; and why no others."""
    finished = [i for i in group if runs[i].state == "finished"]
    last = max((runs[i].step or 0 for i in finished), default=0)
    kept: dict[Hashable, int] = {}
    notes = []
    for i in group:
        run = runs[i]
        seed: Hashable = tuple(run.settings.get(name) for name in SEEDS) if "seed" in run.settings else i
        if i not in finished:
            notes.append(f"{run.name} is not averaged: {run.state} at step {run.step}")
        elif (run.step or 0) != last:
            notes.append(f"{run.name} is not averaged: it ended at step {run.step}, others of its settings at {last}")
        elif seed in kept:
            notes.append(f"{run.name} is not averaged: its settings and seed are those of {runs[kept[seed]].name}")
        else:
            kept[seed] = i
    return list(kept.values()), notes


def one_judge(runs: Sequence[Run], scores: Sequence[Mapping[str, float]], metric: str, kept: Sequence[int]) -> Any:
    """Who judged these runs in ``metric``; nothing where they were not judged alike."""
    judges = {judge_of(runs[i], metric) for i in kept if metric in scores[i]}
    return None if len(judges) > 1 else next(iter(judges), ())


def moments(metric: str, values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation and number of values; not a number where one of them is none."""
    count = len(values)
    mean = sum(values) / count if count else math.nan
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1)) if count > 1 else math.nan
    return {f"{metric} mean": mean, f"{metric} std": std, f"{metric} n": count}


def plain(value: Any) -> Any:
    """A value that a table can group by. None is a setting, in words: a missing number is one that a run does not have."""
    return str(value) if isinstance(value, list | dict | None) else value
