"""A run as people read it afterwards: the same object for a run folder, an offline W&B log and a run at W&B."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lit_transdiff.evaluation.scores import value
from lit_transdiff.tracking.place import flat

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

AXES = ("step", "images_seen", "device_hours")  # the first columns of every history
Pictures = dict[str, "Callable[[], Image.Image]"]  # name -> what opens it


@dataclass(frozen=True)
class Evaluation:
    """Scores, and everything that decided them; the scores are numbers, or mean and std."""

    scores: dict[str, Any]
    manifest: dict[str, Any]
    open_picture: Callable[[], Image.Image] | None = None

    def value(self, name: str) -> float:
        """A score as one number: its mean, if it has a spread."""
        return value(self.scores[name])


@dataclass(frozen=True)
class Run:
    """One run. ``config`` and ``summary`` are nested as they were given; ``where`` is its folder or address."""

    id: str
    name: str
    stage: str
    group: str
    tags: list[str]
    state: str  # finished, unfinished, running, failed, ...
    config: dict[str, Any]
    summary: dict[str, Any]
    where: str
    read_history: Callable[[], pd.DataFrame] = field(repr=False)
    evaluations: list[Evaluation] = field(default_factory=list, repr=False)
    open_pictures: Callable[[], Pictures] = field(default=dict, repr=False)

    def history(self, keys: Sequence[str] | None = None) -> pd.DataFrame:
        """One row a logged step: step, images_seen, device_hours, then the metrics; NaN where one was not logged.

        With ``keys``, those metrics only, in the rows that have one of them.
        """
        table = self.read_history()
        if keys is None:
            return table
        wanted = [key for key in keys if key in table]
        return table[[*AXES, *wanted]].dropna(how="all", subset=wanted).reset_index(drop=True)

    @property
    def last_evaluation(self) -> Evaluation | None:
        """The newest of its evaluations, if it has any."""
        return max(self.evaluations, key=lambda evaluation: evaluation.manifest.get("date", ""), default=None)

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration by dotted names."""
        return flat(self.config)

    def pictures(self) -> dict[str, Image.Image]:
        """Pictures that are not of a training step, such as ``final`` and ``references``."""
        return {name: load() for name, load in self.open_pictures().items() if not name.startswith("step-")}

    def samples(self) -> dict[int, Image.Image]:
        """The sample grids through training, by step."""
        found = {int(name[5:]): load for name, load in self.open_pictures().items() if name.startswith("step-")}
        return {step: found[step]() for step in sorted(found)}


def last_values(history: pd.DataFrame) -> dict[str, float]:
    """The last value of each metric of a history."""
    columns = [column for column in history if column not in AXES]
    found = {str(column): history[column].dropna() for column in columns}
    return {name: float(values.iloc[-1]) for name, values in found.items() if len(values)}


def fits(run: Run, filters: Mapping[str, Any]) -> bool:
    """Whether a run has what ``filters`` ask for.

    A key is a field (``group``, ``stage``, ``name``, ``state``, ``id``), ``config.DOTTED.NAME`` or ``summary.NAME``; a value is
    what it must equal, a list of which it must be one, or a function that must return true.
    """
    for key, wanted in filters.items():
        section, _, rest = key.partition(".")
        if section == "config":
            value = run.settings.get(rest)
        elif section == "summary":
            value = run.summary.get(rest)
        elif section == "tags":
            value = wanted if wanted in run.tags else None
        else:
            value = getattr(run, key)
        if callable(wanted):
            met = bool(wanted(value))
        else:
            met = value in wanted if isinstance(wanted, list | tuple | set) else value == wanted
        if not met:
            return False
    return True


def number(value: Any) -> Any:
    """W&B writes numbers that are not finite as words."""
    words = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
    return words.get(value, value) if isinstance(value, str) else value
