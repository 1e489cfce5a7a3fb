"""Runs whose optimizer clips within its step and updates averages with it, against torch's AdamW."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lit_transdiff.stages.adamw import AveragedAdamW
from tests.helpers.small import STEADY
from tests.stages.test_stock_trainer import fitted, parts_of, saving

pytestmark = pytest.mark.filterwarnings("ignore")
CLIP = 0.05  # below the norm of every step here


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """Let the plain form of the kernels do the steps, as a stand-in; their maximal norms."""
    adamw = pytest.importorskip("lit_transdiff.kernels.adamw")
    found: list[float | None] = []

    def step(groups, settings, shares, max_norm):
        found.append(max_norm)
        adamw.plain_adamw(groups, settings, shares, max_norm)

    monkeypatch.setattr(adamw, "Tables", lambda groups: groups)
    monkeypatch.setattr(adamw, "adamw", step)
    monkeypatch.setattr("lit_transdiff.stages.adamw.adamw_works", lambda device: True)
    return found


def run_of(
    folder: Path, steps: int, kernels: bool, monkeypatch: pytest.MonkeyPatch, **settings
) -> pl.Trainer:
    monkeypatch.setattr(AveragedAdamW, "kernels", kernels)
    optimizer = {**STEADY, "more_ema_decays": [0.5]}
    return fitted(parts_of(folder, steps, optimizer=optimizer), gradient_clip_val=CLIP, **settings)


def test_a_run_is_the_same_and_goes_on_from_its_checkpoint(
    tmp_path: Path, norms: list[float | None], monkeypatch: pytest.MonkeyPatch
):
    plain = run_of(tmp_path / "plain", 4, False, monkeypatch)
    assert not norms
    mine = run_of(tmp_path / "mine", 4, True, monkeypatch, **saving(tmp_path / "of_mine", 2))
    assert norms == [CLIP] * 3  # the first step, in which the states begin, is torch's
    again = run_of(tmp_path / "again", 4, True, monkeypatch, ckpt_path=tmp_path / "of_mine" / "step=2.ckpt")
    for other, exact in ((again, True), (plain, False)):
        for p, q in zip(mine.lightning_module.parameters(), other.lightning_module.parameters(), strict=True):
            states, others = mine.optimizers[0].state[p], other.optimizers[0].state[q]
            tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-6}
            torch.testing.assert_close(p, q, **tolerance)
            torch.testing.assert_close(dict(states), dict(others), **tolerance)
