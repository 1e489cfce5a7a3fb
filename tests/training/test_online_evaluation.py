"""Scores during training are right, and training continues as without them."""

from __future__ import annotations

import csv
import dataclasses
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lit_transdiff.base.endings import Preempted
from lit_transdiff.checkpoints.format import open_checkpoint
from lit_transdiff.config import RunConfig
from lit_transdiff.config.loading import read_yaml
from lit_transdiff.evaluation.evaluate import evaluate
from lit_transdiff.evaluation.features import load_extractor
from lit_transdiff.evaluation.statistics import reference_statistics, save_statistics
from lit_transdiff.sampling.generator import load_generator
from lit_transdiff.training import online_evaluation as online
from lit_transdiff.training.trainer import train
from tests.helpers.small import FASHION, ROOT, small_run

METRICS = [
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "precision",
    "recall",
    "feature_diversity",
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    extractor = load_extractor("classifier", FASHION / "classifier.safetensors")
    images = torch.rand(60, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save_statistics(reference_statistics(images.split(20), extractor), path)
    return path


def run_of(folder: Path, reference: Path, every: int, **changes: Any) -> RunConfig:
    settings = {
        "extractor": "classifier",
        "extractor_weights": str(FASHION / "classifier.safetensors"),
        "metrics": METRICS,
    }
    settings |= {
        "reference": str(reference),
        "every": every,
        "online_images": 21,
        "batch_size": 8,
        "num_images": 50,
    }
    return small_run(folder, name=f"every-{every}", evaluation=settings, **changes)


def logged(run: RunConfig, prefix: str) -> list[tuple[int, str, str]]:
    """Step, metric and value as written, of the metrics that begin with ``prefix``."""
    with open(run.folder / "metrics.csv", newline="") as file:
        return [
            (int(r["step"]), r["metric"], r["value"])
            for r in csv.DictReader(file)
            if r["metric"].startswith(prefix)
        ]


def silent(text: str) -> None:
    pass


def test_training_is_the_same_to_the_bit_with_scores_and_without(tmp_path: Path, reference: Path) -> None:
    """With dropout, which reads the global generator, accumulation, and a validation in between."""
    training = {"micro_batch_size": 4, "validate_every": 3}
    runs = [run_of(tmp_path, reference, every, training=training) for every in (0, 2)]
    for run in runs:
        assert run.model.attention_dropout > 0
        train(run, silent)
    plain, scored = runs
    for prefix in ("train/loss", "train/gradient_norm", "val/loss"):
        assert logged(plain, prefix) == logged(scored, prefix) and logged(plain, prefix)
    weights = [load_file(run.folder / "export" / "model.safetensors") for run in runs]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    last = [open_checkpoint(run.folder / "checkpoints" / "step-00000006").weights(None) for run in runs]
    assert all(torch.equal(value, last[1][name]) for name, value in last[0].items())
    assert not logged(plain, "online/")
    assert [(step, name) for step, name, _ in logged(scored, "online/")] == [
        (step, f"online/{name}") for step in (2, 4, 6) for name in METRICS
    ]


def test_the_last_scores_are_those_of_the_exported_model(tmp_path: Path, reference: Path) -> None:
    run = run_of(tmp_path, reference, every=4)
    result = train(run, silent)
    settings = dataclasses.replace(run.evaluation, num_images=21)
    expected = evaluate(load_generator(run.folder), settings, run.sampling, output=run.folder)["scores"]
    found = {
        name.removeprefix("online/"): float(value)
        for step, name, value in logged(run, "online/")
        if step == 6
    }
    for name in METRICS:
        value = expected[name]["mean"] if isinstance(expected[name], dict) else expected[name]
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
        assert result.metrics[f"online/{name}"] == pytest.approx(value, rel=1e-5, abs=1e-6)


def test_at_the_rate_of_the_comparison_a_score_is_that_of_a_run_that_ends_there(
    tmp_path: Path, reference: Path
) -> None:
    """So the runs of the study of equal operations have the scores at equal images, too."""
    optimizer = read_yaml(ROOT / "experiments/fashion/flow.yaml")["optimizer"] | {"warmup_steps": 2}
    short, long = (
        run_of(tmp_path / str(steps), reference, 2, optimizer=optimizer, training={"max_steps": steps})
        for steps in (4, 8)
    )
    for run in (short, long):
        assert (run.optimizer.schedule, run.optimizer.name) == ("constant", "muon")
        train(run, silent)
    for prefix in ("train/loss", "online/"):
        found = logged(short, prefix)
        assert found and found == [row for row in logged(long, prefix) if row[0] <= 4]


def test_the_global_generators_are_left_as_they_were(
    tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if sampling uses them; here it uses all three."""
    states: list[tuple[Any, ...]] = []
    plain_draw, plain_end = online.draw_batch, online.OnlineEvaluation.after_step

    def state() -> tuple[Any, ...]:
        return (
            random.getstate(),
            [array.tolist() for array in map(np.asarray, np.random.get_state()[1:3])],
            torch.get_rng_state().tolist(),
        )

    def wasteful_draw(*arguments: Any) -> Any:
        before = state()
        random.random(), np.random.rand(), torch.rand(1)
        assert all(a != b for a, b in zip(before, state(), strict=True))
        return plain_draw(*arguments)

    def watched(self: Any, *arguments: Any) -> None:
        before = state()
        plain_end(self, *arguments)
        states.append((before, state()))

    monkeypatch.setattr(online, "draw_batch", wasteful_draw)
    monkeypatch.setattr(online.OnlineEvaluation, "after_step", watched)
    train(run_of(tmp_path, reference, every=2), silent)
    assert len(states) == 6 and all(before == after for before, after in states)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"metrics": ["fid"]}, "evaluation.metrics: 'fid' is not known"),
        ({"extractor_weights": None}, "evaluation.extractor_weights: got None"),
        ({"reference": None}, "set evaluation.reference"),
        ({"online_images": 3}, "evaluation.num_neighbours: got 3"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_training(
    tmp_path: Path, reference: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", lambda *_, **__: pytest.fail("training has started"))
    run = run_of(tmp_path, reference, every=2)
    run = dataclasses.replace(run, evaluation=dataclasses.replace(run.evaluation, **changes))
    with pytest.raises(ValueError, match=message):
        train(run, silent)


@pytest.mark.parametrize("batch, step", [(4, 4), (6, 4)])
def test_a_signal_ends_the_scoring_between_two_batches_and_the_next_start_makes_the_scores(
    tmp_path: Path, reference: Path, batch: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation has three batches: the signal comes during one, and no other is sampled after it."""
    plain = run_of(tmp_path / "plain", reference, every=2)
    train(plain, silent)
    run = run_of(tmp_path, reference, every=2, training={"checkpoint_every": 1000})
    drawn: list[int] = []
    draw = online.draw_batch

    def interrupted(*arguments: Any) -> Any:
        drawn.append(len(drawn) + 1)
        if drawn[-1] == batch:
            os.kill(os.getpid(), signal.SIGUSR1)
        return draw(*arguments)

    monkeypatch.setattr(online, "draw_batch", interrupted)
    with pytest.raises(
        Preempted, match=rf"asked to stop \(SIGUSR1\): the checkpoint of step {step} is complete"
    ):
        train(run, silent)
    assert drawn[-1] == batch
    train(run, silent)
    assert drawn[-1] == 9 if batch == 6 else drawn[-1] == 10  # a broken off evaluation is made anew
    rates = "throughput/"
    assert [row for row in logged(run, "") if rates not in row[1]] == [
        row for row in logged(plain, "") if rates not in row[1]
    ]
