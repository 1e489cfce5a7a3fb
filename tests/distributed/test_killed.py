"""Killed again and again, a run ends in the bits of one that was never touched, and uses each sample of an
epoch once.
"""

import json
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_transdiff.checkpoints.format import complete_checkpoints
from lit_transdiff.config import AutoencoderConfig, DataConfig, RunConfig
from lit_transdiff.config.loading import to_dict
from lit_transdiff.data.pack import Cut, pack
from lit_transdiff.distributed import build_fabric
from lit_transdiff.evaluation.features import load_extractor
from lit_transdiff.evaluation.prepare import cache
from lit_transdiff.evaluation.statistics import reference_statistics, save_statistics
from tests.helpers.forks import Forked, forked
from tests.helpers.processes import background, command_line, numbers, values
from tests.helpers.shards import CLASSES, PER_CLASS, write_image_folder
from tests.helpers.small import FAMILIES, FASHION, NO_DROPOUT, small_run

TIMES = {"max_steps": 18, "global_batch_size": 4, "checkpoint_every": 3, "validate_every": 6, "log_every": 1}
STAGES: dict[str, dict[str, Any]] = {
    # 65 rows an epoch: two are touched
    "one-step": {"model": {"num_classes": 5}, "training": {**TIMES, "micro_batch_size": 2}},
    # 15 groups an epoch
    "MRAR": {"stage": "mrar_finetune", "model": {"num_classes": 5, "num_references": 4}, "training": TIMES},
}
LATENTS = {"latent_channels": 4, "latent_size": 8, "patch_size": 2}
Moment = tuple[str, int, int]  # where, in which step, on which rank; a number is seconds after the first step
# By processes, workers, stage and kind of data, of which any three meet in each way.
KILLS: dict[tuple[int, int, str, str], list[Moment]] = {
    (1, 0, "one-step", "images"): [("step", 4, 0), ("save", 6, 0), ("validation", 12, 0), ("0.3", 0, 0)],
    (1, 0, "MRAR", "latents"): [("step", 2, 0), ("0.3", 0, 0), ("scores", 16, 0), ("validation", 18, 0)],
    (1, 2, "one-step", "latents"): [("validation", 6, 0), ("worker", 10, 0), ("scores", 12, 0)],
    (1, 2, "MRAR", "images"): [("worker", 8, 0), ("save", 15, 0), ("0.1", 0, 0)],
    (2, 0, "one-step", "latents"): [("step", 5, 1), ("save", 9, 1), ("validation", 12, 0)],
    (2, 0, "MRAR", "images"): [("scores", 4, 0), ("step", 7, 1), ("scores", 12, 1), ("0.3", 0, 0)],
    (2, 2, "one-step", "images"): [("worker", 7, 0), ("save", 15, 0), ("0.2", 0, 1)],
    (2, 2, "MRAR", "latents"): [("worker", 3, 1), ("validation", 6, 1), ("worker", 11, 0)],
}
# In processes that torchrun starts as for a user. Of ranks that it forks, it may name the one that lost the
# other.
STARTED_ANEW = (2, 0, "one-step", "latents")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """65 images of 5 classes as shards of images and of latents, and statistics to score with."""
    root = tmp_path_factory.mktemp("data")
    pack(
        write_image_folder(root / "files", size=32),
        root / "images",
        cut=Cut(samples_per_shard=7),
        progress=False,
    )
    autoencoder = AutoencoderConfig(kind="kl", path=str(FASHION / "autoencoder"))
    settings = DataConfig(image_size=32, image_channels=1)
    cache(
        root / "images",
        root / "latents",
        autoencoder=autoencoder,
        data=settings,
        fabric=build_fabric(),
        flips=True,
    )
    images = torch.rand(60, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    extractor = load_extractor("classifier", FASHION / "classifier.safetensors")
    save_statistics(reference_statistics(images.split(20), extractor), root / "reference.npz")
    return root


def case_run(folder: Path, name: str, shards: Path, workers: int, stage: str, kind: str) -> RunConfig:
    source = str(shards / kind)
    data = {
        "train": source,
        "evaluation": source,
        "image_size": 32,
        "image_channels": 1,
        "num_workers": workers,
    }
    scores = {
        "extractor": "classifier",
        "extractor_weights": str(FASHION / "classifier.safetensors"),
        "every": 4,
    }
    scores |= {
        "reference": str(shards / "reference.npz"),
        "metrics": ["frechet_distance"],
        "online_images": 6,
        "batch_size": 2,
    }
    changes = {**STAGES[stage], "data": data, "evaluation": scores}
    if kind == "latents":
        changes["model"] = {**changes["model"], **LATENTS}
        changes["autoencoder"] = {"kind": "kl", "path": str(FASHION / "autoencoder")}
    return small_run(folder, name=name, **changes)


def start(
    run: RunConfig, processes: int, kill: Moment = ("nowhere", 0, 0), started_anew: bool = False
) -> int:
    """The exit code; a kill of one of two ranks must end the job within 45 seconds."""
    where, step, rank = kill
    file = Path(run.output_dir) / f"{run.name}.json"
    file.write_text(json.dumps(to_dict(run)))
    log = file.with_suffix(".log")
    program = ("tests.helpers.killed", str(file), where, str(step), str(rank))
    if started_anew:
        process: Forked | subprocess.Popen = background(command_line(processes, "-m", *program), log)
    else:
        process = forked(processes, *program, log=log)
    code, text = process.wait(300), log.read_text()
    if where == "nowhere":
        assert code == 0, text
    else:
        assert time.time() - float(file.with_suffix(".time").read_text()) < 45, (
            "the job outlived the kill for too long"
        )
        assert not started_anew or f"rank      : {rank} " in text  # torchrun names the rank
        named = f"rank {rank} on" in text and ".tar/" in text  # with the step and the samples
        assert named or where != "worker", text
    return code


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
            steps.setdefault(step, Counter()).update(
                sample for samples in tried[-passes:] for sample in samples
            )
    return steps


@pytest.fixture(scope="module")
def untouched(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str, str], RunConfig]:
    """The run that was never killed, without workers; made once."""
    folder = tmp_path_factory.mktemp("whole")

    def of(processes: int, stage: str, kind: str) -> RunConfig:
        run = case_run(folder, f"{processes}-{stage}-{kind}", shards, 0, stage, kind)
        if not (run.folder / "export").exists():
            start(run, processes)
        return run

    return of


@pytest.mark.slow
@pytest.mark.parametrize("case", KILLS, ids=lambda case: "{} processes, {} workers, {}, {}".format(*case))
def test_killed_at_any_moment_ends_in_the_same_bits(
    tmp_path: Path,
    shards: Path,
    untouched: Callable[[int, str, str], RunConfig],
    case: tuple[int, int, str, str],
):
    processes, workers, stage, kind = case
    whole, broken = (
        untouched(processes, stage, kind),
        case_run(tmp_path, "killed", shards, workers, stage, kind),
    )
    for kill in KILLS[case]:
        code = start(broken, processes, kill, started_anew=case == STARTED_ANEW)
        assert code != 0 if processes > 1 or kill[0] == "worker" else code == -signal.SIGKILL, kill
    start(broken, processes)
    metrics = (
        "train/loss",
        "val/loss",
        "train/gradient_norm",
        "train/lr",
        "train/images_seen",
        "online/frechet_distance",
    )
    for metric in metrics:
        assert values(whole.folder, metric) == values(broken.folder, metric), metric
    assert len(values(broken.folder)) == 18 and list(values(broken.folder, "val/loss")) == [6, 12, 18]
    assert list(values(broken.folder, "online/frechet_distance")) == [4, 8, 12, 16, 18]
    a, b = (load_file(run.folder / "export" / "model.safetensors") for run in (whole, broken))
    assert all(torch.equal(a[name], b[name]) for name in a)

    used = uses(broken, processes)
    assert used == uses(whole, processes)
    per_epoch = (
        len(CLASSES) * PER_CLASS if broken.model.num_references == 1 else len(CLASSES) * (PER_CLASS // 4) * 4
    )
    total = Counter()
    for step in range(per_epoch // broken.images_per_step):  # the steps that lie in the first epoch
        total.update(used[step])
    assert set(total.values()) == {1}
    assert total.total() > 0.9 * per_epoch or broken.model.num_references > 1


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_killed_after_a_checkpoint_ends_in_the_same_bits(tmp_path: Path, family: str):
    """The checkpoint is within a window of metrics, which is logged before the kill and again after it; a
    family that has dropout draws it.
    """
    model = {key: 0.1 if key in NO_DROPOUT else value for key, value in FAMILIES[family]["model"].items()}
    changes = {**FAMILIES[family], "model": model, "training": {"checkpoint_every": 2, "log_every": 3}}
    whole, broken = (small_run(tmp_path, name=name, **changes) for name in ("whole", "killed"))
    start(whole, 1)
    assert start(broken, 1, ("step", 3, 0)) == -signal.SIGKILL
    assert [checkpoint.step for checkpoint in complete_checkpoints(broken.folder / "checkpoints")] == [2]
    assert list(values(broken.folder)) == [3] and not (broken.folder / "export").exists()
    start(broken, 1)
    assert (
        f"continuing from {broken.folder}/checkpoints/step-00000002" in (tmp_path / "killed.log").read_text()
    )
    assert numbers(broken) == numbers(whole) and list(values(whole.folder)) == [3, 6]
    for file in ("checkpoints/step-00000006/rank-00000.safetensors", "export/model.safetensors"):
        one, other = (load_file(run.folder / file) for run in (whole, broken))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), file
