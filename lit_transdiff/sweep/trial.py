"""One run of a sweep as the searches and the early stopping see it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["running", "finished", "stopped", "failed"]


@dataclass
class Trial:
    """Its settings (as the command gets them), its state, and the values of the sweep's metric in the order logged."""

    id: str
    settings: dict[str, Any]
    state: State = "running"
    values: list[float] = field(default_factory=list)

    def finite(self) -> list[float]:
        """The values that are numbers."""
        return [value for value in self.values if math.isfinite(value)]

    def best(self, maximize: bool) -> float | None:
        """The best value that is a number, or nothing."""
        return (max if maximize else min)(self.finite(), default=None)
