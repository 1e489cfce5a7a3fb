"""The record of a run for analysis, the same for a run folder, an offline W&B log and a run at W&B."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lit_transdiff.evaluation.scores import value
from lit_transdiff.study.repeats import repeats
from lit_transdiff.tracking.place import flattened

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

LOSSES = ("val/loss", "train/loss")
AXES = ("step", "images_seen", "device_hours")  # the first columns of every history
FIELDS = ("id", "name", "stage", "group", "tags", "state", "where")  # fields of a run for filters
SECTIONS = ("config", "summary")  # sections whose entries filters may name
Pictures = dict[str, "Callable[[], Image.Image]"]  # name -> function that opens the picture
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Scores (numbers, or mean and std) and their manifest; ``where`` is the result file, if any."""

    scores: dict[str, Any]
    manifest: dict[str, Any]
    open_picture: Callable[[], Image.Image] | None = None
    where: str = ""

    def value(self, name: str) -> float:
        """A score as a single number: the number itself or the mean."""
        return value(self.scores[name])


@dataclass(frozen=True)
class Run:
    """One run. ``config`` is nested as in the recipe; ``where`` is its unique folder or address."""

    id: str
    name: str
    stage: str
    group: str
    tags: list[str]
    state: str  # finished, unfinished, running, failed, ...
    config: dict[str, Any]
    where: str
    read_summary: Callable[[], dict[str, Any]] = field(repr=False)
    read_history: Callable[[], pd.DataFrame] = field(repr=False)
    read_step: Callable[[], int | None] = field(repr=False)
    evaluations: list[Evaluation] = field(default_factory=list, repr=False)
    open_pictures: Callable[[], Pictures] = field(default=dict, repr=False)

    @property
    def summary(self) -> dict[str, Any]:
        """The last value of each metric, which may be NaN."""
        return self.read_summary()

    @property
    def step(self) -> int | None:
        """The last step with a logged value."""
        return self.read_step()

    @property
    def diverged(self) -> bool:
        """Whether the last value of a loss is not finite."""
        return any(not math.isfinite(self.summary.get(name, 0)) for name in LOSSES)

    def history(self, keys: Sequence[str] | None = None) -> pd.DataFrame:
        """One row per logged step: step, images_seen, device_hours, then the metrics (NaN if not logged).

        With ``keys``, only those metrics and the rows that have at least one of them.
        """
        table = self.read_history()
        if keys is None:
            return table
        wanted = [key for key in keys if key in table]
        return table[[*AXES, *wanted]].dropna(how="all", subset=wanted).reset_index(drop=True)

    @property
    def evaluation(self) -> Evaluation | None:
        """The newest evaluation with the run's own settings, or else the newest one."""
        own = [evaluation for evaluation in self.evaluations if not self.differences(evaluation)]
        return max(
            own or self.evaluations, key=lambda evaluation: evaluation.manifest.get("date", ""), default=None
        )

    @property
    def repeats(self) -> list[Evaluation]:
        """``evaluation`` and the evaluations that differ from it only in their seed."""
        return next((group for group in repeats(self.evaluations) if self.evaluation in group), [])

    def differences(self, evaluation: Evaluation) -> dict[str, Any]:
        """The sampling settings, number of images and seed of an evaluation that are not the run's own."""
        own, manifest = self.settings, evaluation.manifest
        made = {f"evaluation.{name}": manifest[name] for name in ("num_images", "seed") if name in manifest}
        made |= flattened({"sampling": manifest.get("sampling") or {}})
        return {name: value for name, value in made.items() if name in own and own[name] != value}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration, flattened to dotted names."""
        return flattened(self.config)

    def pictures(self) -> dict[str, Image.Image]:
        """The pictures made after training, such as ``final`` and ``references``."""
        return opened_pictures(
            {name: load for name, load in self.open_pictures().items() if not name.startswith("step-")}
        )

    def samples(self) -> dict[int, Image.Image]:
        """The sample grids made during training, by step."""
        found = opened_pictures(
            {name: load for name, load in self.open_pictures().items() if name.startswith("step-")}
        )
        return dict(sorted((int(name[5:]), picture) for name, picture in found.items()))


def opened_pictures(pictures: Pictures) -> dict[str, Image.Image]:
    """Open pictures by name; unreadable ones are skipped with a warning."""
    found = {}
    for name, load in pictures.items():
        try:
            found[name] = load()
        except ValueError as error:
            log.warning("%s", error)
    return found


def check_filters(filters: Mapping[str, Any]) -> None:
    """Refuse a filter that names neither a field of a run nor a setting or metric."""
    for key in filters:
        section, _, rest = key.partition(".")
        if key not in FIELDS and not (section in SECTIONS and rest):
            allowed = [*FIELDS, *(f"{name}.NAME" for name in SECTIONS)]
            names = f"{', '.join(allowed)} (a setting: config.optimizer.lr)"
            raise ValueError(f"filters: {key!r} is not known; allowed: {names}.")


def fits(run: Run, filters: Mapping[str, Any]) -> bool:
    """Whether a run matches all ``filters``.

    A key is one of ``FIELDS``, ``config.DOTTED.NAME`` or ``summary.NAME``. A value is the required value, a
    list of allowed values, or a predicate. For ``tags``, a run must have the tag or one of the list; a
    predicate gets all its tags.
    """
    for key, wanted in filters.items():
        section, _, rest = key.partition(".")
        values = run.settings if section == "config" else run.summary if section == "summary" else {}
        value = getattr(run, key) if key in FIELDS else values.get(rest)
        allowed = list(wanted) if isinstance(wanted, list | tuple | set) else [wanted]
        if callable(wanted):
            met = bool(wanted(value))
        elif key == "tags":
            met = any(tag in allowed for tag in run.tags)
        else:
            met = value in allowed or value == wanted
        if not met:
            return False
    return True


def number(value: Any) -> Any:
    """Convert W&B's text for non-finite numbers back to a number."""
    words = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
    return words.get(value, value) if isinstance(value, str) else value
