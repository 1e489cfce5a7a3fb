"""Steps whose loss goes wrong."""

from __future__ import annotations

from typing import Any

import pytest

from lit_transdiff.stages.base import TransDiffStage


def spoil(monkeypatch: pytest.MonkeyPatch, *steps: int, factor: float = float("nan")) -> None:
    """Multiply the loss of these steps (from 0)."""
    original = TransDiffStage.objective

    def objective(self: Any, batch: Any, normal: Any) -> Any:
        rows, t = original(self, batch, normal)
        return (rows * factor if self.global_step in steps and self.trainer.training else rows), t

    monkeypatch.setattr(TransDiffStage, "objective", objective)
