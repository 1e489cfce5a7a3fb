"""Whole commands in several processes over gloo, started by torchrun; training itself is in
``test_strategies``.
"""

import csv
import json
from pathlib import Path

import pytest

from tests.helpers import forks
from tests.helpers.forks import run_forked
from tests.helpers.processes import PROGRAM, start
from tests.helpers.small import ROOT


@pytest.mark.slow
def test_several_processes_cache_as_one(tmp_path: Path):
    recipe, images = ROOT / "experiments/fashion/ar_pretrain.yaml", ROOT / "data/fashion/evaluation"
    for processes in (1, 2, 5):  # five: one more than there are shards
        run_forked(
            processes, forks.PROGRAM, "cache", str(recipe), str(images), str(tmp_path / f"on-{processes}")
        )
    names = sorted(p.name for p in (tmp_path / "on-1").glob("*.tar"))
    assert len(names) == 4
    for other in ("on-2", "on-5"):
        assert all(
            (tmp_path / "on-1" / name).read_bytes() == (tmp_path / other / name).read_bytes()
            for name in names
        )


@pytest.mark.slow
def test_two_processes_run_a_pipeline_to_its_comparison(tmp_path: Path):
    little = [
        "training.max_steps=4",
        "training.checkpoint_every=2",
        "optimizer.warmup_steps=1",
        "model.size=test",
    ]
    little += [
        "sampling.num_steps=2",
        "evaluation.num_images=21",
        "training.num_validation_samples=16",
        "tracking.wandb=false",
    ]
    start(
        2, *PROGRAM, "run", str(ROOT / "experiments/fashion/pipeline.yaml"), f"output_dir={tmp_path}", *little
    )
    with open(tmp_path / "comparison.csv", newline="") as file:
        assert {row["run"] for row in csv.DictReader(file)} == {
            "ar_pretrain",
            "diffusion_head",
            "mrar_finetune",
        }
    for result in tmp_path.rglob("evaluations/*.json"):
        assert json.loads(result.read_text())["manifest"]["num_ranks"] == 2
