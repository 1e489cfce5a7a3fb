"""Runs beside each other: only the settings that differ, mean and spread over seeds, which differences exceed noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_transdiff.config import require
from lit_transdiff.evaluation.metrics import METRICS
from lit_transdiff.tracking.records import Run

if TYPE_CHECKING:
    import pandas as pd

SEEDS = ("seed", "evaluation.seed")  # runs that differ in these alone are repeats of one another
NOT_SETTINGS = ("name", "output_dir", "tracking.")  # names and places decide no number
CONFIDENCE = 0.95
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
    """For figures: what tells each run from the others, as ``num_noise_draws 4, seed 1``, by the run's name.

    Runs that differ in nothing, or in more than ``MAX_IN_LABEL`` settings, keep their names.
    """
    seeds = [name for name in SEEDS if len({run.settings.get(name) for run in runs}) > 1]
    names = [*differing(runs), *seeds]
    if not 0 < len(names) <= MAX_IN_LABEL:
        return {run.name: run.name for run in runs}
    return {run.name: label({name: run.settings.get(name) for name in names}) for run in runs}


def label(settings: Mapping[str, Any]) -> str:
    """Settings in words, each by the last word of its dotted name."""
    words = [
        (name.split(".")[-1], f"{value:.3g}" if isinstance(value, float) else str(value)) for name, value in settings.items()
    ]
    return ", ".join(f"{name} {value}" for name, value in words)


def higher_is_better(metric: str) -> bool:
    """From the table of metrics for ``eval/NAME``; everything else is a loss."""
    name = metric.removeprefix("eval/")
    return name in METRICS and METRICS[name].higher_is_better


def scores_of(run: Run) -> dict[str, float]:
    """``eval/NAME`` of the run's last evaluation, beside the last value of every logged metric."""
    latest = run.last_evaluation
    scores = {f"eval/{name}": latest.value(name) for name in latest.scores} if latest else {}
    return {**{key: value for key, value in run.summary.items() if isinstance(value, int | float)}, **scores}


def default_metrics(runs: Sequence[Run]) -> list[str]:
    """The scores that any run has, in the order of the table of metrics, and the losses."""
    found = dict.fromkeys(name for run in runs for name in scores_of(run))
    scores = [f"eval/{name}" for name in METRICS if f"eval/{name}" in found]
    return scores + [name for name in ("val/loss", "train/loss") if name in found]


@dataclass(frozen=True, repr=False)
class Comparison:
    """``table``: one row a run. ``groups``: one row for runs that differ in their seeds alone, with mean, std and count.

    ``settings`` are the columns of settings in both, ``metrics`` the others.
    """

    table: pd.DataFrame
    groups: pd.DataFrame
    settings: list[str]
    metrics: list[str]

    def verdicts(self, metric: str) -> pd.DataFrame:
        """Each group against the best in ``metric``: its difference, how large noise makes one, and which it is.

        Noise is the least significant difference of Fisher at 95 %: t s sqrt(1/n_1 + 1/n_2), where s is the standard deviation
        over seeds, pooled over all groups that have several. Where no group has two seeds, the verdict is "unknown".
        """
        require(metric in self.metrics, "metric", metric, ", ".join(self.metrics))
        mean, std, count = (self.groups[f"{metric} {part}"] for part in ("mean", "std", "n"))
        free = (count - 1).clip(lower=0)
        pooled = ((std.fillna(0) ** 2 * free).sum() / free.sum()) ** 0.5 if free.sum() else float("nan")
        best = mean.idxmax() if higher_is_better(metric) else mean.idxmin()
        result = self.groups[self.settings].assign(mean=mean, n=count, difference=mean - mean[best])
        result["noise"] = student(int(free.sum())) * pooled * (1 / count + 1 / count[best]) ** 0.5
        result["verdict"] = [verdict(gap, noise, i == best) for i, gap, noise in result[["difference", "noise"]].itertuples()]
        return result

    def __str__(self) -> str:
        return self.table.to_string(index=False, float_format=lambda value: f"{value:.4g}")

    __repr__ = __str__  # what a console shows

    def _repr_html_(self) -> str:
        return self.table.to_html(index=False, float_format=lambda value: f"{value:.4g}")


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
    """Runs as a table with only the settings that differ, and grouped over their seeds.

    ``metrics`` default to the scores of their evaluations and the losses.
    """
    import pandas as pd

    require(len(runs) > 0, "runs", len(runs), "at least one")
    settings = differing(runs)
    chosen = list(metrics) if metrics is not None else default_metrics(runs)
    rows = []
    for run in runs:
        config, scores = run.settings, scores_of(run)
        row: dict[str, Any] = {"run": run.name, "seed": config.get("seed")}
        row |= {name: plain(config[name]) if name in config else float("nan") for name in settings}
        rows.append(row | {name: scores.get(name, float("nan")) for name in chosen})
    table = pd.DataFrame(rows)
    return Comparison(table, grouped(table, settings, chosen), settings, chosen)


def grouped(table: pd.DataFrame, settings: list[str], metrics: list[str]) -> pd.DataFrame:
    """One row for each combination of settings, in the order of their first run."""
    import pandas as pd

    keys = settings or ["run"]
    found = []
    for values, part in table.groupby(keys, sort=False, dropna=False):
        row: dict[str, Any] = dict(zip(keys, values, strict=True)) | {"runs": len(part), "first run": part["run"].iloc[0]}
        for name in metrics:
            row |= {f"{name} mean": part[name].mean(), f"{name} std": part[name].std(), f"{name} n": part[name].count()}
        found.append(row)
    return pd.DataFrame(found)


def plain(value: Any) -> Any:
    """A value that a table can group by. None is a setting, in words: a missing number is one that a run does not have."""
    return str(value) if isinstance(value, list | dict | None) else value
