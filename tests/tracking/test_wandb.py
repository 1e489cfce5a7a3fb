"""Runs in W&B, with the real client and our own server: uploaded data, local data, and the effect of an
outage.
"""

from __future__ import annotations

import csv
import json
import os
import time
from pathlib import Path

import pytest
import wandb
from PIL import Image

from lit_transdiff.__main__ import main
from lit_transdiff.cli.pipeline import train_and_score
from lit_transdiff.distributed import build_fabric
from lit_transdiff.study.runs import runs
from lit_transdiff.tracking.loggers import MetricsCSV
from lit_transdiff.tracking.wandb_run import WandbRun
from lit_transdiff.training.callbacks import NonFiniteLoss
from lit_transdiff.training.trainer import train
from tests.helpers.bad_steps import spoil
from tests.helpers.small import FASHION, small_run
from tests.helpers.wandb_runs import TRACKED, rows_of, sync, until
from tests.helpers.wandb_stub import Stub


def csv_values(folder: Path, metric: str) -> dict[int, float]:
    with open(folder / "metrics.csv", newline="") as file:
        return {
            int(row["step"]): float(row["value"]) for row in csv.DictReader(file) if row["metric"] == metric
        }


def test_a_run_arrives_whole_and_leaves_its_files_in_the_run_folder(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = small_run(tmp_path / "runs", tracking=TRACKED, training={"validate_every": 2, "sample_every": 2})
    train(run)
    state, seen = stub.state, stub.state.only_run()
    assert (seen["displayName"], seen["group"], seen["jobType"], seen["tags"]) == (
        "small",
        "g",
        "ar_pretrain",
        ["t"],
    )
    assert seen["state"] == "finished" and seen["config"]["optimizer"]["value"]["lr"] == 1e-3
    losses = {row["trainer/global_step"]: row["train/loss"] for row in rows_of(stub, "train/loss")}
    assert losses == pytest.approx(csv_values(run.folder, "train/loss"))
    assert all(row["images_seen"] == 8 * row["trainer/global_step"] for row in seen["history"])
    wanted = (
        "train/gradient_norm",
        "train/lr",
        "train/ema_distance",
        "train/loss_t0.5",
        "throughput/images_per_second",
    )
    assert all(
        rows_of(stub, key)
        for key in (*wanted, "throughput/data_wait_fraction", "val/loss", "val/feature_diversity")
    )
    assert len(rows_of(stub, "samples")) == 3 and len(rows_of(stub, "samples_table")) == 1
    kinds = {artifact["type"]: artifact for artifact in state.artifacts.values()}
    assert (
        set(kinds["model"]["aliases"]) == {"latest", "best"}
        and "model.safetensors" in kinds["model"]["files"]
    )
    assert state.used == [(seen["name"], "data-train")]
    assert os.listdir(tmp_path) == ["runs"] and os.listdir(tmp_path / "runs") == ["small"]


def test_the_best_model_is_kept_and_named_when_it_is_not_the_last(stub: Stub, tmp_path: Path) -> None:
    train(
        small_run(
            tmp_path,
            tracking=TRACKED | {"registry": "model/fashion"},
            training={"validate_every": 2},
            optimizer={"lr": 0.5, "warmup_steps": 6},
        )
    )
    folder = tmp_path / "small"
    values = csv_values(folder, "val/loss")
    best = min(values, key=values.__getitem__)
    models = [artifact for artifact in stub.state.artifacts.values() if artifact["type"] == "model"]
    aliases = {artifact["metadata"]["step"]: set(artifact["aliases"]) for artifact in models}
    assert best < 6 and aliases == {best: {"best"}, 6: {"latest"}}
    assert json.loads((folder / "best" / "export.json").read_text())["step"] == best
    assert stub.state.linked == [("org-entity/wandb-registry-model/fashion", best)]
    weights = sum(file.stat().st_size for file in (folder / "wandb").rglob("*.safetensors"))
    assert weights == 0  # nothing was copied


@pytest.mark.slow
def test_a_restarted_run_is_one_run(stub: Stub, tmp_path: Path) -> None:
    train(small_run(tmp_path, tracking=TRACKED))
    train(small_run(tmp_path, tracking=TRACKED, training={"max_steps": 10}))
    assert [row["trainer/global_step"] for row in rows_of(stub, "train/loss")] == [2, 4, 6, 8, 10]


def test_a_run_restarted_offline_is_synced_as_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    file = MetricsCSV(tmp_path / "small" / "metrics.csv", images_per_step=8)
    for steps, name in (((1, 2, 3), "val/loss"), ((4, 5), "eval/precision")):
        log = WandbRun(small_run(tmp_path, tracking=TRACKED))
        for step in steps:
            for logger in (log, file):
                logger.log_metrics({"train/loss": float(step), name: step / 2}, step)
        log.finish()
    with Stub() as server:
        sync(server, tmp_path / "small")
        assert [row["train/loss"] for row in rows_of(server, "train/loss")] == [1.0, 2.0, 3.0, 4.0, 5.0]
        summary = server.state.only_run()["summary"]  # of both starts together
        assert [summary[key] for key in ("train/loss", "val/loss", "eval/precision")] == [5.0, 1.5, 2.5]


JUDGED = {
    "extractor": "classifier",
    "extractor_weights": str(FASHION.parent / "fashion" / "classifier.safetensors"),
}
JUDGED |= {"metrics": ["class_accuracy", "inception_score"], "num_images": 20}


def test_scores_go_to_their_run_and_other_evaluations_are_runs_of_their_own(
    stub: Stub, tmp_path: Path
) -> None:
    """The lineage: data index -> model -> evaluation."""
    settings = small_run(tmp_path, tracking=TRACKED, evaluation=JUDGED)
    train(settings)
    # as the pipeline draws it for several references
    successive = tmp_path / "small" / "samples" / "references" / "grid.png"
    successive.parent.mkdir(parents=True)
    Image.new("RGB", (4, 4), (5, 5, 5)).save(successive)
    train_and_score(settings, build_fabric())
    trained = stub.state.only_run()
    assert (
        0 <= trained["summary"]["eval/class_accuracy"] <= 1 and "eval/inception_score" in trained["summary"]
    )
    assert "eval/inception_score_std" not in trained["summary"]  # of one part of the images
    assert trained["config"]["manifest"]["value"]["num_images"] == 20
    assert main(["evaluate", "--checkpoint", str(tmp_path / "small"), "sampling.num_steps=3"]) == 0
    (scored,) = [run for run in stub.state.runs.values() if run is not trained]
    assert (scored["jobType"], scored["group"], scored["config"]["sampling"]["value"]["num_steps"]) == (
        "evaluate",
        "g",
        3,
    )
    until(lambda: len(stub.state.used) == 2)
    model = next(
        artifact["name"] for artifact in stub.state.artifacts.values() if artifact["type"] == "model"
    )
    assert stub.state.used == [(trained["name"], "data-train"), (scored["name"], model)]
    assert (
        len([artifact for artifact in stub.state.artifacts.values() if artifact["type"] == "evaluation"]) == 2
    )
    assert [alert["title"] for alert in stub.state.alerts] == ["small: evaluated"] * 2
    (run,) = runs(tmp_path)
    assert (
        len(run.evaluations) == 2
        and run.summary["eval/class_accuracy"] == trained["summary"]["eval/class_accuracy"]
    )
    by_stage = {run.stage: run for run in runs("team/p")}
    assert set(by_stage) == {"ar_pretrain", "evaluate"}
    assert by_stage["ar_pretrain"].pictures()["references"].getpixel((0, 0)) == (5, 5, 5)
    assert by_stage["evaluate"].evaluations[0].manifest["sampling"]["num_steps"] == 3


def test_a_loss_that_is_not_finite_is_told(stub: Stub, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss):
        train(small_run(tmp_path, tracking=TRACKED, optimizer={"lr": 1e30, "gradient_clip": 0.0}))
    (alert,) = stub.state.alerts
    assert "not finite" in alert["title"] and stub.state.only_run()["state"] == "failed"


@pytest.mark.parametrize("policy, title", [("skip", "a bad step was left out"), ("roll_back", "a bad step")])
def test_a_step_that_is_left_out_is_told(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, title: str
) -> None:
    spoil(monkeypatch, 4)
    train(small_run(tmp_path, tracking=TRACKED, training={"max_steps": 8}, safety={"on_bad_step": policy}))
    assert [alert["title"] for alert in stub.state.alerts] == [f"small: {title}"]
    assert [row["trainer/global_step"] for row in rows_of(stub, "train/loss")][-1] == 8


def test_a_server_that_is_down_at_the_start_costs_no_step(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train(small_run(tmp_path / "without"))
    stub.die()
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    start = time.monotonic()
    train(small_run(tmp_path / "down", tracking=TRACKED))
    assert time.monotonic() - start < 60
    assert "recorded offline" in caplog.text
    folder = tmp_path / "down" / "small"
    assert csv_values(folder, "train/loss") == csv_values(tmp_path / "without" / "small", "train/loss")
    with Stub() as later:
        sync(later, folder)
        assert [row["train/loss"] for row in rows_of(later, "train/loss")] == pytest.approx(
            list(csv_values(folder, "train/loss").values())
        )


@pytest.mark.slow
def test_a_server_that_dies_in_the_middle_costs_no_step_and_no_row(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "3")
    run = small_run(tmp_path, tracking=TRACKED)
    log = WandbRun(run)
    for step in range(1, 51):
        log.log_metrics({"train/loss": float(step)}, step)
    until(lambda: len(rows_of(stub, "train/loss")) == 50)
    stub.die()
    start = time.monotonic()
    for step in range(51, 101):
        log.log_metrics({"train/loss": float(step)}, step)
    assert time.monotonic() - start < 1.0
    start = time.monotonic()
    log.finish()
    assert time.monotonic() - start < 20
    with Stub() as later:
        sync(later, run.folder)
        assert [row["train/loss"] for row in rows_of(later, "train/loss")] == [
            float(step) for step in range(1, 101)
        ]


def test_online_without_a_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    wandb.teardown()
    with pytest.raises(ValueError, match="WANDB_MODE: got 'online'"):
        WandbRun(small_run(tmp_path, tracking=TRACKED)).log_metrics({"a": 1.0}, 1)
