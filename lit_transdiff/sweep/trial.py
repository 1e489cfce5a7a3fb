"""The state of a trial for searches and early termination."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

HOPELESS = 3  # this many failures without any success end a sweep
TrialState = Literal["running", "finished", "stopped", "failed"]


@dataclass
class Trial:
    """A trial: its settings (as passed to the command), state, and logged values of the sweep's metric.

    ``values`` are those of the last attempt in order, NaN if not a number; ``failures`` counts failed
    attempts.
    """

    id: str
    settings: dict[str, Any]
    state: TrialState = "running"
    values: list[float] = field(default_factory=list)
    failures: int = 0

    def finite(self) -> list[float]:
        """The finite values."""
        return [value for value in self.values if math.isfinite(value)]

    def best(self, maximize: bool) -> float | None:
        """The best finite value, or None."""
        return (max if maximize else min)(self.finite(), default=None)

    @property
    def diverged(self) -> bool:
        """Whether the last value is not a number."""
        return len(self.values) > 0 and not math.isfinite(self.values[-1])

    def end(self, state: TrialState, values: list[float]) -> None:
        """Record the end of an attempt."""
        self.state, self.values = state, values
        self.failures += state == "failed"

    def begin_again(self) -> None:
        """Begin another attempt, which discards the values of the last one."""
        self.state, self.values = "running", []


def hopeless(trials: Sequence[Trial]) -> bool:
    """Whether at least ``HOPELESS`` trials have failed and none has ended in another way."""
    ended = [trial.state for trial in trials if trial.state != "running"]
    return len(ended) >= HOPELESS and set(ended) == {"failed"}
