"""Killed again and again, a run ends in the bits of one that was never touched, and uses each sample of an epoch once."""

import json
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_transdiff.config import AutoencoderConfig, DataConfig, RunConfig
from lit_transdiff.data.pack import pack
from lit_transdiff.distributed import build_fabric
from lit_transdiff.loading import to_dict
from lit_transdiff.prepare import cache
from tests.data.conftest import CLASSES, PER_CLASS, write_image_folder
from tests.distributed.launch import ENVIRONMENT, command_line, values
from tests.small import FASHION, ROOT, small_run

TIMES = {"max_steps": 18, "global_batch_size": 4, "checkpoint_every": 3, "validate_every": 6, "log_every": 1}
ONE_STEP = {"model": {"num_classes": 5}, "training": {**TIMES, "micro_batch_size": 2}}  # 65 rows an epoch: two epochs are touched
MRAR = {"stage": "mrar_finetune", "model": {"num_classes": 5, "num_references": 4}, "training": TIMES}  # 15 groups an epoch
LATENTS = {"latent_channels": 4, "latent_size": 8, "patch_size": 2}
# Case -> processes, workers, kind of data, settings, kills (where, step, rank). A number is seconds after the first step.
CASES = {
    "one-step, images": (1, 0, "images", ONE_STEP, [("step", 4, 0), ("save", 6, 0), ("validation", 12, 0), ("0.3", 0, 0)]),
    "MRAR, latents, 2 workers": (1, 2, "latents", MRAR, [("worker", 5, 0), ("save", 9, 0)]),
    "one-step, latents, 2 processes": (2, 0, "latents", ONE_STEP, [("step", 5, 1), ("save", 9, 1), ("validation", 12, 0)]),
    "MRAR, images, 2 processes, 2 workers": (2, 2, "images", MRAR, [("worker", 4, 1), ("0.4", 0, 1)]),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """65 images of 5 classes as image shards and as latent shards."""
    root = tmp_path_factory.mktemp("data")
    pack(write_image_folder(root / "files", size=32), root / "images", samples_per_shard=7, progress=False)
    autoencoder = AutoencoderConfig(kind="kl", path=str(FASHION / "autoencoder"))
    settings = DataConfig(image_size=32, image_channels=1)
    cache(root / "images", root / "latents", autoencoder=autoencoder, data=settings, fabric=build_fabric(), flips=True)
    return {"images": root / "images", "latents": root / "latents"}


def case_run(folder: Path, name: str, shards: dict[str, Path], case: str) -> RunConfig:
    _, workers, kind, settings, _ = CASES[case]
    source = str(shards[kind])
    data = {"train": source, "evaluation": source, "image_size": 32, "image_channels": 1, "num_workers": workers}
    changes = {**settings, "data": data}
    if kind == "latents":
        changes["model"] = {**settings["model"], **LATENTS}
        changes["autoencoder"] = {"kind": "kl", "path": str(FASHION / "autoencoder")}
    return small_run(folder, name=name, **changes)


def start(run: RunConfig, processes: int, where: str = "nowhere", step: int = 0, rank: int = 0) -> int:
    """The exit code; a kill of one of two ranks must end the job within 45 seconds."""
    file = Path(run.output_dir) / f"{run.name}.json"
    file.write_text(json.dumps(to_dict(run)))
    line = command_line(processes, "-m", "tests.distributed.killed", str(file), where, str(step), str(rank))
    done = subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    if where == "nowhere":
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        assert time.time() - float(file.with_suffix(".time").read_text()) < 45, "the job outlived the kill for too long"
        assert processes == 1 or f"rank      : {rank} " in done.stderr  # torchrun names the rank
        named = f"rank {rank} on" in done.stderr and ".tar/" in done.stderr  # with the step and the samples
        assert named or where != "worker", done.stderr
    return done.returncode


def uses(run: RunConfig, processes: int) -> dict[int, Counter]:
    """Step -> how often each sample was used in it, in the last attempt at the step."""
    steps: dict[int, Counter] = {}
    for rank in range(processes):
        attempts: dict[int, list[list[int]]] = {}
        for line in Path(run.output_dir, f"{run.name}-rank-{rank}.jsonl").read_text().splitlines():
            step, samples = json.loads(line)
            attempts.setdefault(step, []).append(samples)
        passes = 2 if processes == 1 and run.training.micro_batch_size else 1
        for step, tried in attempts.items():
            steps.setdefault(step, Counter()).update(sample for samples in tried[-passes:] for sample in samples)
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_at_any_moment_ends_in_the_same_bits(tmp_path: Path, shards: dict[str, Path], case: str):
    processes, _, _, _, kills = CASES[case]
    whole, killed = case_run(tmp_path, "whole", shards, case), case_run(tmp_path, "killed", shards, case)
    start(whole, processes)
    for kill in kills:
        code = start(killed, processes, *kill)
        assert code != 0 if processes > 1 or kill[0] == "worker" else code == -signal.SIGKILL, kill
    start(killed, processes)
    for metric in ("train/loss", "val/loss", "train/gradient_norm", "train/lr", "train/images_seen"):
        assert values(whole.folder, metric) == values(killed.folder, metric), metric
    assert len(values(killed.folder)) == 18 and list(values(killed.folder, "val/loss")) == [6, 12, 18]
    a, b = (load_file(run.folder / "export" / "model.safetensors") for run in (whole, killed))
    assert all(torch.equal(a[name], b[name]) for name in a)

    used = uses(killed, processes)
    assert used == uses(whole, processes)
    per_epoch = len(CLASSES) * PER_CLASS if killed.model.num_references == 1 else len(CLASSES) * (PER_CLASS // 4) * 4
    total = Counter()
    for step in range(per_epoch // killed.images_per_step):  # the steps that lie in the first epoch
        total.update(used[step])
    assert set(total.values()) == {1}
    assert total.total() > 0.9 * per_epoch or killed.model.num_references > 1
