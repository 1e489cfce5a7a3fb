"""The definition of a sweep: search, parameters, metric and early termination."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lit_transdiff.config import require
from lit_transdiff.sweep.distributions import Spec
from lit_transdiff.sweep.launching import LauncherConfig

Path_ = tuple[str, ...]  # the nested keys of a parameter


@dataclass(frozen=True)
class Hyperband:
    """W&B's early termination; its bands count logged values of the metric."""

    eta: float = 3
    max_iter: int | None = None
    min_iter: int | None = None
    s: int = 2
    strict: bool = False

    def __post_init__(self) -> None:
        one = (self.max_iter is None) != (self.min_iter is None)
        allowed = "one of max_iter and min_iter"
        require(one, "early_terminate", {"max_iter": self.max_iter, "min_iter": self.min_iter}, allowed)
        require(self.eta > 1, "early_terminate.eta", self.eta, "above 1")
        allowed = "max_iter of at least eta"
        require(len(self.bands) > 0, "early_terminate", {"max_iter": self.max_iter, "eta": self.eta}, allowed)

    @property
    def bands(self) -> list[int]:
        """The numbers of values after which a run is judged, in ascending order."""
        if self.min_iter is not None:
            return [int(self.min_iter * self.eta**i) for i in range(30)]
        assert self.max_iter is not None
        bands = [self.max_iter / self.eta ** (i + 1) for i in range(self.s)]
        return sorted({int(band) for band in bands if band >= 1})


@dataclass(frozen=True)
class Sweep:
    """The content of a sweep file, checked by ``load_sweep``."""

    name: str
    method: str
    parameters: dict[Path_, Spec]
    metric: str | None = None
    maximize: bool = False
    target: float | None = None  # no further trial starts after one has reached it
    impute: str = "worst"  # the value of a failed trial in bayes: worst, best or latest
    impute_while_running: str = "false"  # for a running trial: false (none), worst, best or latest
    early_terminate: Hyperband | None = None
    command: list[str] | None = None
    program: str | None = None
    project: str | None = None
    run_cap: int | None = None
    launcher: LauncherConfig = field(default_factory=LauncherConfig)  # where trials run
    source: dict[str, Any] = field(default_factory=dict)
    study: Any = None  # a sweep.study.Study, for method "study"

    def nested(self, values: dict[Path_, Any]) -> dict[str, Any]:
        """Nest parameter values as in the file."""
        result: dict[str, Any] = {}
        for path, value in values.items():
            place = result
            for key in path[:-1]:
                place = place.setdefault(key, {})
            place[path[-1]] = value
        return result

    def flat(self, settings: dict[str, Any]) -> dict[Path_, Any]:
        """The inverse of ``nested``."""
        values: dict[Path_, Any] = {}
        for path in self.parameters:
            value: Any = settings
            for key in path:
                value = value[key]
            values[path] = value
        return values
