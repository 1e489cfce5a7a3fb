"""One run of a sweep as the searches and the early stopping see it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

TrialState = Literal["running", "finished", "stopped", "failed"]


@dataclass
class Trial:
    """Its settings (as the command gets them), its state, and the values of the sweep's metric in the order logged.

    ``values`` are those of the last attempt, NaN for what is no number; ``failures`` counts the attempts that have failed.
    """

    id: str
    settings: dict[str, Any]
    state: TrialState = "running"
    values: list[float] = field(default_factory=list)
    failures: int = 0

    def finite(self) -> list[float]:
        """The values that are numbers."""
        return [value for value in self.values if math.isfinite(value)]

    def best(self, maximize: bool) -> float | None:
        """The best value that is a number, or nothing."""
        return (max if maximize else min)(self.finite(), default=None)

    @property
    def diverged(self) -> bool:
        """Whether the last value is not a number."""
        return len(self.values) > 0 and not math.isfinite(self.values[-1])

    def end(self, state: TrialState, values: list[float]) -> None:
        """Note how an attempt has ended."""
        self.state, self.values = state, values
        self.failures += state == "failed"

    def begin_again(self) -> None:
        """Another attempt: what the last one has logged no longer counts."""
        self.state, self.values = "running", []
