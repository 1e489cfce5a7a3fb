"""The promise of CONTRIBUTING.md: a new entry of a visible table is all that its use in a recipe needs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from lit_transdiff.base.hardware import DEVICES
from lit_transdiff.checkpoints.averages import Averaging
from lit_transdiff.config import EvaluationConfig, FlowConfig, OptimizerConfig, SamplingConfig
from lit_transdiff.config.loading import load_run, override, preset, save_yaml
from lit_transdiff.config.model import SIZES
from lit_transdiff.config.sampling import PRESETS
from lit_transdiff.distributed.strategies import STRATEGIES
from lit_transdiff.evaluation.evaluate import evaluate
from lit_transdiff.evaluation.extractor import FeatureExtractor, Features
from lit_transdiff.evaluation.features import EXTRACTORS
from lit_transdiff.evaluation.functions import Scored
from lit_transdiff.evaluation.metrics import METRICS, Metric, check_evaluation
from lit_transdiff.evaluation.statistics import Statistics
from lit_transdiff.flow.guidance import GUIDANCE
from lit_transdiff.flow.loss import DENSITIES, LOSS_TERMS, OBJECTIVES, Prediction
from lit_transdiff.flow.solvers import GRIDS, SOLVERS
from lit_transdiff.models.autoencoder import AUTOENCODERS, AutoencoderKind, IdentityAutoencoder
from lit_transdiff.planning.planner import plan as plan_gpus
from lit_transdiff.sampling.generator import load_generator
from lit_transdiff.stages import PREPARATORY, STAGES
from lit_transdiff.stages.ar_pretrain import ARPretrain
from lit_transdiff.stages.classifier import ClassifierStage
from lit_transdiff.stages.optim import OPTIMIZERS, SCHEDULES
from lit_transdiff.sweep.controller import run_sweep
from lit_transdiff.sweep.definition import Sweep
from lit_transdiff.sweep.file import load_sweep
from lit_transdiff.sweep.search import SEARCHES, Search
from lit_transdiff.sweep.trial import Trial
from lit_transdiff.training.trainer import train
from tests.helpers.small import small_run

USED: list[str] = []


def solver(velocity: Any, x: Tensor, grid: list[float], draw: Any, config: SamplingConfig) -> Tensor:
    USED.append("solver")
    return x - velocity(x, grid[0])


def grid(num_steps: int) -> Tensor:
    USED.append("grid")
    return torch.linspace(1, 0, num_steps + 1)


def density(normal: Tensor, config: FlowConfig) -> Tensor:
    USED.append("density")
    return torch.full_like(normal, 0.5)


def objective(prediction: Prediction, config: FlowConfig) -> Tensor:
    USED.append("objective")
    return (prediction.velocity - prediction.target).abs().flatten(1).mean(1)


def loss_term(prediction: Prediction, config: FlowConfig) -> Tensor:
    USED.append("loss term")
    return prediction.clean.square().flatten(1).mean(1)


def guidance(scale: float, t: float) -> float:
    USED.append("guidance")
    return scale if t < 0.5 else 1.0


def schedule(progress: float) -> float:
    USED.append("schedule")
    return 1 - progress


class AveragedSGD(Averaging, torch.optim.SGD):
    """An optimizer of torch, with averages."""


def optimizer(groups: list[dict[str, Any]], config: OptimizerConfig, decays: Any) -> Averaging:
    USED.append("optimizer")
    return AveragedSGD(groups, decays=decays, lr=config.lr)


class MyStage(ARPretrain):
    """A stage of one's own."""

    def prepare(self) -> None:
        USED.append("stage")


class MyAutoencoder(IdentityAutoencoder):
    """An autoencoder of one's own, read from a folder."""

    def __init__(self, path: str | Path, image_channels: int) -> None:
        USED.append(f"autoencoder {path}")
        super().__init__(image_channels)


class MyExtractor(FeatureExtractor):
    """The mean and the spread of an image."""

    gives_logits = False

    def __init__(self, path: str | Path) -> None:
        super().__init__("mine", torch.nn.Identity(), "none", 2, None)

    def extract(self, pixels: Tensor, spatial: bool) -> Features:
        USED.append("extractor")
        values = pixels.float().flatten(1)
        return Features(torch.stack([values.mean(dim=1), values.std(dim=1)], dim=1))


def metric(generated: Scored, reference: Statistics, settings: EvaluationConfig) -> float:
    USED.append("metric")
    return float(len(generated.features))


@pytest.fixture(autouse=True)
def entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of each table."""
    USED.clear()
    single = STRATEGIES["single"]
    lines: list[tuple[dict[str, Any], Any]] = [
        *((SOLVERS, solver), (GRIDS, grid), (DENSITIES, density), (SCHEDULES, schedule), (STAGES, MyStage)),
        *((OBJECTIVES, objective), (LOSS_TERMS, loss_term), (GUIDANCE, guidance), (OPTIMIZERS, optimizer)),
        *((AUTOENCODERS, AutoencoderKind(MyAutoencoder)), (EXTRACTORS, MyExtractor)),
        (METRICS, Metric(metric, "my metric", True, ())),
        (STRATEGIES, replace(single, build=lambda run: USED.append("strategy") or single.build(run))),
        (SIZES, dict(width=16, num_heads=2, encoder_blocks=1, decoder_blocks=1)),
        (PRESETS, dict(solver="mine", num_steps=3)),
        (DEVICES, replace(DEVICES["h100"], name="MINE")),
    ]
    for table, entry in lines:
        monkeypatch.setitem(table, "mine", entry)


def test_a_recipe_of_new_entries_trains_samples_and_is_scored(tmp_path: Path):
    changes: dict[str, Any] = {
        "stage": "mine",
        "model": {"size": "mine"},
        "autoencoder": {"kind": "mine", "path": "somewhere"},
        "flow": {"density": "mine", "objective": "mine", "loss_terms": {"mine": 0.5}},
        "optimizer": {"name": "mine", "schedule": "mine", "min_lr": 1e-5},
        "sampling": {"solver": "mine", "grid": "mine", "guidance": "mine", "guidance_scale": 2.0},
        "distributed": {"strategy": "mine"},
        "evaluation": {
            "extractor": "mine",
            "extractor_weights": __file__,
            "metrics": ["mine"],
            "num_images": 4,
        },
        "training": {"max_steps": 3},
    }
    save_yaml(small_run(tmp_path, **changes), tmp_path / "recipe.yaml")
    run = load_run(tmp_path / "recipe.yaml")
    check_evaluation(run.evaluation, scores=True)
    train(run, say=lambda text: None)
    trained = {
        "stage",
        "density",
        "objective",
        "loss term",
        "optimizer",
        "schedule",
        "strategy",
        "autoencoder somewhere",
    }
    assert trained | {"solver", "grid", "guidance"} <= set(USED)
    generator = load_generator(run.folder)
    sampling = override(run, preset("mine"), ("sampling",)).sampling
    found = evaluate(generator, run.evaluation, sampling, output=tmp_path / "scores")
    assert found["scores"] == {"mine": 4.0} and {"extractor", "metric"} <= set(USED)
    assert generator.model.config.width == 16


def test_a_preparatory_stage_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Mine(ClassifierStage):
        """Writes a word."""

        def export(self, folder: Path, batches: Any) -> None:
            (folder / "word.txt").write_text(str(len(next(iter(batches)).values)))

    monkeypatch.setitem(PREPARATORY, "mine", Mine)
    run = small_run(tmp_path, stage="mine", training={"max_steps": 2})
    train(run, say=lambda text: None)
    assert (run.folder / "export" / "word.txt").read_text() == "8"


def test_a_gpu_and_a_strategy_are_lines_of_the_plan(tmp_path: Path):
    text = plan_gpus(small_run(tmp_path), 1, "mine", 0.5)
    assert "1 x mine" in text and any(line.startswith("mine ") for line in text.splitlines())


def test_a_search_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def twice(sweep: Sweep, trials: Sequence[Trial], seed: int) -> dict[str, Any] | None:
        return None if len(trials) == 2 else {"x": len(trials)}

    monkeypatch.setitem(SEARCHES, "mine", Search(twice))
    sweep = {"method": "mine", "parameters": {"x": {"min": 0, "max": 1}}, "command": ["true"]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    trials = run_sweep(load_sweep(tmp_path / "sweep.yaml"), tmp_path / "out", say=lambda text: None)
    assert [trial.settings for trial in trials] == [{"x": 0}, {"x": 1}]
    monkeypatch.setitem(SEARCHES, "mine", Search(twice, needs_metric=True))
    with pytest.raises(ValueError, match="metric: got None; allowed: name and goal, for mine"):
        load_sweep(tmp_path / "sweep.yaml")
