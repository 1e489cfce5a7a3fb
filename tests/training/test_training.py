"""Training through the same functions as the command line, on real images, with a few thousand parameters."""

import csv
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_transdiff.checkpoints.export import read_export
from lit_transdiff.checkpoints.format import open_checkpoint
from lit_transdiff.cli.pipeline import load_pipeline, train_and_score
from lit_transdiff.config.loading import save_yaml
from lit_transdiff.distributed import build_fabric
from lit_transdiff.sampling.generator import load_generator
from lit_transdiff.stages import PREPARATORY
from lit_transdiff.stages.base import TransDiffStage
from lit_transdiff.training.build import build, check_run, outline
from lit_transdiff.training.callbacks import NonFiniteLoss
from lit_transdiff.training.trainer import train
from tests.helpers.small import FAMILIES, FASHION, STEADY, small_run

MRAR = {
    "stage": "mrar_finetune",
    "name": "mrar",
    "model": {"num_references": 4},
    "training": {"global_batch_size": 4},
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "model.safetensors")


def losses(folder: Path) -> dict[int, float]:
    with open(folder / "metrics.csv", newline="") as file:
        return {
            int(row["step"]): float(row["value"])
            for row in csv.DictReader(file)
            if row["metric"] == "train/loss"
        }


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


@pytest.fixture(scope="module")
def one_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished one-step run that tests may read."""
    run = small_run(tmp_path_factory.mktemp("runs"))
    train(run, say=lambda text: None)
    return run.folder


def test_a_run_folder_holds_everything(one_step: Path):
    expected = (
        "config.yaml",
        "environment.json",
        "metrics.csv",
        "checkpoints/step-00000006/COMPLETE.json",
        "samples/step-00000006.png",
    )
    assert all((one_step / name).is_file() for name in expected)
    export = read_export(one_step)
    assert export.info["step"] == 6 and export.info["images_seen"] == 48
    assert export.info["class_names"][0] == "t-shirt"
    assert list(losses(one_step)) == [2, 4, 6]
    assert all(math.isfinite(value) for value in losses(one_step).values())


def test_the_logged_distance_to_the_average_is_that_of_the_checkpoint(one_step: Path):
    found = open_checkpoint(one_step / "checkpoints" / "step-00000006")
    now, average = found.weights(None), found.weights("ema")
    apart = sum((now[name] - average[name]).double().square().sum() for name in found.shapes) ** 0.5
    size = sum(now[name].double().square().sum() for name in found.shapes) ** 0.5
    with open(one_step / "metrics.csv", newline="") as file:
        logged = [
            float(row["value"]) for row in csv.DictReader(file) if row["metric"] == "train/ema_distance"
        ]
    assert len(logged) == 3 and logged[-1] == pytest.approx(float(apart / size), rel=1e-5) and logged[-1] > 0


def test_a_trained_run_draws_images_in_three_lines(one_step: Path):
    generator = load_generator(one_step)
    images = generator.images([0, 7], seeds=[1, 2])
    assert images.shape == (2, 1, 1, 32, 32)


@pytest.mark.parametrize("changes", [{}, MRAR, *FAMILIES.values()], ids=["one-step", "mrar", *FAMILIES])
@pytest.mark.parametrize("how", ["broken off", "extended"])
def test_resumed_equals_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, how: str
):
    """Broken off in step 6 (after the checkpoint of step 4), or ended at step 4 and made longer: the same
    losses and weights.
    """
    whole, part = small_run(tmp_path / "whole", **changes), small_run(tmp_path / "part", **changes)
    train(whole, say=lambda text: None)
    if how == "extended":
        train(
            small_run(tmp_path / "part", **_merge(changes, {"training": {"max_steps": 4}})),
            say=lambda text: None,
        )
    else:
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
            patch.setattr(TransDiffStage, "objective", power_cut_at(5))
            train(part, say=lambda text: None)
    train(part, say=lambda text: None)
    assert largest_difference(weights(whole.folder), weights(part.folder)) == 0
    assert losses(whole.folder) == losses(part.folder)


def power_cut_at(step: int):
    original = TransDiffStage.objective

    def objective(self, batch, normal):
        if self.global_step == step:
            raise RuntimeError("power cut")
        return original(self, batch, normal)

    return objective


@pytest.mark.numeric
def test_accumulation_is_an_average(tmp_path: Path):
    """Two passes of four rows give what one pass of eight gives: same data, noise,
    times and dropped labels.
    """
    no_dropout = {"model": {"attention_dropout": 0.0, "projection_dropout": 0.0}, "optimizer": STEADY}
    for name, micro in (("one", 8), ("two", 4)):
        train(
            small_run(tmp_path, name=name, training={"micro_batch_size": micro}, **no_dropout),
            say=lambda text: None,
        )
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-5


def test_the_diffusion_head_leaves_the_encoder_as_it_was(tmp_path: Path, one_step: Path):
    run = small_run(tmp_path, stage="diffusion_head", name="head", init_from=str(one_step))
    train(run, say=lambda text: None)
    before, after = weights(one_step), weights(run.folder)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("decoder.")}


def test_mrar_starts_from_a_one_step_run_with_a_report(tmp_path: Path, one_step: Path):
    said: list[str] = []
    run = small_run(tmp_path, **MRAR, init_from=str(one_step))
    train(run, say=said.append)
    text = "\n".join(said)
    assert "newly made: encoder.reference_projection.weight" in text
    assert "adapted: encoder.mask_tokens" in text
    images = load_generator(run.folder).images([3], seeds=[0])
    assert images.shape == (1, 4, 1, 32, 32)


def test_the_last_step_is_kept_whatever_the_rhythm(tmp_path: Path):
    run = small_run(tmp_path, training={"checkpoint_every": 4})
    train(run, say=lambda text: None)
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["step-00000006"]


def test_every_checkpoint_says_what_made_it(one_step: Path):
    checkpoint = open_checkpoint(one_step / "checkpoints" / "step-00000006").training()
    assert checkpoint["run"]["optimizer"]["lr"] == 1e-3
    assert checkpoint["environment"]["packages"]["torch"] and "git_commit" in checkpoint["environment"]


def test_bf16_mixed_keeps_float32_weights_and_averages(tmp_path: Path):
    run = small_run(tmp_path, training={"precision": "bf16-mixed"})
    train(run, say=lambda text: None)
    file = run.folder / "checkpoints" / "step-00000006" / "rank-00000.safetensors"
    assert {value.dtype for value in load_file(file).values()} == {torch.float32}


def test_shards_behind_a_pipe_train_too(tmp_path: Path):
    shards = f"pipe:cat {FASHION}/train/fashion-train-" + "{000000..000007}.tar"
    run = small_run(tmp_path, data={"train": shards, "index": str(FASHION / "train" / "index.json")})
    assert train(run, say=lambda text: None).step == 6


def test_a_finished_run_is_left_as_it_is(one_step: Path):
    run = read_export(one_step).run
    before = (one_step / "export" / "model.safetensors").stat().st_mtime_ns
    said: list[str] = []
    train(run, say=said.append)
    assert "already trained to step 6" in said[0]
    assert (one_step / "export" / "model.safetensors").stat().st_mtime_ns == before


def test_other_settings_do_not_continue_a_run(one_step: Path):
    run = small_run(one_step.parent, optimizer={"lr": 2e-3})
    with pytest.raises(
        ValueError, match=r"holds a run with other settings \(optimizer\.lr: 0\.001 there, 0\.002 now\)"
    ):
        train(run, say=lambda text: None)


def test_a_loss_that_is_not_finite_stops_training_and_names_step_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original = TransDiffStage.objective

    def poisoned(self, batch, normal):
        rows, t = original(self, batch, normal)
        return (rows * float("nan") if self.global_step == 4 else rows), t

    monkeypatch.setattr(TransDiffStage, "objective", poisoned)
    run = small_run(tmp_path)
    with pytest.raises(
        NonFiniteLoss,
        match=r"the loss is nan at step 5 on rank 0\. Samples of that batch: fashion-train-\d+\.tar/",
    ) as error:
        train(run, say=lambda text: None)
    assert str(run.folder / "checkpoints") in str(error.value)
    kept = open_checkpoint(run.folder / "checkpoints" / "step-00000004").weights(None)
    assert all(value.isfinite().all() for value in kept.values())
    assert not (run.folder / "export").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stage": "ar_pretrian"}, r"stage: 'ar_pretrian' is not known\. Did you mean 'ar_pretrain'"),
        ({"model": {"num_classes": 9}}, r"data\.train: classes in .*: got 10; allowed: model\.num_classes=9"),
        ({"model": {"latent_channels": 3}}, r"model\.latent_channels: got 3; allowed: the autoencoder's 1"),
        ({"model": {"num_references": 4}}, r"model\.num_references: got 4; allowed: 1 in stage ar_pretrain"),
        (
            {"stage": "mrar_finetune"},
            r"model\.num_references: got 1; allowed: at least 2 in stage mrar_finetune",
        ),
        (
            {"autoencoder": {"kind": "kl"}},
            r"autoencoder\.path: got None; allowed: a folder when autoencoder\.kind is 'kl'",
        ),
        (
            {"autoencoder": {"path": "x"}},
            r"autoencoder\.path: got 'x'; allowed: null when autoencoder\.kind is 'identity'",
        ),
        (
            {"autoencoder": {"kind": "kll", "path": "x"}},
            r"autoencoder\.kind: 'kll' is not known\. Did you mean 'kl'",
        ),
        (
            {"training": {"frozen_dropout": True}},
            r"frozen_dropout: got True; allowed: false in stage ar_pretrain",
        ),
        (
            {"stage": "classifier", "training": {"frozen_dropout": True}},
            r"frozen_dropout: .* false in stage classifier",
        ),
        (
            {"stage": "classifier", "safety": {"spike_factor": 3}},
            r"safety\.spike_factor: got 3\.0; allowed: 0 in stage",
        ),
        ({"stage": "diffusion_head"}, r"init_from: got None; allowed: a trained run"),
        (
            {"flow": {"density": "normal"}},
            r"flow\.density: 'normal' is not known\. Did you mean 'logit_normal'",
        ),
        (
            {"optimizer": {"schedule": "cosin"}},
            r"optimizer\.schedule: 'cosin' is not known\. Did you mean 'cosine'",
        ),
        ({"training": {"micro_batch_size": 3}}, r"training\.micro_batch_size: got 3; allowed: a divisor"),
        (
            {"evaluation": {"metrics": ["precison"]}},
            r"evaluation\.metrics: 'precison' is not known\. Did you mean 'precision'",
        ),
        (
            {"evaluation": {"extractor": "incepton"}},
            r"evaluation\.extractor: 'incepton' is not known\. Did you mean 'inception'",
        ),
        (
            {"stage": "classifier", "evaluation": {"metrics": ["fid"]}},
            r"evaluation\.metrics: 'fid' is not known",
        ),
        ({"evaluation": {"every": 2}}, r"evaluation\.extractor_weights: got None"),
        (
            {"optimizer": {"muon_lr": 0.1}},
            r"optimizer\.muon_lr: got 0\.1; allowed: null with optimizer\.name=adamw",
        ),
        (
            {"stage": "classifier", "optimizer": {"name": "muon"}},
            r"optimizer\.name: got 'muon'; allowed: 'adamw' in stage",
        ),
        (
            {"optimizer": {"name": "muon"}, "distributed": {"strategy": "zero3"}},
            r"distributed\.strategy: got 'zero3'; "
            r"allowed: single, ddp, zero1, fsdp with optimizer\.name=muon",
        ),
        (
            {"optimizer": {"name": "muon"}, "distributed": {"strategy": "zero1", "offload": "cpu"}},
            r"distributed\.offload: got 'cpu'; allowed: 'none' with optimizer\.name=muon",
        ),
        (
            {"distributed": {"strategy": "dpp"}},
            r"distributed\.strategy: 'dpp' is not known\. Did you mean 'ddp'",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_training(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        build(small_run(tmp_path, **changes))
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    "scoring, message",
    [
        ({"extractor_weights": None}, r"evaluation\.extractor_weights: got None"),
        ({"reference": None}, "Frechet distance needs the statistics of real images"),
        ({"extractor": "dinov2"}, "class accuracy needs logits"),
        ({"metrics": ["spatial_frechet_distance"]}, "needs spatial features"),
    ],
)
def test_what_a_run_cannot_be_scored_with_is_refused_only_where_it_is_scored(
    tmp_path: Path, scoring: dict, message: str
):
    settings = {"extractor": "classifier", "extractor_weights": "made/later", "reference": "made/later"}
    settings |= {"metrics": ["frechet_distance", "class_accuracy"]}
    check_run(small_run(tmp_path, evaluation=settings | {"every": 2}))
    given = settings | scoring
    check_run(small_run(tmp_path, evaluation=given))
    # of which no image is drawn
    check_run(small_run(tmp_path, stage="classifier", evaluation=given | {"every": 2}))
    with pytest.raises(ValueError, match=message):
        check_run(small_run(tmp_path, evaluation=given | {"every": 2}))
    with pytest.raises(ValueError, match=message):
        train_and_score(small_run(tmp_path, evaluation=given), build_fabric())
    recipe = tmp_path / "recipe.yaml"
    save_yaml(small_run(tmp_path, evaluation=given), recipe)
    (tmp_path / "pipeline.yaml").write_text("runs: [{recipe: recipe.yaml}]")
    with pytest.raises(ValueError, match=message):
        load_pipeline(tmp_path / "pipeline.yaml")
    assert not (tmp_path / "small").exists()


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path, one_step: Path):
    run = small_run(tmp_path, init_from=str(one_step), model={"encoder_blocks": 3})
    with pytest.raises(
        ValueError, match=r"encoder\.blocks\.2\.norm1\.weight: \[32\] here, missing in the checkpoint"
    ):
        build(run)


def test_missing_data_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="lit-transdiff pack"):
        build(small_run(tmp_path, data={"train": str(FASHION / "trian")}))


def test_a_missing_checkpoint_names_the_runs_nearby(tmp_path: Path, one_step: Path):
    with pytest.raises(FileNotFoundError, match=r"Trained runs there: .*small"):
        build(small_run(tmp_path, init_from=str(one_step.parent / "smal")))


def test_a_plan_writes_nothing(tmp_path: Path):
    text = outline(small_run(tmp_path))
    assert "6 of 8 rows" in text and "4,000 images" in text
    assert list(tmp_path.iterdir()) == []


def _merge(a: dict, b: dict) -> dict:
    return {k: {**a.get(k, {}), **b[k]} if k in b else a[k] for k in a.keys() | b.keys()}


def test_a_lost_export_is_made_again_from_the_last_checkpoint(tmp_path: Path):
    run = small_run(tmp_path)
    train(run, say=lambda text: None)
    before = weights(run.folder)
    shutil.rmtree(run.folder / "export")
    train(run, say=lambda text: None)
    assert largest_difference(before, weights(run.folder)) == 0


@pytest.mark.parametrize("stage", PREPARATORY)
def test_preparatory_stages_go_on_exactly_too(tmp_path: Path, stage: str):
    """Posterior noise and dropout follow from the step; four steps and two more are six."""
    for name, lengths in (("whole", (6,)), ("part", (4, 6))):
        for steps in lengths:
            train(
                small_run(tmp_path, stage=stage, name=name, training={"max_steps": steps}),
                say=lambda text: None,
            )
    whole, part = (
        load_file(next((tmp_path / name / "export").glob("*.safetensors"))) for name in ("whole", "part")
    )
    assert largest_difference(whole, part) == 0
    assert (
        losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "part"))
        and len(losses(tmp_path / "whole")) == 3
    )


def test_a_run_broken_off_before_its_first_checkpoint_leaves_no_rows_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = small_run(tmp_path, training={"checkpoint_every": 6})
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(TransDiffStage, "objective", power_cut_at(4))
        train(run, say=lambda text: None)
    train(run, say=lambda text: None)
    with open(run.folder / "metrics.csv", newline="") as file:
        steps = [row["step"] for row in csv.DictReader(file) if row["metric"] == "train/loss"]
    assert steps == ["2", "4", "6"]


def test_a_length_that_decides_the_learning_rate_does_not_change(tmp_path: Path):
    cosine = {"optimizer": {"schedule": "cosine"}}
    train(small_run(tmp_path, **cosine), say=lambda text: None)
    with pytest.raises(ValueError, match=r"training\.max_steps: 6 there, 8 now"):
        train(small_run(tmp_path, **cosine, training={"max_steps": 8}), say=lambda text: None)
