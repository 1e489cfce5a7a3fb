"""Impossible sizes are refused in one line before anything of that size is made;
possible ones are accepted.
"""

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lit_transdiff.base.endings import EXIT_REQUEUE
from lit_transdiff.cli.pipeline import dry_run
from lit_transdiff.config.loading import save_yaml
from lit_transdiff.distributed import sizes
from lit_transdiff.distributed.sizes import check_sizes
from lit_transdiff.models.sizes import Room, least_of_row
from lit_transdiff.planning.memory import model_cost, pass_cost
from lit_transdiff.stages import STAGES
from tests.helpers.forks import PROGRAM, forked
from tests.helpers.kinds import KINDS, kind_run
from tests.helpers.small import small_run

CANNOT_WORK: list[tuple[str, dict[str, Any]]] = [
    ("training.global_batch_size", {"training": {"global_batch_size": 10**8}}),
    ("training.global_batch_size", {"training": {"global_batch_size": 10**8, "micro_batch_size": 1}}),
    ("training.max_steps", {"training": {"max_steps": 10**15}}),
    ("flow.num_noise_draws", {"flow": {"num_noise_draws": 10**9}}),
    ("model.width", {"model": {"width": 10**6}}),
    ("model.mlp_ratio", {"model": {"mlp_ratio": 1e12}}),
    ("model.encoder_blocks", {"model": {"encoder_blocks": 10**9}}),
    ("model.num_classes", {"model": {"num_classes": 10**12}}),
    ("model.num_class_tokens", {"model": {"num_class_tokens": 10**12}}),
    ("model.num_context_tokens", {"model": {"num_context_tokens": 10**9}}),
    ("model.latent_size", {"data": {"image_size": 10**6}, "model": {"latent_size": 10**6}}),
    ("data.image_size", {"stage": "classifier", "data": {"image_size": 10**6}}),
    (
        "autoencoder_training.block_channels",
        {"stage": "autoencoder", "autoencoder_training": {"block_channels": [10**6]}},
    ),
    (
        "autoencoder_training.layers_per_block",
        {"stage": "autoencoder", "autoencoder_training": {"layers_per_block": 10**9}},
    ),
    (
        "autoencoder_training.num_statistics_images",
        {"stage": "autoencoder", "autoencoder_training": {"num_statistics_images": 10**12}},
    ),
    ("data.num_workers", {"data": {"num_workers": 10**6}}),
    ("distributed.devices", {"distributed": {"devices": 10**4}, "training": {"global_batch_size": 10**4}}),
    ("distributed.timeout_minutes", {"distributed": {"timeout_minutes": 1e300}}),
    ("evaluation.batch_size", {"evaluation": {"batch_size": 10**9}}),
    ("evaluation.num_images", {"evaluation": {"num_images": 10**9}}),
    ("evaluation.online_images", {"evaluation": {"online_images": 10**9}}),
    ("sampling.num_steps", {"sampling": {"num_steps": 10**9}}),
]


@pytest.mark.parametrize(("field", "changes"), CANNOT_WORK)
def test_a_size_that_cannot_work_is_refused_before_anything_is_made(
    tmp_path: Path, field: str, changes: dict[str, Any]
) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match=field) as error:
        dry_run([small_run(tmp_path, **changes)], say=lambda text: None)
    assert "\n" not in str(error.value)
    assert "allowed: " in str(error.value)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_refused_is_far_above_what_is_counted(tmp_path: Path, kind: str) -> None:
    """The bounds are below the planner's numbers, but close enough to be useful."""
    run = kind_run(tmp_path, kind)
    counted = pass_cost(run, bf16=run.training.precision != "fp32").row_bytes
    assert counted / 30 < least_of_row(run, STAGES[run.stage].head_alone) < counted / 2
    parameters = model_cost(run).parameters
    assert parameters / 2 < sum(run.model.least_parameters().values()) < parameters


def test_a_run_that_is_started_must_fit_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outline of a run that leaves its devices open is made on any machine."""
    monkeypatch.setattr(sizes, "room_here", lambda device: Room(1e6, "this machine"))
    run = small_run(tmp_path, model={"width": 256})
    check_sizes(run, outline=True)
    with pytest.raises(ValueError, match=r"model.width=256.* of 1 MB|model.width=256.*1 MB of this machine"):
        check_sizes(run)
    with pytest.raises(ValueError, match="1 MB of this machine"):
        check_sizes(small_run(tmp_path, model={"width": 256}, distributed={"devices": 1}), outline=True)


@pytest.mark.slow
def test_the_largest_batch_that_is_allowed_answers_a_signal(tmp_path: Path) -> None:
    run = small_run(
        tmp_path, training={"global_batch_size": 40_000, "micro_batch_size": 1, "checkpoint_every": 1}
    )
    save_yaml(run, tmp_path / "run.yaml")
    process = forked(1, PROGRAM, "train", str(tmp_path / "run.yaml"), log=tmp_path / "log")
    deadline = time.monotonic() + 90
    while not (run.folder / "environment.json").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    code = process.wait(60)
    assert time.monotonic() - asked < 45
    assert code == EXIT_REQUEUE, (tmp_path / "log").read_text()
