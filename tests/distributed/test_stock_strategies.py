"""Lightning's own DDP and FSDP2, and its ModelCheckpoint under our DDP, on two processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.forks import run_forked
from tests.helpers.stock import SAVED, STEPS, STRATEGIES, fit


@pytest.mark.slow
def test_they_train_save_and_resume_as_one_device_does(tmp_path: Path) -> None:
    run_forked(2, "tests.helpers.stock", str(tmp_path))
    expected = fit(tmp_path, "one", resume=False)
    for name, (whole, resumed) in json.loads((tmp_path / "found.json").read_text()).items():
        assert whole["step"] == resumed["step"] == STEPS
        assert resumed == whole, name
        for key in ("train/loss", "val/loss", "norm"):
            assert whole[key] == pytest.approx(expected[key], rel=2e-5), (name, key)
    for name in STRATEGIES:
        saved = tmp_path / name / f"step={SAVED}.ckpt"
        if saved.is_file():
            content = torch.load(saved, weights_only=True)
            assert len(content["state_dict"]) == len(content["optimizer_states"][0]["state"]) > 0
        else:  # FSDP2 writes a folder, each rank its shards
            assert sum(file.stat().st_size for file in saved.glob("*.distcp")) > 100_000
