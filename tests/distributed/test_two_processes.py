"""Two processes over gloo, started by torchrun as a user would, against one process."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_transdiff.loading import save_yaml
from tests.small import ROOT, small_run

NO_DROPOUT = {"attention_dropout": 0.0, "projection_dropout": 0.0}
RUNS = {
    "ar_pretrain": {"model": NO_DROPOUT},
    "mrar_finetune": {"model": {**NO_DROPOUT, "num_references": 4}, "training": {"micro_batch_size": 2}},
}


def command_line(processes: int, *command: str) -> list[str]:
    """``lit-transdiff`` in one or several processes, with torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    torchrun += ["--master_addr", "127.0.0.1", "--master_port", port]
    return [sys.executable, *(torchrun if processes > 1 else []), "-m", "lit_transdiff", *command]


def start(processes: int, *command: str) -> None:
    """Run ``lit-transdiff`` in one or several processes; fails with its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command_line(processes, *command), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def losses(folder: Path) -> list[float]:
    with open(folder / "metrics.csv", newline="") as file:
        return [float(row["value"]) for row in csv.DictReader(file) if row["metric"] in ("train/loss", "val/loss")]


@pytest.mark.slow
@pytest.mark.parametrize("stage", RUNS)
def test_two_processes_train_as_one(tmp_path: Path, stage: str):
    for processes in (1, 2):
        run = small_run(tmp_path, name=f"on-{processes}", stage=stage, **RUNS[stage])
        save_yaml(run, tmp_path / "run.yaml")
        start(processes, "train", str(tmp_path / "run.yaml"))
    one, two = tmp_path / "on-1", tmp_path / "on-2"
    assert losses(one) == pytest.approx(losses(two), rel=1e-4)
    weights = [load_file(folder / "export" / "model.safetensors") for folder in (one, two)]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=2e-5, rtol=1e-3)


@pytest.mark.slow
def test_several_processes_cache_as_one(tmp_path: Path):
    recipe = str(ROOT / "experiments/fashion/ar_pretrain.yaml")
    for processes in (1, 2, 5):  # five: one more than there are shards
        start(processes, "cache", recipe, str(ROOT / "data/fashion/evaluation"), str(tmp_path / f"on-{processes}"))
    names = sorted(p.name for p in (tmp_path / "on-1").glob("*.tar"))
    assert len(names) == 4
    for other in ("on-2", "on-5"):
        assert all((tmp_path / "on-1" / name).read_bytes() == (tmp_path / other / name).read_bytes() for name in names)


@pytest.mark.slow
def test_two_processes_run_a_pipeline_to_its_comparison(tmp_path: Path):
    little = ["training.max_steps=4", "training.checkpoint_every=2", "optimizer.warmup_steps=1", "model.size=test"]
    little += ["sampling.num_steps=2", "evaluation.num_images=21", "training.num_validation_samples=16", "tracking.wandb=false"]
    start(2, "run", str(ROOT / "experiments/fashion/pipeline.yaml"), f"output_dir={tmp_path}", *little)
    with open(tmp_path / "comparison.csv", newline="") as file:
        assert {row["run"] for row in csv.DictReader(file)} == {"ar_pretrain", "diffusion_head", "mrar_finetune"}
    for result in tmp_path.rglob("evaluations/*.json"):
        assert json.loads(result.read_text())["manifest"]["num_ranks"] == 2
